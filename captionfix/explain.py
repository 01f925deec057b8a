"""The one verb: a captioner and an image go in, a frozen explanation of every word comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from . import map_to_pixels
from .captioners.captioner import Captioner, Prepared
from .errors import CaptionerError, CaptionError, PolicyError
from .explanation import Explanation, Explanations, Word
from .images import read_image
from .legs import METHODS, Leg, followed, unraveled
from .unravel import Policy
from .word_to_map import Caption, Flow, flows, image_effect, normalised

if TYPE_CHECKING:
    from PIL import Image

ALTERNATIVES = 5
WITH_POLICY = {  # a method's name -> first leg, policy
    "fast": ("joined", "fast"),
    "thorough": ("joined", "thorough"),
    "paper": ("flow", "paper"),
    "marginal": ("flow", "marginal"),
}
# Methods of other tools: they live a floor above and are imported when one is asked for.
OTHERS = "captionfix.evaluate.methods"

Maps = Callable[[Captioner, Tensor, Tensor, Caption], Tensor]
"""A method that needs no evidence: (captioner, (1, C, H, W) pixels, (1, F, h, w) features, caption of n words) ->
(n, H, W) maps on the CNN's input, not negative."""


@dataclass(frozen=True)
class Settings:
    """A method, settled: a first leg and a policy, or another tool's maps."""

    method: str
    leg: Callable[[Captioner, Tensor, Tensor, Caption, Flow, Policy], Leg] | None = None
    policy: Policy = field(default_factory=Policy)
    maps: Maps | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of maps


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
) -> Explanations: ...
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
) -> Explanation | Explanations:
    """Shows where each word of a caption comes from.

    The image is captioned (or the given caption taken), the caption is decoded once teacher-forced, and every word's
    evidence is found at the CNN's feature map (``method``) and unraveled from there to the pixels (``policy``).

    Args:
        captioner: what `captionfix.load` returns, or a `Captioner` of your own.
        images: a path, PIL image, array (H, W, 3) or tensor (3, H, W); a list or tuple of them gives a list of
            explanations, which shows itself as a contact sheet in a notebook.
        caption: anybody's caption instead of the captioner's own; for several images one for all, or one each.
        contrast: ``{"dog": "cat"}`` explains "dog" by what speaks for it and against "cat". Keys are words of the
            caption (all their occurrences) or places. ``"alternatives"`` explains every word's flow by what speaks for
            it and against the words that the captioner finds likely in its place, sum_v p(v) logit(v); a removal's
            drop of log-probability is against them already.
        method: how words depend on the feature map: ``"joined"`` (removal and flow together: the default, unless the
            captioner's folder names another), ``"multiscale"`` (the same, with the image looked at in three sizes),
            ``"removal"``, ``"flow"`` or ``"attention"``, also with a policy as in ``"flow:policy=fast"``; or a method
            of other tools, for comparison, such as ``"gradcam"``, ``"occlusion"`` or ``"rise:masks=500"`` (all of
            `captionfix.evaluate.methods`), which makes maps on its own and knows no policy, no image share and no
            language credits.
        policy: how much evidence is followed: ``"default"`` (200 neurons a word in every layer, whatever the CNN's
            size; 800 in all where evidence of a whole caption is unraveled once), ``"fast"`` (100 neurons),
            ``"thorough"`` (all of the deep maps, then 1,000 neurons: several times as long), ``"paper"`` (CNN
            Fixations as published; its method is the flow), ``"marginal"``, a `captionfix.Policy` or its fields.
        beams: width of the beam search for the captioner's own caption; 1 is greedy.
        unknown: what to do about words of a given caption that the captioner does not know: ``"error"`` lists them,
            ``"map"`` feeds the captioner's word for unknown.
        batch_size: images taken at once; it bounds the memory. A policy with full tables (``"thorough"``) unravels
            them one by one.

    Raises:
        ImageError: an image can't be read.
        CaptionError: a caption is empty, too long or has unknown words, or a contrast names a word that is not there.
        CaptionerError: the captioner's output is not finite.
        PolicyError: no such method or policy, or one that this captioner can't follow or that needs a package which
            is not installed.
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
    settings = settle(captioner, method, policy)
    given = [None if caption is None else captioner.tokenize(caption, unknown) for caption in captions]
    explanations = Explanations()
    for first in range(0, len(pictures), batch_size):
        part = slice(first, first + batch_size)
        explanations += explain_ids(captioner, pictures[part], given[part], settings, contrast or {}, beams)
    return explanations if several else explanations[0]


def settle(
    captioner: Captioner, method: str = "default", policy: Policy | str | Mapping[str, Any] = "default"
) -> Settings:
    """What a method's and a policy's name mean for this captioner.

    Raises:
        PolicyError: there is no such method or policy, or they do not go together.
    """
    plain, _, option = method.partition(":")
    if option and (plain in METHODS or plain == "default"):
        key, _, named = option.partition("=")
        if key != "policy" or not named or policy != "default":
            raise PolicyError(f"method {method!r}: its one option is a policy's name, once, as {plain}:policy=fast")
        method, policy = plain, named
    if method in WITH_POLICY and policy in ("default", WITH_POLICY[method][1]):
        method, policy = WITH_POLICY[method]
    if method == "default":
        method = "flow" if policy == "paper" else str(captioner.defaults.get("method", "joined"))
        if policy == "default":
            policy = captioner.defaults.get("policy", "default")  # type: ignore[assignment]
    if method in METHODS:
        return Settings(method, METHODS[method], Policy.named(policy))  # type: ignore[arg-type]
    maps, options = import_module(OTHERS).resolve(method)
    if policy != "default":
        raise PolicyError(f"method {method!r} makes its maps on its own and follows no policy; leave the policy out")
    return Settings(method, maps=maps, options=options)


def explain_ids(
    captioner: Captioner,
    pictures: Sequence[Image.Image],
    captions: Sequence[tuple[int, ...] | None],
    settings: Settings,
    contrast: Mapping[Any, str] | Literal["alternatives"] = MappingProxyType({}),
    beams: int = 3,
) -> list[Explanation]:
    """`explain` for captions that are word ids already (None: the captioner's own). Images of one size are one
    batch."""
    prepared = [captioner.prepare(picture) for picture in pictures]
    sizes = [each.pixels.shape for each in prepared]
    if len(set(sizes)) > 1:  # a captioner that keeps each image's own size: a batch for every size
        explained: dict[int, Explanation] = {}
        for size in set(sizes):
            part = [i for i, each in enumerate(sizes) if each == size]
            alike = explain_ids(
                captioner, [pictures[i] for i in part], [captions[i] for i in part], settings, contrast, beams
            )
            explained.update(zip(part, alike, strict=True))
        return [explained[i] for i in range(len(sizes))]
    pixels = torch.stack([p.pixels for p in prepared]).to(captioner.device)
    # full tables hold every cell of a batch for every word: there images are unraveled one by one
    alone = len(pixels) > 1 and settings.policy.tables
    encoded = None if settings.leg is None or alone else map_to_pixels.encode(captioner, pixels)
    with torch.inference_mode():
        features = captioner.encode(pixels) if encoded is None else encoded.features
    if not bool(torch.isfinite(features).all()):
        raise CaptionerError(
            f"captioner {captioner.name!r}: its feature map is not finite; its weights are damaged or too large"
        )
    given = _said(captioner, features, captions, beams)
    against = {} if isinstance(contrast, str) else contrast
    asked = {
        i: Caption(captioner.vocabulary.start, ids, _contrasts(captioner, ids, against))
        for i, ids in enumerate(given)
        if ids
    }
    if settings.leg is None:
        policy, (masses, found) = settings.policy, _by_maps(captioner, settings, pixels, features, asked)
    else:
        alternatives = isinstance(contrast, str)
        policy, masses, found = _by_legs(captioner, settings, pixels, features, encoded, asked, alternatives)
    words: list[tuple[Word, ...]] = [()] * len(given)
    for i, mass, each in zip(asked, masses, found, strict=True):
        words[i] = tuple(_placed(word, part, prepared[i]) for word, part in zip(each, mass.cpu(), strict=True))
    return [
        Explanation(
            image=picture,
            words=each,
            caption=captioner.text(ids),
            captioner=captioner.name,
            method=settings.method,
            policy=policy.as_dict() if settings.maps is None else dict(settings.options),
            window=p.window,
            grid=(pixels.shape[3], pixels.shape[2]),
        )
        for picture, each, ids, p in zip(pictures, words, given, prepared, strict=True)
    ]


def _said(
    captioner: Captioner, features: Tensor, captions: Sequence[tuple[int, ...] | None], beams: int
) -> list[tuple[int, ...]]:
    """The captions, and the captioner's own where none is given."""
    wanted = [i for i, ids in enumerate(captions) if ids is None]
    own: dict[int, tuple[int, ...]] = {}
    if wanted:
        with torch.inference_mode():
            own = dict(zip(wanted, captioner.generate_from(features[wanted], beams=beams), strict=True))
    return [tuple(own[i]) if ids is None else ids for i, ids in enumerate(captions)]


def _by_legs(
    captioner: Captioner,
    settings: Settings,
    pixels: Tensor,
    features: Tensor,
    encoded: map_to_pixels.Encoded | None,
    captions: Mapping[int, Caption],
    alternatives: bool,
) -> tuple[Policy, list[Tensor], list[list[Word]]]:
    """What the engine kept, and of each caption, by its image's number, the (n, 1 or 2, H, W) masses and the words.
    Where no pass of the batch is recorded, the images are unraveled one by one."""
    assert settings.leg is not None
    if not captions:
        return settings.policy, [], []
    chosen = features[list(captions)]
    found = flows(
        captioner, chosen, list(captions.values()), settings.policy, "alternatives" if alternatives else "logit"
    )
    legs, words = [], []
    for (i, caption), flow in zip(captions.items(), found, strict=True):
        image, mine = pixels[i : i + 1], features[i : i + 1]
        leg = settings.leg(captioner, image, mine, caption, flow, settings.policy)
        legs.append(leg)
        words.append(_words(captioner, mine, caption, flow, leg.evidence.sum(1)))
    policy = followed(settings.policy, legs)
    if encoded is not None:
        return policy, unraveled(encoded, legs, policy, list(captions)), words
    masses = []
    for i, leg in zip(captions, legs, strict=True):
        masses += unraveled(map_to_pixels.encode(captioner, pixels[i : i + 1]), [leg], policy)
    return policy, masses, words


def _by_maps(
    captioner: Captioner, settings: Settings, pixels: Tensor, features: Tensor, captions: Mapping[int, Caption]
) -> tuple[list[Tensor], list[list[Word]]]:
    """The same by another tool's maps, which are averaged over the feature map's cells for want of evidence there."""
    assert settings.maps is not None
    masses, words = [], []
    for i, caption in captions.items():
        image, mine = pixels[i : i + 1], features[i : i + 1]
        maps = settings.maps(captioner, image, mine, caption)
        cells = torch.nn.functional.adaptive_avg_pool2d(maps, (features.shape[2], features.shape[3]))
        masses.append(maps[:, None])
        words.append(_words(captioner, mine, caption, None, normalised(cells)))
    return masses, words


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


def _words(captioner: Captioner, features: Tensor, caption: Caption, found: Flow | None, at_map: Tensor) -> list[Word]:
    """What is known of each word before its pixels are."""
    vocabulary = captioner.vocabulary
    if found is None:
        with torch.inference_mode():
            probability = captioner.decode(features, caption.inputs(features.device))[0].softmax(-1)
    else:
        probability = found.logits.softmax(-1)
    if not bool(torch.isfinite(probability).all()):
        raise CaptionerError(
            f"captioner {captioner.name!r}: its output is not finite; its weights are damaged or too large"
        )
    top = probability.topk(min(ALTERNATIVES, probability.shape[1]), 1)
    texts = [vocabulary.word(i) for i in caption.ids]
    earlier = ["<start>", *texts]
    contrast = caption.contrast or (None,) * len(texts)
    maps = at_map.float().cpu().numpy()
    effect = image_effect(captioner, features, caption) if found is None else found.image_effect
    shares, others, tokens = [math.nan] * len(texts), [math.nan] * len(texts), None
    if found is not None:
        shares, tokens = found.image_share.clamp_max(1).tolist(), found.tokens.tolist()
        others = found.other.clamp_min(0).tolist()
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
                image_share=shares[k],
                language=() if tokens is None else tuple((earlier[t], tokens[k][t]) for t in range(k + 1)),
                other=others[k],
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
    """The word with its fixations and what lies evenly: (1 or 2, H, W) mass on the CNN's input, as points of the
    original image. What lies on padding around the image is no pixel of it and left out."""
    fixations, *rest = (_points(part, prepared) for part in mass)
    even = rest[0] if rest else fixations[:0]
    tiny = torch.finfo(mass.dtype).tiny
    total = fixations[:, 2].sum() + even[:, 2].sum()
    even[:, 2] /= total.clamp_min(tiny)
    fixations[:, 2] /= fixations[:, 2].sum().clamp_min(tiny)
    return replace(word, fixations=fixations.numpy().astype(np.float32), even=even.numpy().astype(np.float32))


def _points(mass: Tensor, prepared: Prepared) -> Tensor:
    """(n, 3): x and y in the original image, mass."""
    height, width = mass.shape
    row, column = torch.nonzero(mass > 0, as_tuple=True)
    x0, y0, x1, y1 = prepared.window
    x, y = x0 + (column + 0.5) * ((x1 - x0) / width), y0 + (row + 0.5) * ((y1 - y0) / height)
    points = torch.stack([x, y, mass[row, column]], 1)
    return points[(x > 0) & (x < prepared.size[0]) & (y > 0) & (y < prepared.size[1])]
