"""The base case of CNN Fixations: a plain image classifier, explained class by class with the same results as a
caption's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn

from .captioners.calm import Calm, buffers_kept, same_random_numbers
from .captioners.captioner import Prepared
from .captioners.preprocess import Preprocess
from .captioners.window import Preparation, as_pixels
from .class_names import Classes, labelled, wanted
from .errors import CaptionerError, ImageError, PolicyError
from .explanation import Explanation, Word
from .images import read_image
from .stacks import as_input, channels_of, is_input, rendered
from .unravel import Account, Policy, Slot, Trace, find_feature_map, start, walk

if TYPE_CHECKING:
    from .maps import Box

ALTERNATIVES = 5
IMAGENET = Preprocess(resize=256, crop=224)
"""torchvision's transforms of evaluation for most of its classifiers."""


def explain_classes(
    cnn: nn.Module,
    image: Any,
    classes: Classes = None,
    *,
    top: int = 1,
    preprocess: Callable[[Any], Any] | None = None,
    window: Box | Callable[[int, int], Box] | None = None,
    labels: Sequence[str] | Mapping[int, str] | None = None,
    policy: Policy | str | Mapping[str, Any] = "thorough",
    crops: Literal[1, 10] = 1,
    picture: Any = None,
    name: str | None = None,
) -> Explanation:
    """Shows which pixels speak for a class, for any CNN that classifies images (torchvision's, transformers', timm's).

    The image is classified once under record, and each class's evidence is unraveled from its logit down to the pixels.
    The module is left as it was: mode, hooks, buffers and attributes, also after an exception.

    Args:
        cnn: a module that takes (B, C, H, W) pixels and returns (B, classes) logits, as they are, as ``.logits``, or
            first in a tuple.
        image: a picture (path, PIL image, uint8 or 0..1 array or tensor of one, three or four channels), or the
            network's own input where that is no picture: a floating-point tensor (C, H, W) or array (H, W, C) of any
            number of channels, such as a sketch (1) or stacked optical flow (20), which is used as it is.
        classes: names or ids of the classes to explain, one or several; None for the likeliest.
        top: how many of the likeliest where ``classes`` is None.
        preprocess: makes a picture the network's (C, H, W) input: a `Preprocess`, a torchvision transform, a
            transformers image processor, any function of a PIL image. By default torchvision's: shorter side 256,
            centre 224, ImageNet's mean and deviation.
        window: which part of the original the input shows, x0, y0, x1, y1 in its pixels, or a function of its width
            and height; found by asking ``preprocess`` where it is not said.
        labels: names of the classes, by place or by id. By default those in the module's configuration
            (transformers), or ImageNet's where there are 1000.
        policy: how much evidence is followed: ``"thorough"``, ``"default"`` or ``"fast"`` (200 or 100 neurons a
            layer), ``"paper"`` (the published sets), ``"released"`` (those of the authors' code), ``"marginal"``, a
            `captionfix.Policy` or its fields.
        crops: 10 as the paper evaluates: the class is the likeliest by the mean over the four corners, the centre and
            their mirror images; each of the five upright crops that ranks it first adds its fixations (where none
            does, the centre's likeliest class takes its place, or for given classes all five add theirs).
        picture: what is drawn under the maps instead of the image (for an input that is no picture).
        name: shown in results; the module's class by default.

    Returns:
        An `Explanation` whose words are the classes, the likeliest first where they were not given. ``token`` is the
        class's id, ``probability`` its softmax (the mean over crops), ``image_share`` the part of its evidence that
        ends in the image, ``other`` that in biases.

    Raises:
        ImageError: the image can't be read, or is no input of this network.
        CaptionError: there is no such class, or several have the name.
        CaptionerError: the module does not classify, its output is not finite, or preprocessing failed.
        PolicyError: there is no such policy, or ``crops`` with a preprocessing that can't be cropped.
        UnsupportedOperation: evidence met an operation without a rule.
    """
    followed = Policy.named(policy)  # type: ignore[arg-type]
    if crops not in (1, 10):
        raise PolicyError(f"crops={crops!r}: choose 1 (the input as it is) or 10 (corners, centre and mirror images)")
    if not isinstance(cnn, nn.Module):
        raise CaptionerError(f"explain_classes takes a torch.nn.Module, not a {type(cnn).__name__}")
    source, views, size = _views(cnn, image, preprocess, window, crops)
    title = name or type(cnn).__name__
    with same_random_numbers(_device(cnn)), buffers_kept(cnn):
        run = Calm(cnn.modules())
        recorded = {0: _record(cnn, run, views[0].pixels)} if crops == 1 else {}
        logits = recorded[0].logits.read() if crops == 1 else _plain(cnn, run, views)
        chances = _probabilities(logits)
        known = labelled(cnn, labels, chances.shape[1])
        ids, used = _choose(chances, wanted(classes, known, chances.shape[1]), top)
        found = {
            i: _unravel(recorded.get(i) or _record(cnn, run, views[i].pixels), ids, followed)
            for i in sorted({i for each in used for i in each})
        }
    probability = chances.mean(0)
    best = probability.topk(min(ALTERNATIVES, len(probability)))
    alternatives = tuple((known(i), p) for i, p in zip(best.indices.tolist(), best.values.tolist(), strict=True))
    words = []
    for k, (number, mine) in enumerate(zip(ids, used, strict=True)):
        points = np.concatenate([_points(found[i].pixels[k], views[i].window) for i in mine])
        if followed.mass == "set":
            points[:, 2] = 1
        points[:, 2] /= max(points[:, 2].sum(), 1e-30)
        maps = torch.stack([found[i].feature_map[k] for i in mine]).mean(0)
        words.append(
            Word(
                text=known(number),
                index=k,
                token=number,
                probability=float(probability[number]),
                fixations=points.astype(np.float32),
                feature_map=(maps / maps.sum().clamp_min(torch.finfo(maps.dtype).tiny)).float().numpy(),
                image_share=min(float(np.mean([found[i].image_share[k] for i in mine])), 1.0),
                other=max(float(np.mean([found[i].other[k] for i in mine])), 0.0),
                alternatives=alternatives,
            )
        )
    shown = source if picture is None else read_image(picture)
    result = Explanation(
        image=shown,
        words=tuple(words),
        caption=", ".join(word.text for word in words),
        captioner=title,
        method="flow",
        policy=followed.as_dict(),
        window=views[0].window if crops == 1 else (0.0, 0.0, float(source.width), float(source.height)),
        grid=size,
    )
    return result if shown.size == source.size else _over(result, source.size)


@dataclass(frozen=True)
class Found:
    """What one view of the image gave, for each of n classes.

    Attributes:
        pixels: (n, H, W) mass on each pixel, summed over channels.
        feature_map: (n, h, w) evidence at the last feature map; (n, 1, 1) of zeros where there is none.
        image_share: (n,) mass that reached the pixels.
        other: (n,) the rest.
    """

    pixels: Tensor
    feature_map: Tensor
    image_share: Tensor
    other: Tensor


def _views(
    cnn: nn.Module, image: Any, preprocess: Callable[[Any], Any] | None, window: Any, crops: int
) -> tuple[PIL.Image.Image, list[Prepared], tuple[int, int]]:
    """The original as a picture, what the network sees of it, and the size of the grid that fixations lie on."""
    channels = channels_of(cnn)
    if preprocess is None and is_input(image, channels):
        if crops != 1:
            raise PolicyError("crops=10 cuts up a picture, not an input that is used as it is: leave it out")
        pixels = as_input(image, channels)
        height, width = pixels.shape[1:]
        return rendered(pixels), [Prepared(pixels, (width, height), (0, 0, width, height))], (width, height)
    if preprocess is None and channels not in (None, 3):
        raise ImageError(
            f"the network takes {channels} channel(s), and how its training prepared pictures is not known: give "
            f"preprocess=, or the input itself, a floating-point tensor ({channels}, height, width)"
        )
    if preprocess is not None and is_input(image, None):  # no picture, and somebody knows what to do about it
        pixels = as_pixels(preprocess(image))
        source = rendered(as_input(image, None))
        box = window(*source.size) if callable(window) else window or (0.0, 0.0, *map(float, source.size))
        return source, [Prepared(pixels, source.size, box)], (pixels.shape[2], pixels.shape[1])
    source = read_image(image)
    made: Any = IMAGENET if preprocess is None else _spelled_out(preprocess)
    if crops == 1:
        view = Preparation(made, window)(source)
        return source, [view], (view.pixels.shape[2], view.pixels.shape[1])
    if not isinstance(made, Preprocess) or made.crop is None:
        raise PolicyError(
            "crops=10 needs preprocess=Preprocess(resize=..., crop=...), as the default is, or torchvision's"
        )
    return source, *_ten(source, made, made.crop)


def _spelled_out(transform: Any) -> Any:
    """torchvision's transform of evaluation (``weights.transforms()``) as one that knows its window exactly and can be
    cut into ten crops; anything else as it is.
    """
    from torchvision.transforms import InterpolationMode

    filters = {
        InterpolationMode.BILINEAR: PIL.Image.Resampling.BILINEAR,
        InterpolationMode.BICUBIC: PIL.Image.Resampling.BICUBIC,
    }
    if type(transform).__name__ != "ImageClassification" or transform.interpolation not in filters:
        return transform
    if len(transform.resize_size) != 1 or len(transform.crop_size) != 1:
        return transform
    return Preprocess(
        resize=transform.resize_size[0],
        crop=transform.crop_size[0],
        mean=tuple(transform.mean),
        std=tuple(transform.std),
        resample=filters[transform.interpolation],
    )


def _ten(source: PIL.Image.Image, preprocess: Preprocess, side: int) -> tuple[list[Prepared], tuple[int, int]]:
    """The upper left, upper right, lower left, lower right and central crops of the resized picture, upright and then
    mirrored (whose windows are those of their originals), as in Caffe's oversampling.
    """
    whole = replace(preprocess, crop=None)(source).pixels
    height, width = whole.shape[1:]
    if min(height, width) < side:
        raise PolicyError(f"the picture is resized to {width} x {height}, smaller than crops of {side}")
    corners = [(top, left) for top in (0, height - side) for left in (0, width - side)]
    views = []
    for top, left in [*corners, ((height - side) // 2, (width - side) // 2)]:
        x, y = source.width / width, source.height / height
        box = (left * x, top * y, (left + side) * x, (top + side) * y)
        views.append(Prepared(whole[:, top : top + side, left : left + side].contiguous(), source.size, box))
    return views + [replace(view, pixels=view.pixels.flip(2)) for view in views], (width, height)


def _device(cnn: nn.Module) -> torch.device:
    return next((tensor.device for tensor in [*cnn.parameters(), *cnn.buffers()]), torch.device("cpu"))


def _logits(cnn: nn.Module, pixels: Tensor) -> Tensor:
    try:
        out = cnn(pixels)
    except RuntimeError as error:
        raise CaptionerError(
            f"the network does not take an input of {tuple(pixels.shape)}: {(str(error) or 'error').splitlines()[0]}"
        ) from error
    if not isinstance(out, Tensor):
        out = out["logits"] if isinstance(out, Mapping) and "logits" in out else getattr(out, "logits", out)
    if isinstance(out, (tuple, list)) and out:
        out = out[0]
    if not isinstance(out, Tensor) or out.shape[0] != len(pixels) or out[0].numel() != max(out.shape[1:]):
        what = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise CaptionerError(f"the network must return (batch, classes) logits, not {what}")
    return out.flatten(1)


@dataclass(frozen=True, eq=False)
class Recorded:
    """A pass of the network over one view: the record, and where pixels and logits lie."""

    trace: Trace
    image: Slot
    logits: Slot


def _record(cnn: nn.Module, run: Calm, pixels: Tensor) -> Recorded:
    def forward() -> Recorded:
        with Trace(cnn) as trace:
            batch = _placed_for(cnn, pixels[None]).clone()  # a storage of its own
            image = trace.slot(trace.watch("image", batch))
            return Recorded(trace, image, trace.slot(_logits(cnn, batch)))

    recorded: Recorded = run(forward)
    return recorded


def _plain(cnn: nn.Module, run: Calm, views: Sequence[Prepared]) -> Tensor:
    """(views, classes) logits."""

    def forward() -> Tensor:
        with torch.inference_mode():
            return torch.cat([_logits(cnn, _placed_for(cnn, view.pixels[None])) for view in views])

    logits: Tensor = run(forward)
    return logits


def _placed_for(cnn: nn.Module, pixels: Tensor) -> Tensor:
    """Where the network computes, in its precision."""
    return pixels.to(next(cnn.parameters(), torch.zeros(())))


def _probabilities(logits: Tensor) -> Tensor:
    logits = logits.float().cpu()
    if not bool(torch.isfinite(logits).all()):
        raise CaptionerError("the network's output is not finite; its weights are damaged or too large")
    already = bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones(len(logits)), atol=1e-4)
    return logits if already else logits.softmax(1)


def _choose(chances: Tensor, asked: list[int] | None, top: int) -> tuple[list[int], list[list[int]]]:
    """Ids of the classes, and which views explain each, from (views, classes) probabilities."""
    count = min(max(top, 1), chances.shape[1])
    ids = chances.mean(0).topk(count).indices.tolist() if asked is None else asked
    if len(chances) == 1:
        return ids, [[0]] * len(ids)
    first = chances[:5].argmax(1).tolist()
    if asked is None and ids[0] not in first:  # no upright crop agrees: the centre's word counts
        ids = [first[4], *(i for i in ids if i != first[4])][:count]
    return ids, [[i for i, best in enumerate(first) if best == number] or [*range(5)] for number in ids]


def _unravel(recorded: Recorded, ids: Sequence[int], policy: Policy) -> Found:
    """The evidence of the classes in one view."""
    trace, image, logits = recorded.trace, recorded.image, recorded.logits
    at = find_feature_map(trace, image, logits)
    account = walk(trace, [(logits, start(logits, list(ids)))], policy, len(ids), {} if at is None else {"map": at})
    return _found(account, image, at, policy)


@torch.inference_mode()
def _found(account: Account, image: Slot, at: Slot | None, policy: Policy) -> Found:
    found, count = account.at(image), account.words
    height, width = image.shape[2:]
    mass = replace(found, element=found.element % (height * width)).dense(count, height * width)
    share = mass.sum(1)
    if policy.mass == "set":  # a set of pixels: all weigh the same
        members = (mass > 0).to(mass.dtype)
        mass = members * (share / members.sum(1).clamp_min(1))[:, None]
    feature_map = mass.new_zeros(count, 1, 1)
    if at is not None:
        feature_map = mass.new_zeros(count, *at.shape[2:])
        if "map" in account.cuts:
            feature_map = account.cuts["map"].dense(count, at.numel).view(count, *at.shape[1:]).sum(1)
    other = account.rest([image]) + account.bias
    return Found(mass.view(count, height, width).cpu(), feature_map.cpu(), share.cpu(), other.cpu())


def _points(mass: Tensor, window: Box) -> np.ndarray[Any, Any]:
    """(n, 3): pixels of the input that hold mass, at the centres of what they show of the original."""
    height, width = mass.shape
    row, column = np.nonzero(mass.numpy() > 0)
    x0, y0, x1, y1 = window
    return np.stack(
        [
            x0 + (column + 0.5) * ((x1 - x0) / width),
            y0 + (row + 0.5) * ((y1 - y0) / height),
            mass.numpy()[row, column].astype(np.float64),
        ],
        1,
    )


def _over(result: Explanation, size: tuple[int, int]) -> Explanation:
    """The explanation in the coordinates of another picture of the same thing."""
    x, y = result.image.width / size[0], result.image.height / size[1]
    scale = np.array([x, y, 1], dtype=np.float32)
    x0, y0, x1, y1 = result.window
    words = tuple(replace(word, fixations=word.fixations * scale) for word in result.words)
    return replace(result, words=words, window=(x0 * x, y0 * y, x1 * x, y1 * y))
