"""The one verb: a captioner and an image go in, a frozen explanation of every word comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from . import map_to_pixels
from .captioners.captioner import Captioner, Prepared
from .errors import CaptionerError, CaptionError, PolicyError
from .explanation import Explanation, Word
from .images import read_image
from .unravel import Policy
from .word_to_map import Caption, Flow, attention, flow, image_effect, joined, normalised, removal

if TYPE_CHECKING:
    from PIL import Image

ALTERNATIVES = 5


class Leg(NamedTuple):
    """What a first leg found.

    Attributes:
        evidence: (n, F, h, w) at the feature map's neurons, every word's sum 1 (or 0).
        place: (n, h, w), by which fixations count at their own place; None: they count as they are.
    """

    evidence: Tensor
    place: Tensor | None = None


def _by_join(captioner: Captioner, features: Tensor, caption: Caption, found: Flow) -> Leg:
    start, place = joined(captioner, features, caption, found)
    return Leg(map_to_pixels.channels(features[0], start), place)


def _by_removal(captioner: Captioner, features: Tensor, caption: Caption, found: Flow) -> Leg:
    return Leg(map_to_pixels.channels(features[0], normalised(removal(captioner, features, caption))))


def _by_flow(captioner: Captioner, features: Tensor, caption: Caption, found: Flow) -> Leg:
    return Leg(normalised(found.features))


def _by_attention(captioner: Captioner, features: Tensor, caption: Caption, found: Flow) -> Leg:
    return Leg(map_to_pixels.channels(features[0], normalised(attention(captioner, features, caption))))


METHODS: dict[str, Callable[[Captioner, Tensor, Caption, Flow], Leg]] = {
    "joined": _by_join,
    "removal": _by_removal,
    "flow": _by_flow,
    "attention": _by_attention,
}


@overload
def explain(
    captioner: Captioner,
    images: list[Any] | tuple[Any, ...],
    caption: str | Sequence[str] | None = None,
    *,
    contrast: Mapping[Any, str] | Literal["alternatives"] | None = None,
    method: str = "default",
    policy: Policy | str | Mapping[str, Any] = "default",
    beams: int = 3,
    unknown: Literal["error", "map"] = "error",
    batch_size: int = 16,
) -> list[Explanation]: ...
@overload
def explain(
    captioner: Captioner,
    images: Any,
    caption: str | None = None,
    *,
    contrast: Mapping[Any, str] | Literal["alternatives"] | None = None,
    method: str = "default",
    policy: Policy | str | Mapping[str, Any] = "default",
    beams: int = 3,
    unknown: Literal["error", "map"] = "error",
    batch_size: int = 16,
) -> Explanation: ...
def explain(
    captioner: Captioner,
    images: Any,
    caption: str | Sequence[str] | None = None,
    *,
    contrast: Mapping[Any, str] | Literal["alternatives"] | None = None,
    method: str = "default",
    policy: Policy | str | Mapping[str, Any] = "default",
    beams: int = 3,
    unknown: Literal["error", "map"] = "error",
    batch_size: int = 16,
) -> Explanation | list[Explanation]:
    """Shows where each word of a caption comes from.

    The image is captioned (or the given caption taken), the caption is decoded once teacher-forced, and every word's
    evidence is found at the CNN's feature map (``method``) and unraveled from there to the pixels (``policy``).

    Args:
        captioner: what `captionfix.load` returns, or a `Captioner` of your own.
        images: a path, PIL image, array (H, W, 3) or tensor (3, H, W); a list or tuple of them gives a list of
            explanations.
        caption: anybody's caption instead of the captioner's own; for several images one for all, or one each.
        contrast: ``{"dog": "cat"}`` explains "dog" by what speaks for it and against "cat". Keys are words of the
            caption (all their occurrences) or places. ``"alternatives"`` explains every word's flow by what speaks for
            it and against the words that the captioner finds likely in its place, sum_v p(v) logit(v); a removal's
            drop of log-probability is against them already.
        method: how words depend on the feature map: ``"joined"`` (the default: removal and flow together),
            ``"removal"``, ``"flow"`` or ``"attention"``.
        policy: how much evidence is followed: ``"default"``, ``"paper"`` (CNN Fixations as published; its method is
            the flow), ``"marginal"``, a `captionfix.Policy` or its fields.
        beams: width of the beam search for the captioner's own caption; 1 is greedy.
        unknown: what to do about words of a given caption that the captioner does not know: ``"error"`` lists them,
            ``"map"`` feeds the captioner's word for unknown.
        batch_size: images encoded and unraveled at once; it bounds the memory.

    Raises:
        ImageError: an image can't be read.
        CaptionError: a caption is empty, too long or has unknown words, or a contrast names a word that is not there.
        CaptionerError: the captioner's output is not finite.
        PolicyError: no such method or policy, or one that this captioner can't follow.
    """
    several = isinstance(images, (list, tuple))
    pictures = [read_image(image) for image in (images if several else [images])]
    captions: list[str | None]
    if caption is None or isinstance(caption, str):
        captions = [caption] * len(pictures)
    else:
        captions = list(caption)
        if len(captions) != len(pictures):
            raise CaptionError(f"{len(captions)} captions for {len(pictures)} images: give one for all, or one each")
    if isinstance(contrast, str) and contrast != "alternatives":
        raise CaptionError(f"contrast {contrast!r}: give {{word: other word}}, or 'alternatives'")
    method, followed = _settings(captioner, method, policy)
    explanations: list[Explanation] = []
    for first in range(0, len(pictures), batch_size):
        part = slice(first, first + batch_size)
        explanations += _batch(
            captioner, pictures[part], captions[part], contrast or {}, method, followed, beams, unknown
        )
    return explanations if several else explanations[0]


def _settings(captioner: Captioner, method: str, policy: Policy | str | Mapping[str, Any]) -> tuple[str, Policy]:
    chosen = captioner.defaults.get("policy", "default") if policy == "default" else policy
    if method == "default":
        method = "flow" if policy == "paper" else str(captioner.defaults.get("method", "joined"))
    if method not in METHODS:
        raise PolicyError(f"no method is named {method!r}; choose one of {', '.join(METHODS)}")
    return method, Policy.named(chosen)  # type: ignore[arg-type]


def _batch(
    captioner: Captioner,
    pictures: Sequence[Image.Image],
    captions: Sequence[str | None],
    contrast: Mapping[Any, str] | Literal["alternatives"],
    method: str,
    policy: Policy,
    beams: int,
    unknown: Literal["error", "map"],
) -> list[Explanation]:
    given = [None if caption is None else captioner.tokenize(caption, unknown) for caption in captions]
    prepared = [captioner.prepare(picture) for picture in pictures]
    pixels = torch.stack([p.pixels for p in prepared]).to(captioner.device)
    encoded = map_to_pixels.encode(captioner, pixels)
    if not bool(torch.isfinite(encoded.features).all()):
        raise CaptionerError(
            f"captioner {captioner.name!r}: its feature map is not finite; its weights are damaged or too large"
        )
    wanted = [i for i, ids in enumerate(given) if ids is None]
    if wanted:
        with torch.inference_mode():
            generated = captioner.generate_from(encoded.features[wanted], beams=beams)
        for i, made in zip(wanted, generated, strict=True):
            given[i] = tuple(made)
    words: list[list[Word]] = []
    legs: list[Leg] = []
    owner: list[int] = []
    for i, ids in enumerate(given):
        assert ids is not None
        named = () if isinstance(contrast, str) else _contrasts(captioner, ids, contrast)
        caption = Caption(captioner.vocabulary.start, ids, named)
        if not ids:
            words.append([])
            continue
        features = encoded.features[i : i + 1]
        found = flow(captioner, features, caption, policy, "alternatives" if isinstance(contrast, str) else "logit")
        legs.append(METHODS[method](captioner, features, caption, found))
        owner += [i] * len(ids)
        words.append(_words(captioner, caption, found, legs[-1].evidence, image_effect(captioner, features, caption)))
    if legs:
        mass, _ = map_to_pixels.pixels(
            encoded, torch.cat([leg.evidence for leg in legs]), policy, torch.tensor(owner, device=pixels.device)
        )
        places = [leg.place for leg in legs if leg.place is not None]
        if places:
            mass = map_to_pixels.agreeing(mass, torch.cat(places))
        points = iter(mass.cpu())
        words = [[_placed(word, next(points), prepared[i]) for word in each] for i, each in enumerate(words)]
    settings = policy.as_dict()
    return [
        Explanation(
            image=picture,
            words=tuple(each),
            caption=captioner.text(ids or ()),
            captioner=captioner.name,
            method=method,
            policy=settings,
            window=p.window,
            grid=(pixels.shape[3], pixels.shape[2]),
        )
        for picture, each, ids, p in zip(pictures, words, given, prepared, strict=True)
    ]


def _contrasts(captioner: Captioner, ids: Sequence[int], contrast: Mapping[Any, str]) -> tuple[int | None, ...]:
    result: list[int | None] = [None] * len(ids)
    texts = [captioner.vocabulary.word(i) for i in ids]
    for key, other in contrast.items():
        against = captioner.vocabulary.id(other)
        if against is None:
            raise CaptionError(f"contrast {key!r} against {other!r}: the captioner does not know the word {other!r}")
        places = [key] if isinstance(key, int) else [k for k, text in enumerate(texts) if text == key]
        if not places or not all(-len(ids) <= k < len(ids) for k in places):
            raise CaptionError(f"contrast {key!r}: not in the caption; its words are: {', '.join(texts)}")
        for k in places:
            if ids[k] == against:
                raise CaptionError(f"contrast {key!r} against itself: name another word")
            result[k] = against
    return tuple(result)


def _words(captioner: Captioner, caption: Caption, found: Flow, at_map: Tensor, effect: Tensor) -> list[Word]:
    """What is known of each word before its pixels are."""
    vocabulary = captioner.vocabulary
    probability = found.logits.softmax(-1)
    if not bool(torch.isfinite(probability).all()):
        raise CaptionerError(
            f"captioner {captioner.name!r}: its output is not finite; its weights are damaged or too large"
        )
    top = probability.topk(min(ALTERNATIVES, probability.shape[1]), 1)
    texts = [vocabulary.word(i) for i in caption.ids]
    earlier = ["<start>", *texts]
    contrast = caption.contrast or (None,) * len(texts)
    maps = at_map.sum(1).float().cpu().numpy()
    share, other, tokens = found.image_share.tolist(), found.other.tolist(), found.tokens.tolist()
    result = []
    for k, text in enumerate(texts):
        against = contrast[k]
        result.append(
            Word(
                text=text,
                index=k,
                token=caption.ids[k],
                probability=float(probability[k, caption.ids[k]]),
                fixations=np.zeros((0, 3), np.float32),
                feature_map=maps[k],
                image_share=min(share[k], 1.0),
                language=tuple((earlier[t], tokens[k][t]) for t in range(k + 1)),
                other=max(other[k], 0.0),
                image_effect=float(effect[k]),
                alternatives=tuple(
                    (vocabulary.word(i), p)
                    for i, p in zip(top.indices[k].tolist(), top.values[k].tolist(), strict=True)
                ),
                contrast=None if against is None else vocabulary.word(against),
            )
        )
    return result


def _placed(word: Word, mass: Tensor, prepared: Prepared) -> Word:
    """The word with its fixations: (H, W) mass on the CNN's input, as points of the original image."""
    height, width = mass.shape
    row, column = torch.nonzero(mass > 0, as_tuple=True)
    x0, y0, x1, y1 = prepared.window
    weight = mass[row, column]
    points = torch.stack(
        [x0 + (column + 0.5) * ((x1 - x0) / width), y0 + (row + 0.5) * ((y1 - y0) / height), weight / weight.sum()], 1
    )
    return replace(word, fixations=points.numpy().astype(np.float32))
