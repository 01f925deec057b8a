"""Tries ways of running a captioner until one passes every check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from captionfix.captioners.attempts import Attempt, line
from captionfix.captioners.captioner import Captioner, Vocabulary
from captionfix.captioners.causality import TooShort, Unfit, look, place
from captionfix.captioners.signatures import Reading, attention_weights, needed, other_widths, readings, shapes
from captionfix.captioners.split import Split, find_split
from captionfix.errors import CaptionerError

TRIED_WITH = 5  # words in the captions that a captioner is tried with
_ALONE = ("sample", "caption", "caption_image", "generate", "predict", "beam_search", "greedy_search", "decode")


@dataclass(frozen=True)
class Direct:
    """A captioner that is given in two parts."""

    encoder: Callable[[Tensor], Any]
    decoder: Callable[[Any, Tensor], Any]

    def encode(self, images: Tensor, captions: Tensor) -> Tensor:
        features: Tensor = self.encoder(images)
        return features

    def decode(self, features: Tensor, captions: Tensor) -> Any:
        return self.decoder(features, captions)

    def __str__(self) -> str:
        return "feature map: what encode= returns"


@dataclass(frozen=True)
class Recognised:
    """What was found out about a captioner.

    Attributes:
        text: how it is called.
        parts: its two parts.
        reading: where its logits are.
        filler: the id that is fed after the last word, where outputs lack that word's own step otherwise.
        first: the output step that predicts the first word.
        twice: whether one image must be run as two equal ones (a squeezed batch axis).
        weights: where attention weights over the feature map's cells are, if it returns any.
    """

    text: str
    parts: Split | Direct
    reading: Reading
    filler: int | None = None
    first: int = 0
    twice: bool = False
    weights: Reading | None = None

    def encode(self, images: Tensor, captions: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, F, h, w)."""
        if self.twice and len(images) == 1:
            return self.parts.encode(torch.cat([images, images]), torch.cat([captions, captions]))[:1]
        return self.parts.encode(images, captions)

    def decode(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, F, h, w) features, (B, T) tokens -> (B, T, V)."""
        return self._read(self.reading, features, tokens)

    def attention(self, features: Tensor, tokens: Tensor) -> Tensor | None:
        """(B, F, h, w) features, (B, T) tokens -> (B, T, h, w), or None where it returns no weights."""
        if self.weights is None:
            return None
        return self._read(self.weights, features, tokens).unflatten(2, features.shape[2:])

    def steps(self, features: Tensor, tokens: Tensor) -> Tensor:
        """(B, T', V): all output steps."""
        fed = self.fed(tokens)
        return self.reading(self.parts.decode(features, fed), *fed.shape)

    def fed(self, tokens: Tensor) -> Tensor:
        """What the captioner is fed for some tokens."""
        return tokens if self.filler is None else torch.nn.functional.pad(tokens, (0, 1), value=self.filler)

    def _read(self, reading: Reading, features: Tensor, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        if self.twice and batch == 1:
            features, tokens = torch.cat([features, features]), torch.cat([tokens, tokens])
        fed = self.fed(tokens)
        return reading(self.parts.decode(features, fed), *fed.shape)[:batch, self.first : self.first + length]

    def __str__(self) -> str:
        said = [f"called as {self.text}", str(self.reading), f"first word predicted at output step {self.first}"]
        said += ["a further word is fed after the last"] if self.filler is not None else []
        said += ["a single image is run as two equal ones"] if self.twice else []
        said += ["attention weights found"] if self.weights is not None else []
        return "; ".join([*said, str(self.parts)])


@dataclass(frozen=True)
class Probe:
    """What a captioner is tried with.

    Attributes:
        images: (2, C, H, W).
        captions: (2, T), the start first.
        vocabulary: the captioner's.
        features: module whose output is the feature map, as the user says it.
        first: the output step that predicts the first word, as the user says it.
        names: paths of modules by their ids.
    """

    images: Tensor
    captions: Tensor
    vocabulary: Vocabulary
    features: str | nn.Module | None
    first: int | None
    names: dict[int, str]


def probe_captions(vocabulary: Vocabulary, device: torch.device) -> Tensor:
    """(2, T) captions of ordinary words; the number of words differs from that of the vocabulary."""
    words = _ordinary(vocabulary)
    length = TRIED_WITH if abs(len(vocabulary) - TRIED_WITH) > 2 else TRIED_WITH + 4
    rows = [[vocabulary.start, *(words[(row + 2 * k) % len(words)] for k in range(length - 1))] for row in range(2)]
    return torch.tensor(rows, device=device)


def _ordinary(vocabulary: Vocabulary) -> list[int]:
    return [i for i in range(len(vocabulary)) if i not in vocabulary.special] or [vocabulary.end]


def recognise(attempts: Sequence[Attempt], probe: Probe, model: nn.Module) -> Recognised:
    """The first way that passes every check.

    Raises:
        CaptionerError: none does; says what was tried and why it was not it.
    """
    tried: list[tuple[str, str]] = []
    for attempt in attempts:
        try:
            return _checked(attempt, probe)
        except CaptionerError:
            raise
        except Unfit as problem:
            tried.append((attempt.text, str(problem)))
        except Exception as error:
            tried.append((attempt.text, f"failed with {line(error)}"))
    raise CaptionerError(_all_failed(tried, model, len(probe.vocabulary)))


def _all_failed(tried: Sequence[tuple[str, str]], model: nn.Module, words: int) -> str:
    reasons: dict[str, list[str]] = {}
    for text, reason in tried:
        reasons.setdefault(reason, []).append(text)
    # What came furthest says most.
    ranked = sorted(reasons.items(), key=lambda item: item[0].startswith("failed with"))
    said = "; ".join(f"{texts[0]}: {reason}" for reason, texts in ranked[:4])
    parts = [model, *model.children()]
    alone = dict.fromkeys(n for part in parts for n in _ALONE if callable(getattr(type(part), n, None)))
    hints = []
    if any("cuda" in reason.lower() or "nvidia" in reason.lower() for reason in reasons):
        hints.append("its code asks for a GPU by itself (.cuda()): run it where there is one, or use .to(x.device)")
    rows = max((part.num_embeddings for part in model.modules() if isinstance(part, nn.Embedding)), default=words)
    if rows < words:
        hints.append(
            f"its embedding has {rows} rows, but the vocabulary has {words} words: they do not belong together"
        )
    if alone:
        hints.append(
            f"it has {', '.join(f'{n}()' for n in alone)}: if it decodes only there, say how it steps with begin= "
            "and step="
        )
    if not tried:
        takes = ", ".join(f"{type(part).__name__}.forward{needed(part)}" for part in parts[:3])
        said = f"nothing to try: {takes} takes no images (or features) and captions"
    hints.append("otherwise give logits=lambda images, tokens: ..., where tokens[:, 0] is the start")
    return f"this captioner is called in none of the usual ways. Tried {said}. To do: {'; '.join(hints)}"


@torch.no_grad()
def _checked(attempt: Attempt, probe: Probe) -> Recognised:
    images, captions, words = probe.images, probe.captions, len(probe.vocabulary)
    batch, length = captions.shape
    source = images if attempt.encode is None else attempt.encode(images)
    output = attempt.run(source, captions)
    options = readings(output, batch, length, words)
    if not options:
        widths = other_widths(output, batch, length)
        if widths:
            raise Unfit(
                f"its outputs are for {widths[0]} words, but the vocabulary has {words}: they do not belong together"
            )
        raise Unfit(
            f"it returned {shapes(output)} for {batch} images and captions of {length} words: none of that is logits "
            f"for {words} words at each step"
        )
    parts = (
        Direct(attempt.encode, attempt.run)
        if attempt.encode is not None
        else find_split(attempt.run, images, captions, options, probe.names, probe.features)
    )
    features = parts.encode(images, captions)
    problem = Unfit("")
    for reading in options:
        for filler in (None, probe.vocabulary.end):
            found = Recognised(attempt.text, parts, reading, filler)
            try:
                found = replace(found, first=_first(found, features, captions, probe))
            except TooShort as short:
                problem = short
                continue
            except Unfit as unfit:
                problem = unfit
                break
            fed = found.fed(captions)
            cells = features.shape[2] * features.shape[3]
            weights = attention_weights(parts.decode(features, fed), reading, batch, fed.shape[1], cells)
            return replace(_alone_too(found, images, features, captions), weights=weights)
    raise problem


def _first(found: Recognised, features: Tensor, captions: Tensor, probe: Probe) -> int:
    words = _ordinary(probe.vocabulary)
    # An untrained CNN's features may be so large that its decoder's units are saturated and deaf to words.
    mild = features / features.square().mean().sqrt().clamp_min(1e-12)
    problem: Unfit | None = None
    for source in (features, mild):
        try:
            return place(look(found.steps, source, captions, words[0], words[-1]), captions.shape[1], probe.first)
        except TooShort:
            raise
        except Unfit as unfit:
            problem = problem or unfit
    assert problem is not None
    raise problem


def _alone_too(found: Recognised, images: Tensor, features: Tensor, captions: Tensor) -> Recognised:
    """The same for one image and for fewer words."""
    whole = found.decode(features, captions)
    tolerance = 1e-4 * float(whole.abs().amax().clamp_min(1e-6))

    def same(part: Tensor, wanted: Tensor) -> bool:
        return part.shape == wanted.shape and bool(((part - wanted).abs() <= tolerance).all())

    reason = "its logits differ from those in a batch"
    for twice in (False, True):
        found = replace(found, twice=twice)
        try:
            one = found.encode(images[:1], captions[:1])
            if same(found.decode(one, captions[:1]), whole[:1]):
                break
        except Exception as error:
            reason = line(error)
    else:
        raise CaptionerError(
            f"{found.text} works for two images but not for one ({reason}): look for .squeeze() without an axis, or a "
            "norm or softmax over the batch"
        )
    for length in (1, 2):
        for rows in (slice(0, 1), slice(0, 2)):
            try:
                part = found.decode(features[rows], captions[rows, :length])
            except Exception as error:
                raise CaptionerError(f"{found.text} fails for captions of {length} words: {line(error)}") from error
            if not same(part, whole[rows, :length]):
                raise CaptionerError(
                    f"{found.text}: the logits of the first {length} words change with the number of words that "
                    "follow; decoding a caption and feeding it back would not give the same words"
                )
    return found


@torch.no_grad()
def check_greedy(captioner: Captioner, images: Tensor, own: Callable[[Tensor], Any] | None) -> None:
    """Decodes greedily, word by word, and feeds what came out back in one pass; compares with the captioner's own.

    Raises:
        CaptionerError: the words are not the same.
    """
    v = captioner.vocabulary
    for image in images.split(1)[: 1 if own is None else 2]:
        features = captioner.encode(image)
        ids = [v.start]
        longest = captioner.max_words if own is not None else min(8, captioner.max_words)
        while len(ids) <= longest and (len(ids) == 1 or ids[-1] != v.end):
            ids.append(int(captioner.decode(features, torch.tensor([ids], device=image.device))[0, -1].argmax()))
        scores = captioner.decode(features, torch.tensor([ids[:-1]], device=image.device))[0]
        close = 1e-4 * float(scores.abs().amax().clamp_min(1e-6))
        chosen = scores.gather(1, torch.tensor(ids[1:], device=image.device)[:, None])[:, 0]
        if bool((chosen < scores.amax(1) - close).any()):
            raise CaptionerError(
                f"decoding gives the ids {ids[1:]}, but fed back they are not the likeliest words; check first= and "
                "what logits= does with its tokens"
            )
        if own is not None:
            _compare(_plain(ids, v), _own_ids(own(image), v), longest, v)


def _compare(ours: list[int], theirs: list[int], longest: int, vocabulary: Vocabulary) -> None:
    length = min(len(ours), len(theirs)) if longest in (len(ours), len(theirs)) else max(len(ours), len(theirs))
    if ours[:length] != theirs[:length]:
        said, own = (" ".join(vocabulary.word(i) for i in ids[:12]) for ids in (ours, theirs))
        raise CaptionerError(
            f"captionfix decodes {said!r} where the captioner's own decoding (own=) gives {own!r}: check start=, end=, "
            "first= and that own= decodes greedily"
        )


def _plain(ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """Ids up to the end, without start and pad."""
    skipped = {vocabulary.start, vocabulary.pad}
    result = []
    for number, i in enumerate(ids):
        if i == vocabulary.end and (number > 0 or i != vocabulary.start):
            break
        if i not in skipped:
            result.append(i)
    return result


def _own_ids(given: Any, vocabulary: Vocabulary) -> list[int]:
    if isinstance(given, str):
        given = given.split()
    while isinstance(given, (list, tuple)) and given and isinstance(given[0], (list, tuple)):
        given = given[0]
    if isinstance(given, Tensor):
        given = given.flatten().tolist()
    ids = []
    for item in given:
        i = vocabulary.id(item) if isinstance(item, str) else int(item)
        if i is None or not 0 <= i < len(vocabulary):
            raise CaptionerError(f"own= gives {item!r}, which is not in the vocabulary")
        ids.append(i)
    return _plain(ids, vocabulary)
