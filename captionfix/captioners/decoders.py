"""The decoders of the project's captioners: the LSTMs that turn a feature map into words.

Both are made of plain operations (linear, LSTM, sigmoid, tanh, softmax, products and sums), which an engine that
records operations can follow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .models import CaptionerConfig, ShowAttendTellConfig, ShowTellConfig

State = tuple[Tensor, ...]

ROWS = 8
"""Choices of cells whose attention is scored at once on a CPU: so few stay in its cache."""


class Decoder(nn.Module):
    """What both decoders share: words in and words out."""

    def __init__(self, config: CaptionerConfig, output_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.word_size)
        self.drop = nn.Dropout(config.dropout)
        self.tied = config.tie_words
        if self.tied and output_size != config.word_size:
            raise ValueError(f"tie_words needs word_size {config.word_size} to equal the output's size {output_size}")
        if self.tied:
            self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        else:
            self.output = nn.Linear(output_size, config.vocab_size)

    def words(self, outputs: Tensor) -> Tensor:
        """(..., D) outputs -> (..., V) logits."""
        return F.linear(outputs, self.embedding.weight, self.output_bias) if self.tied else self.output(outputs)


def in_order(table: Tensor, lengths: list[int]) -> Tensor:
    """(B, T, ...) -> (sum of lengths, ...): the first `lengths[i]` entries of row i (longest first), those of all first
    words before those of the second ones."""
    return torch.cat([table[: sum(n > t for n in lengths), t] for t in range(max(lengths))])


class ShowTellDecoder(Decoder):
    """The pooled feature map is the LSTM's first input; that step's output is not used."""

    def __init__(self, config: ShowTellConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.pool = nn.AdaptiveAvgPool2d(config.pool)
        self.image = nn.Linear(config.feature_size * config.pool**2, config.word_size)
        self.lstm = nn.LSTM(config.word_size, config.hidden_size, batch_first=True)

    def begin(self, features: Tensor) -> State:
        image = self.image(self.pool(features).flatten(1))
        _, (h, c) = self.lstm(image.unsqueeze(1))
        return h, c

    def step(self, state: State, token: Tensor) -> tuple[Tensor, State]:
        out, (h, c) = self.lstm(self.embedding(token).unsqueeze(1), (state[0], state[1]))
        return self.words(out[:, 0]), (h, c)

    @staticmethod
    def reorder(state: State, index: Tensor) -> State:
        return tuple(part.index_select(1, index) for part in state)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        return self._logits(self.image(self.pool(features).flatten(1)), tokens)

    def _logits(self, image: Tensor, tokens: Tensor) -> Tensor:
        words = self.drop(self.embedding(tokens))
        out, _ = self.lstm(torch.cat([self.drop(image).unsqueeze(1), words], 1))
        return self.words(self.drop(out[:, 1:]))

    def packed(self, features: Tensor, tokens: Tensor, lengths: list[int], owner: Tensor) -> tuple[Tensor, None]:
        """As `ShowAttendTellDecoder.packed`, without attention."""
        return in_order(self._logits(self.image(self.pool(features).flatten(1))[owner], tokens), lengths), None


class ShowAttendTellDecoder(Decoder):
    """Additive attention over the map's cells with the state before the word; a gate; a deep output."""

    def __init__(self, config: ShowAttendTellConfig) -> None:
        super().__init__(config, config.word_size)
        self.value = nn.Linear(config.feature_size, config.value_size)
        if config.positions is not None:
            height, width = config.positions
            self.position: nn.Parameter | None = nn.Parameter(torch.zeros(height * width, config.value_size))
        else:
            self.position = None
        self.key = nn.Linear(config.value_size, config.attention_size)
        self.query = nn.Linear(config.hidden_size, config.attention_size, bias=False)
        self.score = nn.Linear(config.attention_size, 1, bias=False)
        self.gate = nn.Linear(config.hidden_size, config.value_size)
        self.begin_h = nn.Linear(config.value_size, config.hidden_size)
        self.begin_c = nn.Linear(config.value_size, config.hidden_size)
        self.cell = nn.LSTMCell(config.word_size + config.value_size, config.hidden_size)
        self.output_h = nn.Linear(config.hidden_size, config.word_size)
        self.output_z = nn.Linear(config.value_size, config.word_size, bias=False)

    def begin(self, features: Tensor) -> State:
        """(B, F, h, w) features -> h, c, values (B, N, D) and keys (B, N, A) of the N = h w cells."""
        values, keys = self.project(features)
        return *self._from(values.mean(1)), values, keys

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F, h, w) features -> values (B, N, D) and keys (B, N, A), each cell by itself."""
        cells = self.value(features.flatten(2).transpose(1, 2))
        if self.position is not None:
            cells = cells + self.position
        values = torch.relu(cells)
        return values, self.key(values)

    def _from(self, mean: Tensor) -> tuple[Tensor, Tensor]:
        """h and c before the first word, from the mean of the values (B, D)."""
        return torch.tanh(self.begin_h(mean)), torch.tanh(self.begin_c(mean))

    def advance(self, state: State, word: Tensor) -> tuple[Tensor, Tensor, State]:
        """One word further: embedded words (B, E) -> output (B, E), attention (B, N), state."""
        h, c, values, keys = state
        energy = self.score(torch.tanh(keys + self.query(h).unsqueeze(1))).squeeze(2)
        weights = torch.softmax(energy, 1)
        out, h, c = self._further(h, c, word, torch.bmm(weights.unsqueeze(1), values).squeeze(1))
        return out, weights, (h, c, values, keys)

    def _further(self, h: Tensor, c: Tensor, word: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output and state after a word, from what was attended (B, D)."""
        context = torch.sigmoid(self.gate(h)) * context
        h, c = self.cell(torch.cat([word, context], 1), (h, c))
        return torch.tanh(self.output_h(self.drop(h)) + self.output_z(context)), h, c

    def step(self, state: State, token: Tensor) -> tuple[Tensor, State]:
        out, _, state = self.advance(state, self.embedding(token))
        return self.words(out), state

    @staticmethod
    def reorder(state: State, index: Tensor) -> State:
        return tuple(part.index_select(0, index) for part in state)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        outs, _ = self.unroll(self.begin(features), tokens)
        return self.words(self.drop(torch.stack(outs, 1)))

    def without(self, features: Tensor, gone: Tensor, filling: Tensor, tokens: Tensor) -> Tensor:
        """As `Captioner.decode_without`. All choices share the cells' values and keys; what is gone is put right."""
        values, keys = self.project(torch.cat([features, filling.expand_as(features)]))
        row, cell = torch.nonzero(gone.flatten(1), as_tuple=True)
        change = values[1, cell] - values[0, cell]
        mean = values[0].mean(0) + change.new_zeros(len(gone), change.shape[1]).index_add(
            0, row, change / keys.shape[1]
        )
        h, c = self._from(mean)
        few = ROWS if features.device.type == "cpu" else len(gone)
        outs = []
        for word in self.drop(self.embedding(tokens[0])):
            query = self.query(h)
            energy = torch.cat([self.score((keys[:1] + part[:, None]).tanh_()) for part in query.split(few)])[..., 0]
            energy[row, cell] = self.score(torch.tanh(keys[1, cell] + query[row]))[:, 0]
            weights = torch.softmax(energy, 1)
            context = (weights @ values[0]).index_add(0, row, weights[row, cell, None] * change)
            out, h, c = self._further(h, c, word.expand(len(gone), -1), context)
            outs.append(out)
        return self.words(self.drop(torch.stack(outs, 1)))

    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, h, w): the weights with which the word after `tokens[:, t]` is predicted."""
        _, weights = self.unroll(self.begin(features), tokens)
        return torch.stack(weights, 1).unflatten(2, features.shape[2:])

    def packed(self, features: Tensor, tokens: Tensor, lengths: list[int], owner: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (sum of lengths, V) and attention (sum of lengths, N) of the first `lengths[i]` words of row i, in the
        order of `in_order`.

        Row i is a caption of the image `features[owner[i]]`; a caption that has ended costs nothing any more.
        """
        state = self.reorder(self.begin(features), owner)  # several captions an image: the map is projected once
        outs, weights = self.unroll(state, tokens, lengths)
        return self.words(self.drop(torch.cat(outs))), torch.cat(weights)

    def unroll(
        self, state: State, tokens: Tensor, lengths: list[int] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and attention weights, word by word, from the state before the first; `lengths` as of `packed`."""
        words = self.drop(self.embedding(tokens))
        outs, weights = [], []
        for t in range(tokens.shape[1] if lengths is None else max(lengths)):
            word = words[:, t]
            if lengths is not None:
                active = sum(n > t for n in lengths)
                word = word[:active]
                if active < len(state[0]):  # a slice of everything would cost a copy in the backward pass
                    state = tuple(part[:active] for part in state)
            out, weight, state = self.advance(state, word)
            outs.append(out)
            weights.append(weight)
        return outs, weights
