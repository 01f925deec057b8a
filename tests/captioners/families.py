"""The ways in which captioners let an image into their decoder, one small model each, written as people write them:
none knows of captionfix.

Every class takes (vocabulary size) and holds its own CNN; `FAMILIES` says how each is wrapped and what is to be found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "ball", "dog", "runs", "on", "grass"]
SIZE = 32  # pixels a side
CELLS = 4  # of the feature map a side
C, E, H = 12, 10, 16  # channels of the feature map, size of word vectors, units


class SmallCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 10, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(10, C, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, images):
        return self.body(images)


class Pooled(nn.Module):
    """Encoder that ends in a vector."""

    def __init__(self, size):
        super().__init__()
        self.cnn = SmallCNN()
        self.embed = nn.Linear(C, size)

    def forward(self, images):
        return self.embed(self.cnn(images).mean(3).mean(2))


class FirstTokenKept(nn.Module):
    """The image is the first token; its step predicts the start word. Sequence first, as nn.LSTM's default is."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoderCNN = Pooled(E)
        self.embed = nn.Embedding(vocab_size, E)
        self.lstm = nn.LSTM(E, H)
        self.linear = nn.Linear(H, vocab_size)
        self.dropout = nn.Dropout(0.5)

    def forward(self, images, captions):
        features = self.encoderCNN(images)
        embeddings = self.dropout(self.embed(captions))
        embeddings = torch.cat((features.unsqueeze(0), embeddings), dim=0)
        hiddens, _ = self.lstm(embeddings)
        return self.linear(hiddens)


class FirstTokenDiscarded(nn.Module):
    """The image is fed before the start word and what comes out of that step is thrown away; log-probabilities."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = Pooled(E)
        self.embed = nn.Embedding(vocab_size, E)
        self.core = nn.LSTMCell(E, H)
        self.logit = nn.Linear(H, vocab_size)

    def forward(self, images, seq):
        fc = self.encoder(images)
        outputs = []
        state = None
        for i in range(seq.size(1) + 1):
            xt = fc if i == 0 else self.embed(seq[:, i - 1])
            state = self.core(xt, state)
            if i > 0:
                outputs.append(F.log_softmax(self.logit(state[0]), dim=1))
        return torch.stack(outputs, 1)


class InitialState(nn.Module):
    """The image is the LSTM's first state; two layers with dropout between them."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = SmallCNN()
        self.init_h, self.init_c = nn.Linear(C, 2 * H), nn.Linear(C, 2 * H)
        self.embed = nn.Embedding(vocab_size, E, padding_idx=0)
        self.lstm = nn.LSTM(E, H, num_layers=2, batch_first=True, dropout=0.3)
        self.fc = nn.Linear(H, vocab_size)

    def forward(self, images, captions):
        pooled = F.adaptive_avg_pool2d(self.encoder(images), 1).squeeze()
        h = torch.tanh(self.init_h(pooled)).view(-1, 2, H).transpose(0, 1).contiguous()
        c = torch.tanh(self.init_c(pooled)).view(-1, 2, H).transpose(0, 1).contiguous()
        out, _ = self.lstm(self.embed(captions), (h, c))
        return self.fc(out)


class EveryStep(nn.Module):
    """The image's vector is concatenated to every word; a list of steps comes out."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = Pooled(E)
        self.embed = nn.Embedding(vocab_size, E)
        self.cell = nn.LSTMCell(2 * E, H)
        self.out = nn.Linear(H, vocab_size)

    def forward(self, images, captions):
        v = torch.relu(self.encoder(images))
        h = c = torch.zeros(len(images), H, device=images.device)
        outputs = []
        for t in range(captions.size(1)):
            h, c = self.cell(torch.cat([self.embed(captions[:, t]), v], 1), (h, c))
            outputs.append(self.out(h))
        return outputs


class TiedGRU(nn.Module):
    """A GRU whose state begins with the image, and whose output layer is the embedding; gated dot-product attention."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = SmallCNN()
        self.project = nn.Linear(C, H)
        self.embed = nn.Embedding(vocab_size, E)
        self.gru = nn.GRUCell(E + H, H)
        self.gate = nn.Linear(H, H)
        self.to_word = nn.Linear(H, E)
        self.out = nn.Linear(E, vocab_size)
        self.out.weight = self.embed.weight

    def forward(self, images, captions):
        regions = self.project(self.encoder(images).flatten(2).transpose(1, 2))
        h = torch.tanh(regions.mean(1))
        logits = torch.zeros(len(images), captions.size(1), self.out.out_features)
        for t in range(captions.size(1)):
            weights = F.softmax(torch.bmm(regions, h.unsqueeze(2)).squeeze(2) / H**0.5, dim=1)
            context = torch.bmm(weights.unsqueeze(1), regions).squeeze(1)
            context = torch.sigmoid(self.gate(h)) * context
            h = self.gru(torch.cat([self.embed(captions[:, t]), context], 1), h)
            logits[:, t] = self.out(self.to_word(h))
        return logits


class AdditiveAttention(nn.Module):
    """Soft attention with tanh; the image reaches a word through it alone. Probabilities come out, in a dictionary."""

    def __init__(self, vocab_size):
        super().__init__()
        self.cnn = SmallCNN()
        self.W, self.U, self.v = nn.Linear(C, 8), nn.Linear(H, 8), nn.Linear(8, 1)
        self.embedding = nn.Embedding(vocab_size, E)
        self.lstm = nn.LSTMCell(E + C, H)
        self.fc = nn.Linear(H, vocab_size)

    def forward(self, captions, img):
        a = self.cnn(img).permute(0, 2, 3, 1).reshape(len(img), -1, C)
        h, c = torch.zeros(len(img), H), torch.zeros(len(img), H)
        probabilities, alphas = [], []
        for t in range(captions.shape[1]):
            alpha = F.softmax(self.v(torch.tanh(self.W(a) + self.U(h)[:, None])), dim=1)
            h, c = self.lstm(torch.cat([self.embedding(captions[:, t]), (alpha * a).sum(1)], -1), (h, c))
            probabilities.append(F.softmax(self.fc(h), dim=-1))
            alphas.append(alpha[..., 0])
        return {"scores": torch.stack(probabilities, 1), "alphas": torch.stack(alphas, 1)}


class MultiHead(nn.Module):
    """The LSTM's output asks the regions through nn.MultiheadAttention; residual, layer norm, gated linear unit."""

    def __init__(self, vocab_size):
        super().__init__()
        self.backbone = SmallCNN()
        self.to_model = nn.Conv2d(C, H, 1)
        self.embed = nn.Embedding(vocab_size, H)
        self.lstm = nn.LSTM(H, H, batch_first=True)
        self.attention = nn.MultiheadAttention(H, 4, batch_first=True)
        self.aoa = nn.Linear(2 * H, 2 * H)
        self.norm = nn.LayerNorm(H)
        self.head = nn.Linear(H, vocab_size)

    def forward(self, images, captions):
        memory = self.to_model(self.backbone(images)).flatten(2).permute(0, 2, 1)
        out, _ = self.lstm(self.embed(captions))
        attended, weights = self.attention(out, memory, memory)
        attended = F.glu(self.aoa(torch.cat([attended, out], -1)), -1)
        return self.head(self.norm(out + attended)), weights


class Sentinel(nn.Module):
    """Adaptive attention: one more region, the visual sentinel, is what the LSTM's memory knows already. The image
    reaches a word through the regions alone."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = SmallCNN()
        self.embed = nn.Embedding(vocab_size, E)
        self.lstm = nn.LSTMCell(E, C)
        self.sentinel_x, self.sentinel_h = nn.Linear(E, C), nn.Linear(C, C)
        self.w_v, self.w_g, self.w_s = nn.Linear(C, 8, bias=False), nn.Linear(C, 8, bias=False), nn.Linear(C, 8)
        self.w_h = nn.Linear(8, 1, bias=False)
        self.preference = nn.Parameter(torch.zeros(1))  # of the sentinel
        self.mlp = nn.Linear(C, vocab_size)

    def forward(self, images, captions):
        V = self.encoder(images).flatten(2).transpose(1, 2)
        h = c = images.new_zeros(len(images), C)
        scores = []
        for t in range(captions.size(1)):
            x = self.embed(captions[:, t])
            gate = torch.sigmoid(self.sentinel_x(x) + self.sentinel_h(h))
            h, c = self.lstm(x, (h, c))
            s = gate * torch.tanh(c)
            z = self.w_h(torch.tanh(self.w_v(V) + self.w_g(h).unsqueeze(1))).squeeze(2)
            z_s = self.w_h(torch.tanh(self.w_s(s) + self.w_g(h))) + self.preference
            alpha = F.softmax(torch.cat([z, z_s], 1), dim=1)
            context = (alpha.unsqueeze(2) * torch.cat([V, s.unsqueeze(1)], 1)).sum(1)
            scores.append(self.mlp(context + h))
        return torch.stack(scores, dim=1)


class UpDown(nn.Module):
    """Top-down: an attention LSTM that reads the mean region and the language LSTM's output, and a language LSTM."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = SmallCNN()
        self.embed = nn.Sequential(nn.Embedding(vocab_size, E), nn.ReLU(), nn.Dropout(0.5))
        self.att_embed = nn.Sequential(nn.Linear(C, H), nn.ReLU(), nn.Dropout(0.5))
        self.ctx2att, self.h2att, self.alpha_net = nn.Linear(H, 8), nn.Linear(H, 8), nn.Linear(8, 1)
        self.att_lstm = nn.LSTMCell(E + 2 * H, H)
        self.lang_lstm = nn.LSTMCell(2 * H, H)
        self.logit = nn.Linear(H, vocab_size)

    def forward(self, images, seq):
        att = self.att_embed(self.encoder(images).flatten(2).transpose(1, 2))
        fc, p_att = att.mean(1), self.ctx2att(att)
        state = [torch.zeros(2, len(images), H), torch.zeros(2, len(images), H)]
        outputs = images.new_zeros(len(images), seq.size(1) - 1, self.logit.out_features)
        for i in range(seq.size(1) - 1):  # the last word is only predicted
            xt = self.embed(seq[:, i].clone())
            h_att, c_att = self.att_lstm(torch.cat([state[0][-1], fc, xt], 1), (state[0][0], state[1][0]))
            dot = torch.tanh(p_att + self.h2att(h_att).unsqueeze(1).expand_as(p_att))
            weight = F.softmax(self.alpha_net(dot.view(-1, 8)).view(len(images), -1), dim=1)
            res = torch.bmm(weight.unsqueeze(1), att).squeeze(1)
            h_lang, c_lang = self.lang_lstm(torch.cat([res, h_att], 1), (state[0][1], state[1][1]))
            state = [torch.stack([h_att, h_lang]), torch.stack([c_att, c_lang])]
            outputs[:, i] = F.log_softmax(self.logit(h_lang), dim=1)
        return outputs


class Att2in(nn.Module):
    """Attention enters the cell's candidate alone, by a maxout of two; gates see words only."""

    def __init__(self, vocab_size):
        super().__init__()
        self.cnn = SmallCNN()
        self.embed = nn.Embedding(vocab_size, E)
        self.a2c, self.i2h, self.h2h = nn.Linear(C, 2 * H), nn.Linear(E, 5 * H), nn.Linear(H, 5 * H)
        self.ctx2att, self.h2att, self.alpha_net = nn.Linear(C, 8), nn.Linear(H, 8), nn.Linear(8, 1)
        self.logit = nn.Linear(H, vocab_size)

    def core(self, xt, att, p_att, h, c):
        weight = F.softmax(self.alpha_net(torch.tanh(p_att + self.h2att(h).unsqueeze(1))).squeeze(-1), dim=1)
        res = torch.bmm(weight.unsqueeze(1), att).squeeze(1)
        all_input_sums = self.i2h(xt) + self.h2h(h)
        sigmoid_chunk = torch.sigmoid(all_input_sums.narrow(1, 0, 3 * H))
        in_gate = sigmoid_chunk.narrow(1, 0, H)
        forget_gate = sigmoid_chunk.narrow(1, H, H)
        out_gate = sigmoid_chunk.narrow(1, H * 2, H)
        in_transform = all_input_sums.narrow(1, 3 * H, 2 * H) + self.a2c(res)
        in_transform = torch.max(in_transform.narrow(1, 0, H), in_transform.narrow(1, H, H))
        next_c = forget_gate * c + in_gate * in_transform
        return out_gate * torch.tanh(next_c), next_c

    def forward(self, images, seq):
        att = self.cnn(images).permute(0, 2, 3, 1).contiguous().view(images.size(0), -1, C)
        p_att = self.ctx2att(att)
        h = c = att.new_zeros(att.size(0), H)
        outputs = []
        for i in range(seq.size(1)):
            h, c = self.core(self.embed(seq[:, i]), att, p_att, h, c)
            outputs.append(F.log_softmax(self.logit(h), dim=1))
        return torch.cat([_.unsqueeze(1) for _ in outputs], 1).contiguous()


class Hierarchical(nn.Module):
    """A sentence LSTM reads the image and gives each sentence a topic; a word LSTM reads the topic first, and what
    comes out there is thrown away. (images, (B, S, T) captions) -> (B, S, T, V)."""

    def __init__(self, vocab_size):
        super().__init__()
        self.extractor = SmallCNN()
        self.sentence = nn.LSTMCell(C, H)
        self.topic = nn.Linear(H, E)
        self.embed = nn.Embedding(vocab_size, E)
        self.word = nn.LSTM(E, H, batch_first=True)
        self.fc = nn.Linear(H, vocab_size)

    def forward(self, images, captions):
        visual = self.extractor(images).mean((2, 3))
        h = c = visual.new_zeros(len(visual), H)
        result = []
        for s in range(captions.size(1)):
            h, c = self.sentence(visual, (h, c))
            topic = torch.tanh(self.topic(h))
            words = torch.cat([topic.unsqueeze(1), self.embed(captions[:, s])], 1)
            hidden, _ = self.word(words)
            result.append(self.fc(hidden[:, 1:]))
        return torch.stack(result, 1)


class LateMerge(nn.Module):
    """The image is added to what the LSTM has made of the words, and never enters it."""

    def __init__(self, vocab_size):
        super().__init__()
        self.encoder = nn.Sequential(SmallCNN(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(C, H))
        self.embed = nn.Embedding(vocab_size, E)
        self.lstm = nn.LSTM(E, H, batch_first=True)
        self.dense = nn.Linear(H, H)
        self.out = nn.Linear(H, vocab_size)

    def forward(self, images, captions):
        words, _ = self.lstm(self.embed(captions))
        merged = self.encoder(images).unsqueeze(1) + words
        return self.out(F.relu(self.dense(merged)))


class OnlySteps(nn.Module):
    """Decodes in `sample` only; the image is the first input of a zero state."""

    def __init__(self, vocab_size):
        super().__init__()
        self.cnn = Pooled(E)
        self.embed = nn.Embedding(vocab_size, E)
        self.lstm = nn.LSTMCell(E, H)
        self.fc = nn.Linear(H, vocab_size)

    def sample(self, images, longest=20):
        h, c = self.lstm(self.cnn(images))
        word, words = torch.full((len(images),), WORDS.index("<start>")), []
        for _ in range(longest):
            h, c = self.lstm(self.embed(word), (h, c))
            word = self.fc(h).argmax(1)
            words.append(word)
        return torch.stack(words, 1)


@dataclass(frozen=True)
class Family:
    """A model, what `wrap` needs to be told of it, and what it must find.

    Attributes:
        model: makes one, from the size of the vocabulary.
        given: makes wrap's keyword arguments, from the model.
        feature_map: path of the module whose output is the feature map.
        first: step that predicts the first word.
        plain: (model, images, tokens) -> (B, T, V) in the author's own terms, up to a constant for each step.
    """

    model: Callable[[int], nn.Module]
    feature_map: str
    plain: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
    first: int = 0
    given: Callable[[Any], dict[str, Any]] = field(default=lambda model: {})


def _as_is(model, images, tokens):
    return model(images, tokens)


def _stepped(model, images, tokens):
    state, scores = model.lstm(model.cnn(images)), []
    for t in range(tokens.shape[1]):
        state = model.lstm(model.embed(tokens[:, t]), state)
        scores.append(model.fc(state[0]))
    return torch.stack(scores, 1)


def _steps_of(model):
    def step(state, token):
        h, c = model.lstm(model.embed(token), state)
        return model.fc(h), (h, c)

    return {"begin": lambda images: model.lstm(model.cnn(images)), "step": step}


FAMILIES = {
    "first token, output kept": Family(
        FirstTokenKept, "encoderCNN.cnn", lambda m, x, w: m(x, w.t()).transpose(0, 1)[:, 1:], 1
    ),
    "first token, output discarded": Family(FirstTokenDiscarded, "encoder.cnn", _as_is),
    "initial state, stacked LSTM": Family(InitialState, "encoder", _as_is),
    "every step": Family(EveryStep, "encoder.cnn", lambda m, x, w: torch.stack(m(x, w), 1)),
    "dot attention, tied GRU": Family(TiedGRU, "encoder", _as_is),
    "additive attention": Family(AdditiveAttention, "cnn", lambda m, x, w: m(w, x)["scores"].log()),
    "multi-head attention": Family(MultiHead, "to_model", lambda m, x, w: m(x, w)[0]),
    "visual sentinel": Family(Sentinel, "encoder", _as_is),
    "two LSTMs": Family(UpDown, "encoder", lambda m, x, w: m(x, torch.cat([w, w[:, :1]], 1))),
    "maxout cell": Family(Att2in, "cnn", _as_is),
    "hierarchical": Family(
        Hierarchical,
        "extractor",
        lambda m, x, w: m(x, torch.stack([w, w], 1))[:, 1],
        given=lambda m: {"logits": lambda images, tokens: m(images, torch.stack([tokens, tokens], 1))[:, 1]},
    ),
    "late merge": Family(LateMerge, "encoder.0", _as_is),
    "steps only": Family(OnlySteps, "cnn.cnn", _stepped, given=_steps_of),
}
