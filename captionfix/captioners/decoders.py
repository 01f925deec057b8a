"""The decoders of the project's captioners: the LSTMs that turn a feature map into words.

Both are made of plain operations (linear, LSTM, sigmoid, tanh, softmax, products and sums), which an engine that
records operations can follow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .models import CaptionerConfig, ShowAttendTellConfig, ShowTellConfig

State = tuple[Tensor, ...]

TINY = torch.finfo(torch.float32).tiny
"""Least number that is divided by, and least share that a logarithm is taken of."""

ROWS = 8
"""Choices of cells whose attention is scored at once on a CPU: so few stay in its cache."""

CONTRASTED = 2
"""Captions for each image of a batch whose words are contrasted between patches: each costs as much as three."""

OWN, OTHER = 0.7, 0.1
"""A patch is a word's own if at least so much of it lies in the word's region, another's if at most so much does."""

WAY = (0.2, 1.0)
"""Least and most part of the way from a map's mean to what a patch holds."""


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


def misplaced(shares: Tensor, regions: Tensor) -> Tensor:
    """Mean of -log of the share that lies in a word's region, over the words that have one; 0 where none has.

    Args:
        shares: (R, N), each row summing to 1.
        regions: (R, N) in 0..1.
    """
    inside = (shares.float() * regions).sum(1)[regions.any(1)]
    return -inside.clamp_min(TINY).log().sum() / max(len(inside), 1)


def draw_patches(regions: Tensor, grid: tuple[int, int] | torch.Size) -> Tensor:
    """(R, 3, N): patches of a map of the grid's height and width, for each of R captions whose words have regions
    (R, T, N): of a word chosen at random, of another one that shares at most a tenth with it if there is one, and any
    rectangle; each of them thinned at random.

    Every caption needs a word with a region.
    """

    def one_of(words: Tensor) -> Tensor:
        return regions[every, torch.multinomial(words.float(), 1)[:, 0]]

    def span(side: int) -> Tensor:
        length = torch.randint(1, max(1, side // 2) + 1, (len(regions), 1), device=regions.device)
        first = (torch.rand(len(regions), 1, device=regions.device) * (side - length + 1)).long()
        place = torch.arange(side, device=regions.device)
        return (place >= first) & (place < first + length)

    every, size = torch.arange(len(regions), device=regions.device), regions.sum(2)
    known = size > 0
    first = one_of(known)
    shared = torch.minimum(regions, first[:, None]).sum(2)
    apart = known & (shared <= OTHER * torch.minimum(size, first.sum(1, keepdim=True)))
    second = one_of(torch.where(apart.any(1, keepdim=True), apart, known))
    height, width = grid
    rectangle = (span(height)[:, :, None] & span(width)[:, None, :]).flatten(1).to(regions.dtype)
    whole = torch.stack([first, second, rectangle], 1)
    thinned = whole * (torch.rand_like(whole) < torch.empty_like(whole[..., :1]).uniform_(0.3, 1))
    return torch.where(thinned.any(2, keepdim=True), thinned, whole)


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
        return self.words(self.drop(self._hidden(self.drop(self._inputs(self.pool(features), tokens)))))

    def without(self, features: Tensor, gone: Tensor, filling: Tensor, tokens: Tensor) -> Tensor:
        """As `Captioner.decode_without`. What is gone is put right in the pooled map, which is a sum over cells."""
        cells = (filling - features)[0].flatten(1).T  # (N, F)
        parts = gone.flatten(1).unsqueeze(1) * self._pooling(features)  # (B, p p, N)
        pooled = self.pool(features) + (parts @ cells).transpose(1, 2).unflatten(2, (self.pool.output_size,) * 2)
        inputs = self._inputs(pooled, tokens.expand(len(gone), -1))
        return self.words(self.drop(self._hidden(self.drop(inputs))))

    def _pooling(self, features: Tensor) -> Tensor:
        """(p p, N): what each of the N cells of a map weighs in each of the pooled ones."""
        height, width = features.shape[2:]
        each = torch.eye(height * width, dtype=features.dtype, device=features.device).view(-1, 1, height, width)
        return self.pool(each).flatten(1).T

    def _inputs(self, pooled: Tensor, tokens: Tensor) -> Tensor:
        """(B, F, p, p) pooled maps and (B, T) tokens -> (B, 1 + T, E): what the LSTM reads."""
        return torch.cat([self.image(pooled.flatten(1)).unsqueeze(1), self.embedding(tokens)], 1)

    def _hidden(self, inputs: Tensor) -> Tensor:
        """(B, 1 + T, E) -> (B, T, D): the states that words are predicted from."""
        return self.lstm(inputs)[0][:, 1:]

    def packed(
        self, features: Tensor, labels: Tensor, lengths: list[int], owner: Tensor, regions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `ShowAttendTellDecoder.packed`, but what is asked of words with regions is another thing, since nothing
        says where they look: to be likelier when the image is more of a patch in their region than when it is more of
        one outside. It is the mean of -log of p(word | the former) / (p(word | the former) + sum of p(word | the
        latter)), three patches for each of some captions of the batch (see `draw_patches`)."""
        outputs = self.drop(self._hidden(self.drop(self._inputs(self.pool(features)[owner], labels[:, :-1]))))
        logits = self.words(in_order(outputs, lengths))
        return logits, None if regions is None else self._confused(features, labels, owner, regions)

    def _confused(self, features: Tensor, labels: Tensor, owner: Tensor, regions: Tensor) -> Tensor:
        rows = regions.flatten(1).any(1).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), device=rows.device)[: CONTRASTED * len(features)]]
        labels, regions = labels[rows], regions[rows]
        patches = draw_patches(regions, features.shape[2:])
        held = torch.bmm(regions[:, 1:], (patches / patches.sum(2, True)).transpose(1, 2))  # (R, T - 1, K)
        known = regions[:, 1:].any(2, keepdim=True)
        own, other = known & (held >= OWN), known & (held <= OTHER)
        asked = own.any(2) & other.any(2)
        if not asked.any():
            return features.new_zeros(())
        maps = self._more_of(patches, features, owner[rows])  # (R, K, F, p, p)
        count = maps.shape[1]
        inputs = self._inputs(maps.flatten(0, 1), labels[:, :-1].repeat_interleave(count, 0))
        hidden = self._hidden(self._drop_alike(inputs, count))
        hidden = self._drop_alike(hidden, count).unflatten(0, (-1, count)).transpose(1, 2)[asked]  # (M, K, D)
        scores = self.words(hidden).float().log_softmax(2)
        score = scores.gather(2, labels[:, 1:][asked][:, None, None].expand(-1, count, 1))[..., 0]
        against = score.masked_fill(~other[asked], -math.inf).logsumexp(1, keepdim=True)
        return F.softplus(against - score)[own[asked]].mean()

    def _drop_alike(self, table: Tensor, count: int) -> Tensor:
        """Dropout that is the same for each `count` rows, so that it does not tell them apart."""
        return table * self.drop(torch.ones_like(table[::count])).repeat_interleave(count, 0)

    def _more_of(self, patches: Tensor, features: Tensor, owner: Tensor) -> Tensor:
        """Pooled maps (R, K, F, p, p) that are more of a patch (R, K, N) than the image's own: from the map's mean, by
        a random part of the way, towards what the patch holds. Row i is of the image `features[owner[i]]`."""
        mean = features.mean((2, 3))
        cells = (features.flatten(2) - mean[..., None]).transpose(1, 2)[owner]  # (R, N, F)
        parts = patches.to(cells.dtype).unsqueeze(2) * self._pooling(features)  # (R, K, p p, N)
        way = torch.empty_like(parts[:, :, :1, :1]).uniform_(*WAY)
        parts = way * parts / parts.sum(3, True).amax(2, keepdim=True)
        moved = torch.bmm(parts.flatten(1, 2), cells).view(*parts.shape[:3], -1).transpose(2, 3)
        return (mean[owner][:, None, :, None] + moved).unflatten(3, (self.pool.output_size,) * 2)


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
        context = torch.sigmoid(self.gate(h)) * torch.bmm(weights.unsqueeze(1), values).squeeze(1)
        h, c = self.cell(torch.cat([word, context], 1), (h, c))
        return self._output(h, context), weights, (h, c, values, keys)

    def _output(self, h: Tensor, context: Tensor) -> Tensor:
        """(..., E), from which words are predicted."""
        return torch.tanh(self.output_h(self.drop(h)) + self.output_z(context))

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
        """As `Captioner.decode_without`. All choices share the cells' values and keys, in which what is gone is put
        right, and what the words add to the LSTM's gates; outputs come at once for all words."""
        values, keys = self.project(torch.cat([features, filling.expand_as(features)]))
        row, cell = torch.nonzero(gone.flatten(1), as_tuple=True)
        change = values[1, cell] - values[0, cell]
        mean = values[0].mean(0) + change.new_zeros(len(gone), change.shape[1]).index_add(
            0, row, change / keys.shape[1]
        )
        h, c = self._from(mean)
        words = self.drop(self.embedding(tokens[0]))
        from_word, from_rest = self.cell.weight_ih.split([words.shape[1], values.shape[2]], 1)
        by_word = F.linear(words, from_word, self.cell.bias_ih + self.cell.bias_hh)
        weight = torch.cat([from_rest, self.cell.weight_hh], 1)
        few = ROWS if features.device.type == "cpu" else len(gone)
        states, contexts = [], []
        for word in by_word:
            query = self.query(h)
            energy = torch.cat([self.score((keys[:1] + part[:, None]).tanh_()) for part in query.split(few)])[..., 0]
            energy[row, cell] = self.score(torch.tanh(keys[1, cell] + query[row]))[:, 0]
            weights = torch.softmax(energy, 1)
            context = (weights @ values[0]).index_add(0, row, weights[row, cell, None] * change)
            context = torch.sigmoid(self.gate(h)) * context
            enter, keep, new, show = F.linear(torch.cat([context, h], 1), weight, word).chunk(4, 1)  # as nn.LSTMCell
            c = torch.sigmoid(keep) * c + torch.sigmoid(enter) * torch.tanh(new)
            h = torch.sigmoid(show) * torch.tanh(c)
            states.append(h)
            contexts.append(context)
        return self.words(self.drop(self._output(torch.stack(states, 1), torch.stack(contexts, 1))))

    def attention(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, T, h, w): the weights with which the word after `tokens[:, t]` is predicted."""
        _, weights = self.unroll(self.begin(features), tokens)
        return torch.stack(weights, 1).unflatten(2, features.shape[2:])

    def packed(
        self, features: Tensor, labels: Tensor, lengths: list[int], owner: Tensor, regions: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """What training needs of whole captions.

        Args:
            features: (B, F, h, w).
            labels: (R, T): captions from start to end.
            lengths: the words of each that are predicted, longest first; a caption that has ended costs nothing more.
            owner: (R,): row i is a caption of the image `features[owner[i]]`.
            regions: (R, T, N): how much of each cell belongs to a word, or None.

        Returns:
            Logits (sum of lengths, V) in the order of `in_order`; with `regions` also, over all words that have one,
            the mean of -log of the share of what they look at (here: attention) that lies in it.
        """
        state = self.reorder(self.begin(features), owner)  # several captions an image: the map is projected once
        outs, weights = self.unroll(state, labels[:, :-1], lengths)
        logits = self.words(self.drop(torch.cat(outs)))
        return logits, None if regions is None else misplaced(torch.cat(weights), in_order(regions[:, 1:], lengths))

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
