"""Which output belongs to which word, found by changing words and looking where the logits change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Scores = Callable[[Tensor, Tensor], Tensor]  # (B, ...) source and (B, T) tokens -> (B, T', V)
VARYING = (
    "two equal calls give different logits: it draws random numbers (dropout outside its modules, a random initial "
    "state, scheduled sampling) or keeps a state from call to call outside its modules"
)
NOT_FINITE = "its logits are not finite: weights that are damaged, or an input on another scale"
BLIND = "the logits do not depend on the image: check that what is called uses it"
MIXED = "a caption's logits change with {} of another caption in the batch (a softmax or norm over the batch)"


class Unfit(Exception):
    """This way of calling or reading a captioner does not hold what is asked of it; the text says what."""


class TooShort(Unfit):
    """The last words fed have no output."""


@dataclass(frozen=True)
class Seen:
    """What changed when something was changed.

    Attributes:
        steps: for each word fed, the first step whose output changes with it, or None.
        outputs: how many steps there are.
    """

    steps: tuple[int | None, ...]
    outputs: int

    def first(self) -> int:
        """The step that predicts the first word: the first whose output depends on the start but on no other word.

        Raises:
            Unfit: outputs do not depend on the words as a decoder's from left to right do.
        """
        offsets = [step - k for k, step in enumerate(self.steps) if step is not None]
        if not offsets:
            raise Unfit(
                "the logits do not depend on the words that are fed (it decodes by itself; say how it steps with "
                "begin= and step=, or give logits= that feeds the words)"
            )
        # What is fed first may be left out by a captioner whose image stands in its place.
        heads = offsets[1:] if self.steps[0] is None else offsets
        first = (heads or offsets)[-1]
        early = [k for k, step in enumerate(self.steps) if step is not None and step - k < first]
        if any(offset != first for offset in offsets) or first < 0:
            word = early[0] if early else next(k for k, s in enumerate(self.steps) if s is not None and s - k != first)
            raise Unfit(
                f"changing word {word} of those fed changes the outputs from step {self.steps[word]} on, "
                f"where step {word + first} would fit the others: it does not read from left to right, one step a word"
            )
        return first


@torch.no_grad()
def look(scores: Scores, source: Tensor, tokens: Tensor, other: int, another: int) -> Seen:
    """Changes one caption's words, one at a time, and its image.

    Args:
        scores: the decoder.
        source: what it decodes, for a batch of at least 2.
        tokens: (B, T) words fed.
        other: a word to put in place of others.
        another: a second, where the first is there already.

    Raises:
        Unfit: logits differ between two equal calls, are not finite, change with another caption of the batch, or do
            not change with the image.
    """
    plain, again = scores(source, tokens), scores(source, tokens)
    if not bool(torch.isfinite(plain).all()):
        raise Unfit(NOT_FINITE)
    scale = float(plain.abs().amax().clamp_min(1e-6))
    if plain.shape != again.shape or float((plain - again).abs().amax()) > 1e-4 * scale:
        raise Unfit(VARYING)
    tolerance = 1e-6 * scale + 10 * float((plain - again).abs().amax())

    def changed(new_source: Tensor, new_tokens: Tensor, what: str) -> Tensor:
        difference = (scores(new_source, new_tokens) - plain).abs().amax(-1)
        if float(difference[:1].amax()) > tolerance:
            raise Unfit(MIXED.format(what))
        return (difference[1] > tolerance).nonzero()[:, 0]

    steps: list[int | None] = []
    for k in range(tokens.shape[1]):
        turned = tokens.clone()
        turned[1, k] = other if int(tokens[1, k]) != other else another
        where = changed(source, turned, "a word")
        steps.append(int(where[0]) if len(where) else None)
    blank = source.clone()
    blank[1] = 0
    if not len(changed(blank, tokens, "the image")):
        raise Unfit(BLIND)
    return Seen(tuple(steps), plain.shape[1])


def place(seen: Seen, words: int, first: int | None) -> int:
    """The step that predicts the first of some words, checked against what the user says.

    Raises:
        TooShort: there are fewer outputs than words.
        Unfit: the user says something else, or the words can't be told apart.
    """
    fitting = Seen(seen.steps[:words], seen.outputs)
    found = fitting.first()
    if first is not None and first != found:
        raise Unfit(f"first={first}, but the output that first depends on the start word is that of step {found}")
    if found + words > seen.outputs or None in fitting.steps[1:]:
        raise TooShort(f"{words} words fed give {seen.outputs} outputs, the first word's at step {found}")
    return found
