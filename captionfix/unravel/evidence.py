"""The sparse table of evidence: (word, neuron, direction) -> mass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import kernels
from .policy import largest


@dataclass(frozen=True, eq=False)
class Evidence:
    """Rows of (word, element, direction, mass), all one-dimensional tensors of the same length.

    Attributes:
        word: int64, which explained word the row belongs to.
        element: int64, a row-major element number of a tensor, or a cell of a storage.
        direction: +1 or -1 (floating): whether the word wants the element higher or lower.
        mass: >= 0. A word starts with 1 in all.
        distinct: whether it is known that no two rows have the same word, element and direction, and that rows are
            sorted by word.
        most: a number of rows that no word exceeds, where one is known.
    """

    word: Tensor
    element: Tensor
    direction: Tensor
    mass: Tensor
    distinct: bool = False
    most: int | None = None

    def __len__(self) -> int:
        return len(self.word)

    def where(self, keep: Tensor) -> Evidence:
        """The rows that a boolean mask or an index keeps."""
        mask = keep.dtype == torch.bool
        return Evidence(
            self.word[keep],
            self.element[keep],
            self.direction[keep],
            self.mass[keep],
            self.distinct and mask,
            self.most if mask else None,
        )

    def at(self, element: Tensor) -> Evidence:
        """The same rows at other elements."""
        return Evidence(self.word, element, self.direction, self.mass, self.distinct, self.most)

    def within(self, budget: int | None) -> bool:
        """Whether no word has more than ``budget`` rows."""
        if budget is None or len(self) <= budget or (self.most is not None and self.most <= budget):
            return True
        return int(torch.bincount(self.word).max()) <= budget

    def neurons(self) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct (element, direction) over all words, and which of them each row is."""
        if kernels.usable(self.mass):
            return kernels.distinct(self.element, self.direction)
        key, which = torch.unique(self.element * 2 + (self.direction > 0), return_inverse=True)
        direction = (key.remainder(2) * 2 - 1).to(self.direction.dtype)
        return key.div(2, rounding_mode="floor"), direction, which

    def per_word(self, words: int) -> Tensor:
        """Mass of each word, (words,)."""
        return self.mass.new_zeros(words).index_add_(0, self.word, self.mass)

    def dense(self, words: int, elements: int) -> Tensor:
        """Mass as (words, elements), directions summed."""
        table = self.mass.new_zeros(words * elements)
        return table.index_add_(0, self.word * elements + self.element, self.mass).view(words, elements)

    def merged(self) -> Evidence:
        """One row for each (word, element, direction), sorted; rows without mass are dropped."""
        if len(self) == 0 or self.distinct:
            return self
        span = self.element.max() + 1
        key = (self.word * span + self.element) * 2 + (self.direction > 0)
        key, where = torch.unique(key, return_inverse=True)
        mass = self.mass.new_zeros(len(key)).index_add_(0, where, self.mass)
        both = key.div(2, rounding_mode="floor")
        direction = (key.remainder(2) * 2 - 1).to(self.direction.dtype)
        merged = Evidence(both.div(span, rounding_mode="floor"), both.remainder(span), direction, mass, True)
        return merged if bool((mass > 0).all()) else merged.where(mass > 0)

    def pruned(self, budget: int | None, words: int) -> Evidence:
        """At most ``budget`` rows a word, the heaviest, scaled so that each word keeps its mass. Rows must be sorted
        by word (as `merged` leaves them)."""
        if budget is None or len(self) <= budget:
            return self
        counts = torch.bincount(self.word, minlength=words)
        if int(counts.max()) <= budget:
            return self
        # one row of a matrix for each word, filled up with -1
        rank = torch.arange(len(self), device=self.mass.device) - (torch.cumsum(counts, 0) - counts)[self.word]
        table = self.mass.new_full((words, int(counts.max())), -1.0)
        table[self.word, rank] = self.mass
        value, column = table.topk(budget, 1)
        taken = torch.zeros_like(table, dtype=torch.bool).scatter_(1, column, value >= 0)
        kept = self.where(taken[self.word, rank])
        scale = self.per_word(words) / kept.per_word(words).clamp_min(torch.finfo(self.mass.dtype).tiny)
        mass = kept.mass * scale[kept.word]
        return Evidence(kept.word, kept.element, kept.direction, mass, self.distinct, budget)


def heaviest(table: Tensor, budget: int | None) -> Evidence:
    """Evidence that wants more of the ``budget`` heaviest elements of each word, scaled so that a word keeps its mass;
    None takes all.

    Args:
        table: (words, elements) mass.
    """
    if budget is None or budget >= table.shape[1]:
        word, element = torch.nonzero(table > 0, as_tuple=True)
        mass = table[word, element]
    else:
        mass, element = largest(table, budget)
        mass = mass * (table.sum(1, keepdim=True) / mass.sum(1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny))
        word, column = torch.nonzero(mass > 0, as_tuple=True)
        element, mass = element[word, column], mass[word, column]
    return Evidence(word, element, torch.ones_like(mass), mass, True)


def settle(parts: list[Evidence], words: int, budget: int | None = None) -> Evidence:
    """All rows of several tables, merged, and of each word the ``budget`` heaviest (see `Evidence.pruned`)."""
    rows = join(parts)
    if rows.distinct and rows.within(budget):
        return rows
    if kernels.usable(rows.mass):
        merged = kernels.merge(rows.word, rows.element, rows.direction, rows.mass, words, budget)
        return Evidence(*merged, True, budget)
    return rows.merged().pruned(budget, words)


def join(parts: list[Evidence]) -> Evidence:
    """All rows of several tables."""
    if len(parts) == 1:
        return parts[0]
    word, element, direction, mass = (
        torch.cat([getattr(p, name) for p in parts]) for name in ("word", "element", "direction", "mass")
    )
    return Evidence(word, element, direction, mass)
