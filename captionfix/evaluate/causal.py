"""Does the model really use what the map shows: metrics that run the captioner, with the caption and so every word's
prefix fixed.

Maps are (n, H, W) on the CNN's input, a map a word; ``pixels`` are the (1, C, H, W) input. Where a part of the image is
taken away, the CNN's mean colour (0 after normalisation) takes its place.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..captioners.captioner import Captioner
from ..errors import PolicyError
from ..word_to_map import Caption
from . import needed
from .methods.perturbations import BATCH, score

Maps = NDArray[np.floating]
STEPS = 20


@torch.inference_mode()
def deletion_insertion(
    captioner: Captioner,
    pixels: Tensor,
    caption: Caption,
    maps: Maps,
    words: Sequence[int],
    steps: int = STEPS,
) -> tuple[list[float], list[float]]:
    """Deletion and insertion: the mean probability of a word while the pixels that its map holds highest are taken
    away first, or put in first.

    Petsiuk, Das, Saenko 2018, "RISE". All channels of a pixel go together, in ``steps`` equal steps over all pixels
    (equal values in reading order); the area under p(word | prefix, picture) over the true fraction of pixels, by
    trapezoids. The probability is the softmax's, untouched. Whole and empty pictures are computed once for both.

    Returns:
        for each of ``words`` deletion, 0..1, lower is better; and insertion, 0..1, higher is better. NaN for a word
        whose map is empty.
    """
    area = pixels.shape[2] * pixels.shape[3]
    ends = score(captioner, torch.cat([pixels, torch.zeros_like(pixels)]), caption).exp().cpu().numpy()
    cuts = np.unique(np.round(np.linspace(0, area, steps + 1)).astype(int))
    widths = np.diff(cuts) / area

    def under(k: int, shown: Tensor, whole: NDArray[np.floating]) -> float:
        middle = [score(captioner, pixels * part, caption)[:, k].exp() for part in shown.split(BATCH)]
        curve = np.concatenate([whole[:1], torch.cat(middle).cpu().numpy(), whole[1:]])
        return float((widths * (curve[1:] + curve[:-1]) / 2).sum())

    deletion, insertion = [math.nan] * len(words), [math.nan] * len(words)
    for at, k in enumerate(words):
        if not np.any(maps[k] > 0):
            continue
        place = np.empty(area, dtype=np.int64)
        place[np.argsort(-maps[k], axis=None, kind="stable")] = np.arange(area)
        rising = torch.from_numpy(place.reshape(pixels.shape[2:])).to(pixels.device)
        kept = torch.stack([rising < int(cut) for cut in cuts[1:-1]])[:, None]
        deletion[at], insertion[at] = under(k, ~kept, ends[:, k]), under(k, kept, ends[::-1, k])
    return deletion, insertion


@torch.inference_mode()
def occlusion_drops(
    captioner: Captioner, pixels: Tensor, caption: Caption, squares: int = 64, side: float = 0.25, seed: int = 0
) -> tuple[NDArray[np.bool_], Maps]:
    """Squares at random places, and what each does to every word: computed once for all methods.

    Args:
        captioner: runs once a square.
        pixels: the input.
        caption: the words.
        squares: how many.
        side: of a square, a fraction of the input's sides.
        seed: of the places.

    Returns:
        (squares, H, W) what is hidden, and (n, squares) the drop of each word's log-probability.
    """
    height, width = pixels.shape[2:]
    draw = np.random.default_rng(seed)
    rows, columns = max(1, round(side * height)), max(1, round(side * width))
    hidden = np.zeros((squares, height, width), dtype=bool)
    for one in hidden:
        y, x = draw.integers(0, height - rows + 1), draw.integers(0, width - columns + 1)
        one[y : y + rows, x : x + columns] = True
    whole = score(captioner, pixels, caption)
    shown = torch.from_numpy(~hidden).to(pixels.device)[:, None]
    drops = [whole - score(captioner, pixels * part, caption) for part in shown.split(BATCH)]
    return hidden, torch.cat(drops).T.cpu().numpy()


def occlusion_agreement(heatmap: Maps, hidden: NDArray[np.bool_], drops: Maps) -> float:
    """How well the map tells what hiding a place will do: Pearson's correlation, over squares, of the map's mass in
    the square with the drop of the word's log-probability. -1..1, higher is better.

    The idea of infidelity (Yeh et al. 2019, "On the (in)fidelity and sensitivity of explanations"), in the form that
    does not depend on the map's scale (Ancona et al. 2018, sensitivity-n). NaN where either does not vary.

    Args:
        heatmap: (H, W) of the word.
        hidden: (squares, H, W).
        drops: (squares,).
    """
    held = (hidden * heatmap).sum((1, 2), dtype=np.float64)
    if np.ptp(held) <= 0 or np.ptp(drops) <= 0:
        return math.nan
    return float(np.corrcoef(held, drops)[0, 1])


def rank_correlation(first: Maps, second: Maps) -> float:
    """Spearman's, -1..1; equal values share their rank. NaN where either does not vary."""
    if np.ptp(first) <= 0 or np.ptp(second) <= 0:
        return math.nan
    return float(needed("scipy.stats").spearmanr(np.ravel(first), np.ravel(second)).statistic)


def noisy(image: Image.Image, draws: int = 3, radius: int = 5, seed: int = 0) -> Iterator[Image.Image]:
    """The image under noise that one does not see: even in -radius..radius of 255 grey levels."""
    generator = np.random.default_rng(seed)
    array = np.asarray(image.convert("RGB")).astype(np.int64)
    for _ in range(draws):
        noise = generator.integers(-radius, radius + 1, array.shape)
        yield Image.fromarray((array + noise).clip(0, 255).astype(np.uint8))


def noise_sensitivity(maps: Maps, others: Iterable[Maps]) -> list[float]:
    """The largest change of a word's map under noise: max ||map(x + e) - map(x)|| / ||map(x)|| over draws of e.
    0.., lower is better.

    Max-sensitivity (Yeh et al. 2019), relative to the map; ``others`` are the maps of the `noisy` image, for the same
    caption. NaN for an empty map.
    """
    most = np.zeros(len(maps))
    for other in others:
        most = np.maximum(most, np.sqrt(((other.astype(np.float64) - maps) ** 2).sum((1, 2))))
    size = np.sqrt((maps.astype(np.float64) ** 2).sum((1, 2)))
    return [float(m / s) if s > 0 else math.nan for m, s in zip(most, size, strict=True)]


@torch.inference_mode()
def blanking(captioner: Captioner, pixels: Tensor, caption: Caption) -> list[float]:
    """(n,): the drop of each word's log-probability, in nats, when the picture is all mean colour."""
    both = score(captioner, torch.cat([pixels, torch.zeros_like(pixels)]), caption)
    return [float(value) for value in both[0] - both[1]]


def share_agreement(shares: Sequence[float], drops: Sequence[float]) -> float:
    """Does the image share say what blanking the image does? Spearman's correlation, over the words of a caption, of
    image share with the drop of log-probability (`blanking`). -1..1, higher is better. NaN where a method has no
    shares or a caption fewer than three words.
    """
    if len(shares) < 3 or any(math.isnan(share) for share in shares):
        return math.nan
    return rank_correlation(np.asarray(shares), np.asarray(drops))


def map_correlation(maps: Maps, others: Maps) -> float:
    """The mean over words of Spearman's correlation of two sets of maps, -1..1; words without a map are left out.

    Under `randomised` weights near 0 is better: a map that does not change when the weights are thrown away explains
    the picture, not the model.
    """
    each = [rank_correlation(a, b) for a, b in zip(maps, others, strict=True)]
    defined = [value for value in each if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan


def randomised(
    captioner: Captioner, pixels: Tensor, caption: Caption, cnn_parts: int = 3, seed: int = 0
) -> Generator[str, None, None]:
    """Model-parameter randomisation, top-down: yields a stage's name while the weights down to there are random.

    Adebayo et al. 2018, "Sanity checks for saliency maps". The cascade begins at the word's output and ends at the
    pixels, in the order in which this captioner's weights really run (not in which they were registered): the decoder
    module by module, then the CNN in ``cnn_parts`` parts. Each weight is drawn anew from a normal distribution with
    its own mean and deviation, each from a seed of its own. The trained model is no stage.

    Args:
        captioner: it has its own weights again when the iteration ends or is closed, to the bit.
        pixels: the input.
        caption: the words.
        cnn_parts: stages of the CNN.
        seed: of the drawing.

    Yields:
        ``decoder: MODULE`` (those before are random too), ``decoder`` (all of it), ``CNN top 1/3`` ...,
        ``everything``; and ``CNN alone``, with the trained decoder.

    Raises:
        PolicyError: the captioner names no module.
    """
    decoder, cnn = weights_in_order(captioner, pixels, caption)
    groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, weight in decoder:
        groups.setdefault(name.rpartition(".")[0], []).append((name, weight))
    names = [f"decoder: {group}" for group in groups]
    stages = list(zip([*names[:-1], "decoder"], groups.values(), strict=True))
    bounds = [round(k * len(cnn) / cnn_parts) for k in range(cnn_parts + 1)]
    for k, (first, last) in enumerate(pairwise(bounds), 1):
        stages.append((f"CNN top {k}/{cnn_parts}" if k < cnn_parts else "everything", cnn[first:last]))
    number = {id(weight): place for place, (_, weight) in enumerate([*decoder, *cnn])}

    @torch.no_grad()
    def draw(group: Sequence[tuple[str, nn.Parameter]]) -> None:
        for _, weight in group:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number[id(weight)])
            drawn = torch.randn(weight.shape, generator=generator).to(weight.device, weight.dtype)
            spread = weight.std(unbiased=False) if weight.numel() > 1 else weight.abs().sum()
            weight.copy_(drawn * spread + weight.mean())

    with _restored([weight for _, weight in (*decoder, *cnn)]):
        for name, group in stages:
            draw(group)
            yield name
    with _restored([weight for _, weight in cnn]):
        draw(cnn)
        yield "CNN alone"


@contextmanager
def _restored(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    before = [weight.detach().clone() for weight in weights]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, before, strict=True):
                weight.copy_(value)


def weights_in_order(
    captioner: Captioner, pixels: Tensor, caption: Caption
) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[str, nn.Parameter]]]:
    """The decoder's and the CNN's weights by name, each in the order in which they ran last, the last one first."""
    model = getattr(captioner, "model", None)
    if not isinstance(model, nn.Module):
        raise PolicyError(
            f"captioner {captioner.name!r} names no module (its `model`) whose weights could be randomised"
        )
    names = {id(weight): name for name, weight in model.named_parameters()}
    with torch.no_grad():
        with _Uses(names) as first:
            features = captioner.encode(pixels)
        with _Uses(names) as second:
            captioner.decode(features, caption.inputs(pixels.device))
    upper = second.latest()
    above = {id(weight) for _, weight in upper}
    return upper, [(name, weight) for name, weight in first.latest() if id(weight) not in above]


class _Uses(TorchFunctionMode):
    """Notes when weights take part in a function that makes tensors."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.used: dict[int, nn.Parameter] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple)) and getattr(func, "__name__", "") != "__get__":
            self._note([*args, *(kwargs or {}).values()])
        return result

    def _note(self, arguments: Any) -> None:
        for argument in arguments:
            if isinstance(argument, (list, tuple)):
                self._note(argument)
            elif id(argument) in self.names:
                self.used.pop(id(argument), None)
                self.used[id(argument)] = argument

    def latest(self) -> list[tuple[str, nn.Parameter]]:
        return [(self.names[key], weight) for key, weight in reversed(self.used.items())]
