"""The decoders of published captioners, of plain operations. B images, T words, F channels on h x w cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FirstToken(nn.Module):
    """The projected mean of the feature map is the recurrent network's first input; its output then is not used.

    Whether the model was trained to say the start there, or nothing, makes no difference to the words after the start.
    """

    def __init__(self, cnn: nn.Module, project: nn.Module, embed: nn.Module, rnn: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.cnn, self.project, self.embed, self.rnn, self.head = cnn, project, embed, rnn, head

    def encode(self, pixels: Tensor) -> Tensor:
        return self.cnn(pixels)

    def decode(self, features: Tensor, tokens: Tensor) -> Tensor:
        image = self.project(F.adaptive_avg_pool2d(features, 1).flatten(1))
        out, _ = self.rnn(torch.cat([image.unsqueeze(1), self.embed(tokens)], 1))
        return self.head(out[:, 1:])


def maxout(sums: Tensor, c: Tensor, attended: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A step of the LSTM whose candidate is the larger of two sums, without a tanh (Rennie et al. 2017, "Self-critical
    Sequence Training", section 3).

    Args:
        sums: (B, 5 H): three gates (in, forget, out), then the two candidates.
        c: (B, H).
        attended: (B, 2 H) that enters the candidates alone.

    Returns:
        h and c.
    """
    size = c.shape[1]
    gates = torch.sigmoid(sums[:, : 3 * size])
    candidates = sums[:, 3 * size :]
    if attended is not None:
        candidates = candidates + attended
    candidate = torch.maximum(candidates[:, :size], candidates[:, size:])
    c = gates[:, size : 2 * size] * c + gates[:, :size] * candidate
    return gates[:, 2 * size :] * torch.tanh(c), c


class Maxout(nn.Module):
    """The maxout LSTM over a sequence (B, T, E): as `nn.LSTM` with batch first."""

    def __init__(self, i2h: nn.Linear, h2h: nn.Linear) -> None:
        super().__init__()
        self.i2h, self.h2h = i2h, h2h

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        inputs = self.i2h(x)
        h = c = x.new_zeros(len(x), self.h2h.in_features)
        outs = []
        for t in range(x.shape[1]):
            h, c = maxout(inputs[:, t] + self.h2h(h), c)
            outs.append(h)
        return torch.stack(outs, 1), (h, c)


class Attending(nn.Module):
    """What decoders that attend to a grid share; `grid` is the side that the feature map is pooled to, or None.

    A pooled cell may be larger or smaller than one of the feature map's (14 x 14 out of 8 x 8 overlap).
    """

    cnn: nn.Module
    head: nn.Module
    grid: int | None

    def cells(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> (B, N, F)."""
        pooled = features if self.grid is None else F.adaptive_avg_pool2d(features, self.grid)
        return pooled.flatten(2).transpose(1, 2)

    def unroll(self, features: Tensor, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs (B, H) and weights (B, N), one each for every token."""
        raise TypeError(f"{type(self).__name__} has no steps")

    def decode(self, features: Tensor, tokens: Tensor) -> Tensor:
        outs, _ = self.unroll(features, tokens)
        return self.head(torch.stack(outs, 1))

    def encode(self, pixels: Tensor) -> Tensor:
        return self.cnn(pixels)

    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, h, w): the weights, each spread evenly over the cells of the feature map that it reads."""
        _, weights = self.unroll(features, tokens)
        height, width = features.shape[2:]
        each = torch.eye(height * width, device=features.device, dtype=features.dtype).view(-1, 1, height, width)
        return (torch.stack(weights, 1) @ self.cells(each)[..., 0].T).unflatten(2, (height, width))


class SoftAttention(Attending):
    """Xu et al. 2015, "Show, Attend and Tell", as sgrvinod's tutorial writes it."""

    def __init__(
        self,
        cnn: nn.Module,
        grid: int,
        *,
        embedding: nn.Module,
        encoder_att: nn.Module,
        decoder_att: nn.Module,
        full_att: nn.Module,
        init_h: nn.Module,
        init_c: nn.Module,
        f_beta: nn.Module,
        decode_step: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.cnn, self.grid = cnn, grid
        self.embedding, self.decode_step, self.head = embedding, decode_step, head
        self.encoder_att, self.decoder_att, self.full_att = encoder_att, decoder_att, full_att
        self.init_h, self.init_c, self.f_beta = init_h, init_c, f_beta

    def unroll(self, features: Tensor, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        cells = self.cells(features)
        mean = cells.mean(1)
        h, c = self.init_h(mean), self.init_c(mean)
        keys, words = self.encoder_att(cells), self.embedding(tokens)
        outs, weights = [], []
        for t in range(tokens.shape[1]):
            energy = self.full_att(torch.relu(keys + self.decoder_att(h).unsqueeze(1))).squeeze(2)
            weight = torch.softmax(energy, 1)
            context = torch.sigmoid(self.f_beta(h)) * torch.bmm(weight.unsqueeze(1), cells).squeeze(1)
            h, c = self.decode_step(torch.cat([words[:, t], context], 1), (h, c))
            outs.append(h)
            weights.append(weight)
        return outs, weights


class GridAttention(Attending):
    """What ImageCaptioning.pytorch's attention models share (its ``AttModel``)."""

    def __init__(
        self,
        cnn: nn.Module,
        grid: int | None,
        *,
        embed: nn.Module,
        att_embed: nn.Module,
        ctx2att: nn.Module,
        h2att: nn.Module,
        alpha_net: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.cnn, self.grid = cnn, grid
        self.embed, self.att_embed, self.ctx2att = embed, att_embed, ctx2att
        self.h2att, self.alpha_net, self.head = h2att, alpha_net, head

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Values and keys of the cells."""
        cells = self.cells(features)
        values = self.att_embed(cells.flatten(0, 1)).unflatten(0, cells.shape[:2])  # a norm in it wants two dimensions
        return values, self.ctx2att(values)

    def attend(self, h: Tensor, values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """What state `h` (B, H) finds, and the weights (B, N)."""
        energy = self.alpha_net(torch.tanh(keys + self.h2att(h).unsqueeze(1))).squeeze(2)
        weight = torch.softmax(energy, 1)
        return torch.bmm(weight.unsqueeze(1), values).squeeze(1), weight


class Att2in(GridAttention):
    """What is attended enters the maxout LSTM's candidates alone."""

    def __init__(
        self, cnn: nn.Module, grid: int | None, *, i2h: nn.Linear, h2h: nn.Linear, a2c: nn.Linear, **shared: nn.Module
    ) -> None:
        super().__init__(cnn, grid, **shared)
        self.i2h, self.h2h, self.a2c = i2h, h2h, a2c

    def unroll(self, features: Tensor, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        values, keys = self.project(features)
        inputs = self.i2h(self.embed(tokens))
        h = c = features.new_zeros(len(features), self.h2h.in_features)
        outs, weights = [], []
        for t in range(tokens.shape[1]):
            found, weight = self.attend(h, values, keys)
            h, c = maxout(inputs[:, t] + self.h2h(h), c, self.a2c(found))
            outs.append(h)
            weights.append(weight)
        return outs, weights


class UpDown(GridAttention):
    """Two LSTMs: one attends, one speaks (Anderson et al. 2018, "Bottom-Up and Top-Down Attention")."""

    def __init__(
        self,
        cnn: nn.Module,
        grid: int | None,
        *,
        fc_embed: nn.Module,
        att_lstm: nn.LSTMCell,
        lang_lstm: nn.LSTMCell,
        **shared: nn.Module,
    ) -> None:
        super().__init__(cnn, grid, **shared)
        self.fc_embed, self.att_lstm, self.lang_lstm = fc_embed, att_lstm, lang_lstm

    def unroll(self, features: Tensor, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        values, keys = self.project(features)
        mean, words = self.fc_embed(features.mean((2, 3))), self.embed(tokens)
        h1 = c1 = features.new_zeros(len(features), self.att_lstm.hidden_size)
        h2 = c2 = features.new_zeros(len(features), self.lang_lstm.hidden_size)
        outs, weights = [], []
        for t in range(tokens.shape[1]):
            h1, c1 = self.att_lstm(torch.cat([h2, mean, words[:, t]], 1), (h1, c1))
            found, weight = self.attend(h1, values, keys)
            h2, c2 = self.lang_lstm(torch.cat([found, h1], 1), (h2, c2))
            outs.append(h2)
            weights.append(weight)
        return outs, weights
