"""Scores the maps of one method on one picture: which metrics there are, and what all methods share of a picture."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import captionfix

from ..captioners.captioner import Captioner, Prepared
from ..errors import PolicyError
from ..explain import explain_ids, settle
from ..explanation import Explanation
from ..word_to_map import Caption
from . import boxes, causal, metrics, needed
from .data import Grounded, Phrase, stem
from .methods import defaults

DISJOINT = 0.1  # two phrases count as a pair for word discrimination if intersection over the smaller is at most this
TOLERANCE = 0.03  # of the grid's longer side: TorchRay's 15 pixels of a photograph 500 pixels wide
BASELINES = ("centre", "random")  # the same for every word, or chance: they have no specific map

Regions = Callable[[metrics.Map, metrics.Region], float]
REGION: dict[str, Regions] = {
    "pointing": metrics.pointing,
    "pointing-tolerant": lambda heatmap, region: metrics.pointing(heatmap, region, TOLERANCE * max(heatmap.shape)),
    "mass": metrics.mass,
    "rank": metrics.rank,
    "inside-outside": metrics.inside_outside,
}
PAIR = {"discrimination": metrics.discrimination, "discrimination-joint": metrics.discrimination_joint}
OF_BOXES = ("iou", "f1")
OF_MODEL = ("deletion", "insertion", "occlusion-agreement", "noise-sensitivity", "randomisation", "share-agreement")
METRICS = (*REGION, "attention-correctness", *PAIR, *OF_BOXES, *OF_MODEL)
QUICK = (*REGION, "attention-correctness", *PAIR)
LOWER = ("deletion", "noise-sensitivity", "randomisation")  # of these less is better, of the others more
_WITH_SCIPY = ("iou", "f1", "randomisation", "share-agreement")


@dataclass(frozen=True)
class Plan:
    """What is measured. Two runs with equal plans give equal scores; `methods` and `limit` may grow.

    Attributes:
        captioner: its name.
        weights: a fingerprint of them.
        data: what `published.open_data` was given.
        methods: by name, with options.
        metrics: of `METRICS`.
        captions: ``people`` (the first caption of each picture) or ``model``.
        maps: ``raw``, ``specific`` or both.
        limit: of pictures.
        sigma: of the maps' Gaussian, a fraction of the CNN's input; None for the default.
        beams: width of the search for the model's captions.
        seed: of all that is drawn.
    """

    captioner: str
    weights: str
    data: dict[str, Any]
    methods: tuple[str, ...]
    metrics: tuple[str, ...] = QUICK
    captions: str = "people"
    maps: tuple[str, ...] = ("raw", "specific")
    limit: int | None = None
    sigma: float | None = None
    beams: int = 3
    seed: int = 0
    version: str = captionfix.__version__

    def __post_init__(self) -> None:
        for wanted, known, what in (
            (self.metrics, METRICS, "metric"),
            (self.maps, ("raw", "specific"), "kind of map"),
            ((self.captions,), ("people", "model"), "kind of captions"),
        ):
            unknown = [name for name in wanted if name not in known]
            if unknown or not wanted:
                raise PolicyError(f"no {what} is named {', '.join(unknown)!r}; choose of {', '.join(known)}")
        if "f1" in self.metrics and self.captions != "model":
            raise PolicyError("the metric 'f1' asks what the model says: it needs the model's captions")
        if set(_WITH_SCIPY) & set(self.metrics):
            needed("scipy")

    def as_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))


@dataclass(frozen=True)
class Subject:
    """One picture with the caption that is explained, and what all methods share of it."""

    captioner: Captioner
    item: Grounded
    number: int
    plan: Plan
    image: Image.Image
    ids: tuple[int, ...]

    @cached_property
    def caption(self) -> Caption:
        return Caption(self.captioner.vocabulary.start, self.ids)

    @cached_property
    def prepared(self) -> Prepared:
        return self.captioner.prepare(self.image)

    @cached_property
    def pixels(self) -> torch.Tensor:
        return self.prepared.pixels[None].to(self.captioner.device)

    @cached_property
    def window(self) -> boxes.Box:
        """The part of the image that the CNN's input shows, in fractions."""
        (width, height), (x0, y0, x1, y1) = self.image.size, self.prepared.window
        return x0 / width, y0 / height, x1 / width, y1 / height

    @cached_property
    def phrases(self) -> list[Phrase]:
        return [p for p in self.item.phrases if max(p.words) < len(self.ids)]

    @cached_property
    def regions(self) -> list[NDArray[np.bool_]]:
        grid = (self.pixels.shape[3], self.pixels.shape[2])
        return [p.region(grid, self.window) for p in self.phrases]

    @property
    def seed(self) -> int:
        """Of what is drawn for this picture, the same for all methods."""
        return self.plan.seed * 1_000_003 + self.number

    @cached_property
    def content(self) -> list[int]:
        """The words that some phrase consists of."""
        return sorted({k for phrase in self.phrases for k in phrase.words})

    @cached_property
    def drops(self) -> tuple[NDArray[np.bool_], metrics.Map]:
        return causal.occlusion_drops(self.captioner, self.pixels, self.caption, seed=self.seed)

    @cached_property
    def blanked(self) -> list[float]:
        return causal.blanking(self.captioner, self.pixels, self.caption)

    def plain_seconds(self) -> float:
        """One encode and one teacher-forced decode: what captioning costs now (the machine may be busy with more)."""
        began = time.perf_counter()
        with torch.inference_mode():
            pixels = self.captioner.prepare(self.image).pixels[None].to(self.captioner.device)
            self.captioner.logits(pixels, self.caption.inputs(pixels.device)).sum().item()
        return time.perf_counter() - began

    def maps(self, explanation: Explanation, kind: str) -> NDArray[np.floating]:
        return explanation.maps(kind == "specific", self.plan.sigma)

    def explain(self, method: str, image: Image.Image | None = None) -> Explanation:
        if "seed" in defaults(method) and "seed=" not in method:
            method = f"{method}:seed={self.seed}"
        settings = settle(self.captioner, method)
        return explain_ids(self.captioner, [image or self.image], [self.ids], settings)[0]


@dataclass
class Record:
    """All scores of one method on one picture.

    Attributes:
        image: number of the picture.
        name: of the picture.
        method: by name, with options.
        seconds: what explaining took.
        plain: what plain captioning took, just before.
        scores: (kind of map, kind of phrase, metric, value); NaN where undefined.
        events: (kind of map, side, class, hit, located), of the grounding F1.
    """

    image: int
    name: str
    method: str
    seconds: float
    plain: float
    scores: list[tuple[str, str, str, float]] = field(default_factory=list)
    events: list[tuple[str, str, str, bool, bool]] = field(default_factory=list)

    def line(self) -> str:
        plain = asdict(self)
        plain["scores"] = [[*s[:3], None if math.isnan(s[3]) else s[3]] for s in self.scores]
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)

    @classmethod
    def read(cls, line: str) -> Record:
        plain = json.loads(line)
        plain["scores"] = [(a, b, c, math.nan if v is None else v) for a, b, c, v in plain["scores"]]
        plain["events"] = [tuple(event) for event in plain["events"]]
        return cls(**plain)


def measure(subject: Subject, method: str, classes: frozenset[str] = frozenset()) -> Record:
    """Explains one picture by one method and scores it."""
    plain = subject.plain_seconds()
    began = time.perf_counter()
    found = subject.explain(method)
    seconds = time.perf_counter() - began
    record = Record(subject.number, subject.item.name, method, seconds, plain)
    plan = subject.plan
    baseline = method.partition(":")[0] in BASELINES
    kinds = [kind for kind in plan.maps if not (kind == "specific" and baseline)]
    heatmaps = {kind: subject.maps(found, kind) for kind in kinds}
    for kind, each in heatmaps.items():
        record.scores += [(kind, *one) for one in of_regions(each, subject.phrases, subject.regions, plan.metrics)]
        if set(OF_BOXES) & set(plan.metrics):
            _boxes(subject, each, kind, classes, record)
        record.scores += [(kind, *one) for one in _of_model(subject, each)]
    record.scores += _of_changes(subject, method, heatmaps)
    if "share-agreement" in plan.metrics:
        value = causal.share_agreement([word.image_share for word in found], subject.blanked)
        record.scores.append(("raw", "caption", "share-agreement", value))
    return record


def of_regions(
    heatmaps: NDArray[np.floating],
    phrases: Sequence[Phrase],
    regions: Sequence[NDArray[np.bool_]],
    wanted: Sequence[str] = QUICK,
) -> list[tuple[str, str, float]]:
    """(kind, metric, value) of every phrase, and of every pair of phrases with disjoint regions.

    Args:
        heatmaps: (words, H, W), a map a word. A phrase's map is the sum of its words' normalised maps.
        phrases: with the words that they consist of.
        regions: (H, W) each.
        wanted: metrics by name.
    """
    total = heatmaps.sum((1, 2), keepdims=True, dtype=np.float64)
    plain = np.divide(heatmaps, total, out=np.zeros(heatmaps.shape), where=total > 0)
    summed = [plain[list(p.words)].sum(0) for p in phrases]
    scores = []
    for phrase, region, heatmap in zip(phrases, regions, summed, strict=True):
        scores += [(phrase.kind, name, REGION[name](heatmap, region)) for name in REGION if name in wanted]
        if "attention-correctness" in wanted:
            value = metrics.attention_correctness(plain[list(phrase.words)], region)
            scores.append((phrase.kind, "attention-correctness", value))
    pairs = [name for name in PAIR if name in wanted]
    for a, b in combinations(range(len(phrases)) if pairs else (), 2):
        if metrics.overlap(regions[a], regions[b]) <= DISJOINT:
            scores += [("pair", name, PAIR[name](summed[a], summed[b], regions[a], regions[b])) for name in pairs]
    return scores


def _boxes(
    subject: Subject, heatmaps: NDArray[np.floating], kind: str, classes: frozenset[str], record: Record
) -> None:
    def found(words: Sequence[int]) -> boxes.Box | None:
        total = heatmaps[list(words)].sum((1, 2), keepdims=True)
        box = boxes.box_of((heatmaps[list(words)] / np.where(total > 0, total, 1)).sum(0))
        if box is None:
            return None
        (height, width), (x0, y0, x1, y1) = heatmaps.shape[1:], subject.window
        across, down = (x1 - x0) / width, (y1 - y0) / height
        return x0 + box[0] * across, y0 + box[1] * down, x0 + box[2] * across, y0 + box[3] * down

    if "iou" in subject.plan.metrics:
        for phrase in subject.phrases:
            record.scores.append((kind, phrase.kind, "iou", boxes.best_iou(found(phrase.words), phrase.all_boxes)))
    if "f1" in subject.plan.metrics:
        named = [(k, stem(word)) for k, word in enumerate(subject.item.words[: len(subject.ids)])]
        said = [(name, found([k])) for k, name in named if name in classes]
        events = boxes.ground(said, [one.mentions for one in subject.item.references])
        record.events += [(kind, e.side, e.name, e.hit, e.located) for e in events]


def _of_model(subject: Subject, heatmaps: NDArray[np.floating]) -> list[tuple[str, str, float]]:
    """What needs the captioner but no further explanation."""
    wanted, content = subject.plan.metrics, subject.content
    rows: list[tuple[str, str, float]] = []
    if {"deletion", "insertion"} & set(wanted):
        both = causal.deletion_insertion(subject.captioner, subject.pixels, subject.caption, heatmaps, content)
        for name, values in zip(("deletion", "insertion"), both, strict=True):
            rows += [("word", name, value) for value in values if name in wanted]
    if "occlusion-agreement" in wanted:
        hidden, drops = subject.drops
        rows += [
            ("word", "occlusion-agreement", causal.occlusion_agreement(heatmaps[k], hidden, drops[k])) for k in content
        ]
    return rows


def _of_changes(
    subject: Subject, method: str, heatmaps: dict[str, NDArray[np.floating]]
) -> list[tuple[str, str, str, float]]:
    """What explains again, under noise or with random weights; one explanation serves every kind of map."""
    rows: list[tuple[str, str, str, float]] = []
    if "noise-sensitivity" in subject.plan.metrics:
        again = [subject.explain(method, image) for image in causal.noisy(subject.image, seed=subject.seed)]
        for kind, maps in heatmaps.items():
            change = causal.noise_sensitivity(maps, (subject.maps(one, kind) for one in again))
            rows += [(kind, "word", "noise-sensitivity", change[k]) for k in subject.content]
    if "randomisation" in subject.plan.metrics:
        stages = causal.randomised(subject.captioner, subject.pixels, subject.caption, seed=subject.seed)
        with closing(stages):  # so that the weights come back whatever happens here
            for stage in stages:
                other = subject.explain(method)
                for kind, maps in heatmaps.items():
                    value = causal.map_correlation(maps, subject.maps(other, kind))
                    rows.append((kind, stage, "randomisation", value))
    return rows
