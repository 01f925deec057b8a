"""The networks of published captioners in small, as their authors' code computes them; nothing of captionfix here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs: int, planes: int, stride: int, deep: bool, caffe: bool) -> None:
        super().__init__()
        out = planes * 4 if deep else planes
        if deep:
            self.conv1 = nn.Conv2d(inputs, planes, 1, stride if caffe else 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1 if caffe else stride, 1, bias=False)
            self.conv3 = nn.Conv2d(planes, out, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(out)
        else:
            self.conv1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(planes), nn.BatchNorm2d(planes)
        if stride > 1 or inputs != out:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.deep = deep

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.deep:
            out = self.bn3(self.conv3(F.relu(out)))
        return F.relu(out + (self.downsample(x) if hasattr(self, "downsample") else x))


class ResNet(nn.Module):
    """A ResNet in torchvision's layout; `caffe` is the variant of ImageCaptioning.pytorch."""

    def __init__(self, counts=(1, 2, 1, 1), deep: bool = True, caffe: bool = False, planes=(2, 3, 4, 5)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 0, ceil_mode=True) if caffe else nn.MaxPool2d(3, 2, 1)
        inputs = 4
        for i, (count, plane) in enumerate(zip(counts, planes, strict=True)):
            blocks = []
            for k in range(count):
                blocks.append(Block(inputs, plane, 2 if i and not k else 1, deep, caffe))
                inputs = plane * 4 if deep else plane
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        return nn.Sequential(*list(self.children())[:-2])(x)


def lively(module: nn.Module) -> nn.Module:
    """Norms that do something, weights large enough for words to differ."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d)):
                child.running_mean.uniform_(-0.3, 0.3)
                child.running_var.uniform_(0.3, 0.9)
                child.weight.uniform_(0.7, 1.5)
                child.bias.uniform_(-0.2, 0.4)
            elif isinstance(child, (nn.Linear, nn.LSTM, nn.LSTMCell)):
                for parameter in child.parameters():
                    parameter.mul_(2)
    return module.eval()


# yunjey and Udacity


class Encoder(nn.Module):
    """EncoderCNN of both: yunjey's has `linear` and `bn`, Udacity's `embed`."""

    def __init__(self, resnet: ResNet, size: int, yunjey: bool) -> None:
        super().__init__()
        self.resnet = nn.Sequential(*list(resnet.children())[:-1])
        if yunjey:
            self.linear, self.bn = nn.Linear(resnet.fc.in_features, size), nn.BatchNorm1d(size, momentum=0.01)
        else:
            self.embed = nn.Linear(resnet.fc.in_features, size)

    def forward(self, images: Tensor) -> Tensor:
        x = self.resnet(images).flatten(1)
        return self.bn(self.linear(x)) if hasattr(self, "bn") else self.embed(x)


class Decoder(nn.Module):
    """DecoderRNN under the names of whoever wrote it."""

    def __init__(self, names: tuple[str, ...], sizes: tuple[int, int, int], layers: int = 1, head=()) -> None:
        super().__init__()
        words, width, hidden = sizes
        self.names = names
        setattr(self, names[0], nn.Embedding(words, width))
        setattr(self, names[1], nn.LSTM(width, hidden, layers, batch_first=True, dropout=0.4 if layers > 1 else 0))
        for name, size, following in zip(names[2:], (hidden, *head), (*head, words), strict=True):
            setattr(self, name, nn.Linear(size, following))

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        parts = [getattr(self, name) for name in self.names]
        out, _ = parts[1](torch.cat([features.unsqueeze(1), parts[0](captions)], 1))
        for layer in parts[2:-1]:
            out = F.relu(layer(out))
        return F.log_softmax(parts[-1](out), 2)


# sgrvinod


class Encoder2(nn.Module):
    def __init__(self, resnet: ResNet, grid: int) -> None:
        super().__init__()
        self.enc_image_size = grid
        self.resnet = nn.Sequential(*list(resnet.children())[:-2])
        self.adaptive_pool = nn.AdaptiveAvgPool2d((grid, grid))

    def forward(self, images: Tensor) -> Tensor:
        return self.adaptive_pool(self.resnet(images)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    def __init__(self, encoder_dim: int, decoder_dim: int, attention_dim: int) -> None:
        super().__init__()
        self.encoder_att = nn.Linear(encoder_dim, attention_dim)
        self.decoder_att = nn.Linear(decoder_dim, attention_dim)
        self.full_att = nn.Linear(attention_dim, 1)
        self.relu, self.softmax = nn.ReLU(), nn.Softmax(dim=1)

    def forward(self, encoder_out: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        both = self.encoder_att(encoder_out) + self.decoder_att(hidden).unsqueeze(1)
        alpha = self.softmax(self.full_att(self.relu(both)).squeeze(2))
        return (encoder_out * alpha.unsqueeze(2)).sum(dim=1), alpha


class DecoderWithAttention(nn.Module):
    def __init__(self, attention_dim: int, embed_dim: int, decoder_dim: int, vocab_size: int, encoder_dim: int) -> None:
        super().__init__()
        self.encoder_dim, self.vocab_size = encoder_dim, vocab_size
        self.attention = Attention(encoder_dim, decoder_dim, attention_dim)
        self.embedding = nn.Embedding(vocab_size, embed_dim)
        self.dropout = nn.Dropout(p=0.5)
        self.decode_step = nn.LSTMCell(embed_dim + encoder_dim, decoder_dim, bias=True)
        self.init_h, self.init_c = nn.Linear(encoder_dim, decoder_dim), nn.Linear(encoder_dim, decoder_dim)
        self.f_beta = nn.Linear(decoder_dim, encoder_dim)
        self.sigmoid = nn.Sigmoid()
        self.fc = nn.Linear(decoder_dim, vocab_size)

    def forward(self, encoder_out: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        encoder_out = encoder_out.reshape(len(encoder_out), -1, encoder_out.shape[-1])
        mean = encoder_out.mean(dim=1)
        h, c = self.init_h(mean), self.init_c(mean)
        predictions, alphas = [], []
        for t in range(captions.shape[1]):
            awe, alpha = self.attention(encoder_out, h)
            awe = self.sigmoid(self.f_beta(h)) * awe
            h, c = self.decode_step(torch.cat([self.embedding(captions[:, t]), awe], dim=1), (h, c))
            predictions.append(self.fc(self.dropout(h)))
            alphas.append(alpha)
        return torch.stack(predictions, 1), torch.stack(alphas, 1)


# ImageCaptioning.pytorch


class LSTMCore(nn.Module):
    def __init__(self, inputs: int, size: int, attended: int = 0) -> None:
        super().__init__()
        self.size = size
        if attended:
            self.a2c = nn.Linear(attended, 2 * size)
            self.attention = GridAttention(size, 6)
        self.i2h, self.h2h = nn.Linear(inputs, 5 * size), nn.Linear(size, 5 * size)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor], grid=None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        sums = self.i2h(x) + self.h2h(state[0])
        chunk = torch.sigmoid(sums.narrow(1, 0, 3 * self.size))
        candidate = sums.narrow(1, 3 * self.size, 2 * self.size)
        if grid is not None:
            candidate = candidate + self.a2c(self.attention(state[0], *grid))
        candidate = torch.max(candidate.narrow(1, 0, self.size), candidate.narrow(1, self.size, self.size))
        c = chunk.narrow(1, self.size, self.size) * state[1] + chunk.narrow(1, 0, self.size) * candidate
        h = chunk.narrow(1, 2 * self.size, self.size) * torch.tanh(c)
        return h, (h, c)


class GridAttention(nn.Module):
    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.h2att, self.alpha_net = nn.Linear(size, hidden), nn.Linear(hidden, 1)

    def forward(self, h: Tensor, feats: Tensor, p_feats: Tensor) -> Tensor:
        dot = torch.tanh(p_feats + self.h2att(h).unsqueeze(1).expand_as(p_feats))
        self.weight = F.softmax(self.alpha_net(dot).squeeze(2), dim=1)
        return torch.bmm(self.weight.unsqueeze(1), feats).squeeze(1)


class UpDownCore(nn.Module):
    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.att_lstm = nn.LSTMCell(inputs + size * 2, size)
        self.lang_lstm = nn.LSTMCell(size * 2, size)
        self.attention = GridAttention(size, 6)


class Captioning(nn.Module):
    """FCModel ("fc"), NewFCModel ("new_fc"), ShowTellModel ("show_tell"), Att2in2Model, UpDownModel, with log_softmax.

    `old` is the first Att2in: no projection of the grid, no ReLU behind the embedding.
    """

    def __init__(self, kind: str, words: int, channels: int, size: int = 8, inputs: int = 7, use_bn: int = 0) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        rows = words + 1
        self.logit = nn.Linear(size, rows)
        if kind in ("fc", "new_fc", "show_tell"):
            self.embed = nn.Embedding(rows, inputs)
            setattr(self, "fc_embed" if kind == "new_fc" else "img_embed", nn.Linear(channels, inputs))
            core = nn.LSTM(inputs, size, 1, bias=False) if kind == "show_tell" else LSTMCore(inputs, size)
            setattr(self, "_core" if kind == "new_fc" else "core", core)
            return
        self.embed = nn.Sequential(nn.Embedding(rows, inputs), nn.ReLU(), nn.Dropout(0.5))
        norms = [nn.BatchNorm1d(channels)] if use_bn else [], [nn.BatchNorm1d(size)] if use_bn == 2 else []
        self.att_embed = nn.Sequential(*norms[0], nn.Linear(channels, size), nn.ReLU(), nn.Dropout(0.5), *norms[1])
        self.ctx2att = nn.Linear(size, 6)
        if kind == "updown":
            self.fc_embed = nn.Sequential(nn.Linear(channels, size), nn.ReLU(), nn.Dropout(0.5))
            self.core = UpDownCore(inputs, size)
        else:
            self.core = LSTMCore(inputs, size, attended=size)

    def forward(self, fc: Tensor, att: Tensor, seq: Tensor) -> Tensor:
        """(B, F) and (B, N, F) features, (B, T) words that begin with 0 -> (B, T, V) log-probabilities."""
        zero = fc.new_zeros(len(fc), self.size)
        state = zero, zero
        self.weights = []
        outs = []
        if self.kind in ("fc", "new_fc", "show_tell"):
            steps = [self.fc_embed(fc) if self.kind == "new_fc" else self.img_embed(fc), *self.embed(seq).unbind(1)]
            if self.kind == "show_tell":
                hidden = tuple(part.unsqueeze(0) for part in state)
                for x in steps:
                    out, hidden = self.core(x.unsqueeze(0), hidden)
                    outs.append(out.squeeze(0))
            else:
                core = self._core if self.kind == "new_fc" else self.core
                for x in steps:
                    out, state = core(x, state)
                    outs.append(out)
            return F.log_softmax(self.logit(torch.stack(outs[1:], 1)), 2)
        values = torch.stack([self.att_embed(one) for one in att])
        grid = values, self.ctx2att(values)
        second = zero, zero
        for x in self.embed(seq).unbind(1):
            if self.kind == "updown":
                state = self.core.att_lstm(torch.cat([second[0], self.fc_embed(fc), x], 1), state)
                found = self.core.attention(state[0], *grid)
                second = self.core.lang_lstm(torch.cat([found, state[0]], 1), second)
                outs.append(second[0])
            else:
                out, state = self.core(x, state, grid)
                outs.append(out)
            self.weights.append(self.core.attention.weight)
        return F.log_softmax(self.logit(torch.stack(outs, 1)), 2)


# im2txt


def slim_inception(
    images: Tensor, get: Callable[[str, tuple[int, ...]], Tensor], depth: Callable[[int], int]
) -> Tensor:
    """TF-Slim's inception_v3_base; `get` gives a variable by its name and shape (made where it is new)."""

    def conv(x: Tensor, out: int, kernel: tuple[int, int], scope: str, stride: int = 1, same: bool = True) -> Tensor:
        weights = get(f"InceptionV3/{scope}/weights", (*kernel, x.shape[1], depth(out))).permute(3, 2, 0, 1)
        x = F.conv2d(x, weights, None, stride, (kernel[0] // 2, kernel[1] // 2) if same else 0)
        mean, variance, beta = (
            get(f"InceptionV3/{scope}/BatchNorm/{name}", (depth(out),)).view(1, -1, 1, 1)
            for name in ("moving_mean", "moving_variance", "beta")
        )
        return F.relu((x - mean) / torch.sqrt(variance + 0.001) + beta)

    def average(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)  # SAME: the padding does not count

    def chain(x: Tensor, scope: str, *steps: tuple[int, tuple[int, int], str]) -> Tensor:
        for out, kernel, name in steps:
            x = conv(x, out, kernel, f"{scope}/{name}")
        return x

    one, three, wide, tall = (1, 1), (3, 3), (1, 7), (7, 1)
    x = conv(images, 32, three, "Conv2d_1a_3x3", 2, False)
    x = conv(x, 32, three, "Conv2d_2a_3x3", same=False)
    x = F.max_pool2d(conv(x, 64, three, "Conv2d_2b_3x3"), 3, 2)
    x = conv(x, 80, one, "Conv2d_3b_1x1", same=False)
    x = F.max_pool2d(conv(x, 192, three, "Conv2d_4a_3x3", same=False), 3, 2)
    for block, last, names in (
        ("Mixed_5b", 32, ("Conv2d_0a_1x1", "Conv2d_0b_5x5")),
        ("Mixed_5c", 64, ("Conv2d_0b_1x1", "Conv_1_0c_5x5")),
        ("Mixed_5d", 64, ("Conv2d_0a_1x1", "Conv2d_0b_5x5")),
    ):
        s = f"{block}/Branch_"
        x = torch.cat(
            [
                chain(x, f"{s}0", (64, one, "Conv2d_0a_1x1")),
                chain(x, f"{s}1", (48, one, names[0]), (64, (5, 5), names[1])),
                chain(
                    x, f"{s}2", (64, one, "Conv2d_0a_1x1"), (96, three, "Conv2d_0b_3x3"), (96, three, "Conv2d_0c_3x3")
                ),
                chain(average(x), f"{s}3", (last, one, "Conv2d_0b_1x1")),
            ],
            1,
        )
    s = "Mixed_6a/Branch_"
    inner = chain(x, f"{s}1", (64, one, "Conv2d_0a_1x1"), (96, three, "Conv2d_0b_3x3"))
    x = torch.cat(
        [
            conv(x, 384, three, f"{s}0/Conv2d_1a_1x1", 2, False),
            conv(inner, 96, three, f"{s}1/Conv2d_1a_1x1", 2, False),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        s = f"{block}/Branch_"
        x = torch.cat(
            [
                chain(x, f"{s}0", (192, one, "Conv2d_0a_1x1")),
                chain(
                    x,
                    f"{s}1",
                    (width, one, "Conv2d_0a_1x1"),
                    (width, wide, "Conv2d_0b_1x7"),
                    (192, tall, "Conv2d_0c_7x1"),
                ),
                chain(
                    x,
                    f"{s}2",
                    (width, one, "Conv2d_0a_1x1"),
                    (width, tall, "Conv2d_0b_7x1"),
                    (width, wide, "Conv2d_0c_1x7"),
                    (width, tall, "Conv2d_0d_7x1"),
                    (192, wide, "Conv2d_0e_1x7"),
                ),
                chain(average(x), f"{s}3", (192, one, "Conv2d_0b_1x1")),
            ],
            1,
        )
    s = "Mixed_7a/Branch_"
    first = chain(x, f"{s}0", (192, one, "Conv2d_0a_1x1"))
    second = chain(x, f"{s}1", (192, one, "Conv2d_0a_1x1"), (192, wide, "Conv2d_0b_1x7"), (192, tall, "Conv2d_0c_7x1"))
    x = torch.cat(
        [
            conv(first, 320, three, f"{s}0/Conv2d_1a_3x3", 2, False),
            conv(second, 192, three, f"{s}1/Conv2d_1a_3x3", 2, False),
            F.max_pool2d(x, 3, 2),
        ],
        1,
    )
    for block, name in (("Mixed_7b", "Conv2d_0b_3x1"), ("Mixed_7c", "Conv2d_0c_3x1")):
        s = f"{block}/Branch_"
        left = chain(x, f"{s}1", (384, one, "Conv2d_0a_1x1"))
        right = chain(x, f"{s}2", (448, one, "Conv2d_0a_1x1"), (384, three, "Conv2d_0b_3x3"))
        x = torch.cat(
            [
                chain(x, f"{s}0", (320, one, "Conv2d_0a_1x1")),
                chain(left, f"{s}1", (384, (1, 3), "Conv2d_0b_1x3")),
                chain(left, f"{s}1", (384, (3, 1), name)),
                chain(right, f"{s}2", (384, (1, 3), "Conv2d_0c_1x3")),
                chain(right, f"{s}2", (384, (3, 1), "Conv2d_0d_3x1")),
                chain(average(x), f"{s}3", (192, one, "Conv2d_0b_1x1")),
            ],
            1,
        )
    return x


def tensorflow_decoder(features: Tensor, tokens: Tensor, v: dict[str, Tensor], cell: tuple[str, str]) -> Tensor:
    """im2txt's decoder, with TensorFlow's BasicLSTMCell."""
    kernel, bias = v[f"lstm/{cell[0]}"], v[f"lstm/{cell[1]}"]
    h = c = features.new_zeros(len(features), kernel.shape[1] // 4)
    logits = []
    for x in (features.mean((2, 3)) @ v["image_embedding/weights"], *v["seq_embedding/map"][tokens].unbind(1)):
        i, j, f, o = (torch.cat([x, h], 1) @ kernel + bias).chunk(4, 1)
        c = c * torch.sigmoid(f + 1.0) + torch.sigmoid(i) * torch.tanh(j)
        h = torch.tanh(c) * torch.sigmoid(o)
        logits.append(h @ v["logits/weights"] + v["logits/biases"])
    return torch.stack(logits[1:], 1)
