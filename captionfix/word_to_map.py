"""First leg: how much each word of a caption depends on each cell of the CNN's feature map.

Three ways, which need nothing of the image's pixels and meet the second leg (`captionfix.map_to_pixels`) in evidence
at the feature map:

- `removal`: the decoder's causal dependence. Cells are taken out, the same caption is decoded teacher-forced, and the
  drop of each word's score counts. No gradients, any decoder, all cells in one batch. `multiscale` averages it over
  the image at several sizes.
- `flow`: the engine's evidence from the word's logit back through the decoder, which also accounts for earlier words.
- `attention`: the weights of a model that has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .captioners.captioner import Captioner
from .errors import PolicyError
from .unravel import Evidence, Policy, Slot, Trace, start, walk
from .unravel.rules.sums import weighted

Fill = Literal["zero", "mean"]
SCALES = (0.8, 1.3)
"""Other sizes of the image, as parts of its own, at which `multiscale` looks."""
DOUBT = 0.01
"""Nats. A word that loses as much by the removals of all cells, each by itself, is half theirs and half its flow's
(`joined`)."""
ACCOUNTED = 0.1
"""Part of what the whole image does to a word that removals of single cells have to account for, to be half trusted
with telling it from others (`believed`)."""
FINER = 4
"""How many points along either side of a cell `multiscale` tells apart."""


@dataclass(frozen=True)
class Caption:
    """A caption as the decoder reads it: n words, each predicted from those before it.

    Attributes:
        start: id that begins every caption.
        ids: the words' ids.
        contrast: for each word the id that it is explained against, or None.
    """

    start: int
    ids: tuple[int, ...]
    contrast: tuple[int | None, ...] = ()

    def inputs(self, device: torch.device) -> Tensor:
        """(1, n): start and all words but the last; position k predicts word k."""
        return torch.tensor([[self.start, *self.ids[:-1]]], device=device)

    def scores(self, logits: Tensor) -> Tensor:
        """Each word's log-probability, or its log-odds against its contrast. (B, n, V) logits -> (B, n)."""
        log_p = logits.log_softmax(-1)
        index = torch.tensor(self.ids, device=logits.device).expand(len(logits), -1)[..., None]
        score = log_p.gather(2, index)[..., 0]
        for k, other in enumerate(self.contrast):
            if other is not None:
                score[:, k] -= log_p[:, k, other]
        return score


@torch.inference_mode()
def removal(
    captioner: Captioner, features: Tensor, caption: Caption, fill: Fill = "zero", size: int = 1, batch: int = 64
) -> Tensor:
    """Drop of each word's score when cells of the feature map are taken out.

    Args:
        captioner: its decoder alone is run.
        features: (1, F, h, w), one image's feature map.
        caption: the words.
        fill: what a removed cell holds instead: ``"zero"``, or ``"mean"``, the map's mean over its cells.
        size: side of the square of cells that is taken out at once, around each cell (an odd number).
        batch: feature maps decoded at once; it bounds the memory.

    Returns:
        (n, h, w) in nats: log p(word | all cells) - log p(word | without these). Negative where a word gets likelier.
    """
    height, width = features.shape[2:]
    filling = features.mean((2, 3), keepdim=True) if fill == "mean" else torch.zeros_like(features[:, :, :1, :1])
    row = torch.arange(height, device=features.device)[:, None].expand(height, width)
    column = torch.arange(width, device=features.device).expand(height, width)
    down, across = ((at.flatten()[:, None, None] - at).abs() for at in (row, column))
    none = torch.zeros(1, height, width, dtype=torch.bool, device=features.device)
    gone = torch.cat([none, (down <= size // 2) & (across <= size // 2)])
    tokens = caption.inputs(features.device)
    said = [caption.scores(captioner.decode_without(features, part, filling, tokens)) for part in gone.split(batch)]
    whole, without = torch.cat(said).split([1, height * width])
    return (whole - without).T.reshape(-1, height, width)


@torch.inference_mode()
def image_effect(captioner: Captioner, features: Tensor, caption: Caption) -> Tensor:
    """(n,) nats: the drop of each word's log-probability when every cell holds the map's mean: what the decoder loses
    when it can no longer tell one place from another. A decoder that sees nothing but the mean loses nothing by that;
    for it every cell is set to zero instead."""
    said = captioner.decode(_and_blanks(features), caption.inputs(features.device).expand(3, -1))
    return _effects([caption], *said.split(1))[0][0]


def _and_blanks(features: Tensor) -> Tensor:
    """(3B, F, h, w): the maps, the same with their mean in every cell, and zeros. They are decoded in one batch: what a
    decoder costs is mostly the reading of its weights."""
    return torch.cat([features, features.mean((2, 3), keepdim=True).expand_as(features), torch.zeros_like(features)])


def _effects(captions: Sequence[Caption], said: Tensor, blank: Tensor, zero: Tensor) -> list[tuple[Tensor, bool]]:
    """Of each caption the effect of its image (`image_effect`), and whether the decoder sees nothing of the feature map
    but the mean of its cells, as Show and Tell does.

    Args:
        captions: B of them.
        said, blank, zero: (B, T, V) logits of each of `_and_blanks`, the captions fed and filled up.
    """
    result = []
    for caption, *logits in zip(captions, said, blank, zero, strict=True):
        plain = Caption(caption.start, caption.ids)
        whole, without, nothing = (plain.scores(each[None, : len(caption.ids)])[0] for each in logits)
        alike = torch.allclose(whole, without, atol=1e-4)
        result.append((whole - (nothing if alike else without), alike))
    return result


@dataclass(frozen=True)
class Flow:
    """What the engine found in the decoder; n words, a feature map of (F, h, w), all mass of a word 1.

    Attributes:
        features: (n, F, h, w) mass at the feature map.
        tokens: (n, n) mass on each token that was fed: the start, then the words.
        other: (n,) mass on biases and prior states.
        logits: (n, V) of the recorded pass.
        image_effect: (n,) nats, see the function of that name.
        reads_the_mean: whether the decoder sees nothing of the feature map but the mean of its cells, as Show and Tell
            does.
    """

    features: Tensor
    tokens: Tensor
    other: Tensor
    logits: Tensor
    image_effect: Tensor
    reads_the_mean: bool

    @property
    def image_share(self) -> Tensor:
        """(n,) the part of each word's mass that came from the image."""
        return self.features.sum((1, 2, 3))


def flow(
    captioner: Captioner,
    features: Tensor,
    caption: Caption,
    policy: Policy,
    target: Literal["logit", "alternatives"] = "logit",
) -> Flow:
    """Evidence from each word of one caption back through the decoder: `flows` of one."""
    return flows(captioner, features, [caption], policy, target)[0]


def flows(
    captioner: Captioner,
    features: Tensor,
    captions: Sequence[Caption],
    policy: Policy,
    target: Literal["logit", "alternatives"] = "logit",
) -> list[Flow]:
    """Evidence from each word back through the decoder, which is recorded once for all captions (once for each, where
    the policy has no budget of neurons or words do not start from their own logits).

    Args:
        captioner: its decoder is recorded.
        features: (B, F, h, w).
        captions: one of each feature map, none empty.
        policy: what the engine keeps.
        target: where mass starts: ``"logit"``, the word's own logit, or ``"alternatives"``, the logit minus the mean
            logit of the words that the model finds likely, sum_v p(v) logit(v). A word with a contrast starts from
            logit(word) - logit(contrast).

    Returns:
        what was found for each caption, in their order.

    Raises:
        UnsupportedOperation: evidence reached an operation of the decoder that has no rule.
        PolicyError: words start from a difference of logits, and those do not come out of a linear layer.
    """
    plain = target == "logit" and all(other is None for caption in captions for other in caption.contrast)
    batched = plain and policy.neurons is not None  # full tables would hold the other images' numbers for every word
    if len(captions) > 1 and not batched:
        pairs = zip(features.split(1), captions, strict=True)
        return [flow(captioner, own, caption, policy, target) for own, caption in pairs]
    counts = [len(caption.ids) for caption in captions]
    count, longest, size, device = sum(counts), max(counts), features[0].numel(), features.device
    # what follows a caption's end, the decoder can't know when it says the words before
    fed = [[c.start, *c.ids[:-1]] + [c.start] * (longest - len(c.ids)) for c in captions]
    tokens = torch.tensor(fed, device=device)
    image = torch.arange(len(captions), device=device).repeat_interleave(torch.tensor(counts, device=device))
    place = torch.cat([torch.arange(n, device=device) for n in counts])
    module = getattr(captioner, "model", None)
    with Trace(module if isinstance(module, torch.nn.Module) else None) as trace:
        seen, read = (_and_blanks(features), tokens.repeat(3, 1)) if batched else (features.clone(), tokens.clone())
        at_features = trace.slot(trace.watch("features", seen))
        at_tokens = trace.slot(trace.watch("tokens", read))
        logits = captioner.decode(seen, read)
        at_logits = trace.slot(logits)
    with torch.inference_mode():
        if not batched:
            logits = torch.cat([logits, captioner.decode(_and_blanks(features)[1:], tokens.expand(2, -1))])
        said, blank, zero = logits.split(len(captions))
        if plain:
            ids = torch.tensor([word for caption in captions for word in caption.ids], device=device)
            found = (
                at_logits,
                start(at_logits, (image * longest + place) * logits.shape[-1] + ids),
                logits.new_zeros(count),
            )
        else:
            found = _targets(at_logits, logits, captions[0], policy, target)
        few = replace(policy, full=0)  # all of a decoder is small, but no map
        account = walk(trace, [found[:2]], few, words=count)

        def own(slot: Slot, each: int) -> Tensor:
            """(words, each) mass on the part of a batched tensor that is the word's image's."""
            evidence = account.at(slot)
            return evidence.at(evidence.element - image[evidence.word] * each).dense(count, each)

        at_map = own(at_features, size).view(count, *features.shape[1:])
        fed_mass = own(at_tokens, longest)
        rest = account.rest([at_features, at_tokens]) + account.bias + found[2]
        effects = _effects(captions, said, blank, zero)
        parts = zip(at_map.split(counts), fed_mass.split(counts), rest.split(counts), said, effects, strict=True)
        return [
            Flow(at_map, fed_mass[:, : len(other)], other, own[: len(other)], *effect)
            for at_map, fed_mass, other, own, effect in parts
        ]


def _targets(
    slot: Slot, logits: Tensor, caption: Caption, policy: Policy, target: str
) -> tuple[Slot, Evidence, Tensor]:
    """Where mass of words against others starts: a tensor, evidence on it, and what had to go to the bias at once."""
    count = len(caption.ids)
    ids = torch.tensor(caption.ids, device=logits.device)
    contrasts = caption.contrast or (None,) * count
    # a difference of logits is one sum over the output layer's inputs, in which what both words share cancels
    producer = slot.value.producer
    if producer is None or producer.name != "linear":
        raise PolicyError(
            "the flow from a word against others needs logits that come straight out of a linear layer; use removal"
        )
    x, weight = producer.args[0], producer.args[1].read()
    against = logits[0].softmax(-1) if target == "alternatives" else torch.zeros_like(logits[0])
    own = target == "alternatives"
    rows = weight[ids] - (against @ weight if own else 0)
    for k, other in enumerate(contrasts):
        if other is not None:
            rows[k] = weight[ids[k]] - weight[other]
    index = torch.arange(count, device=logits.device)[:, None] * x.shape[-1] + torch.arange(
        x.shape[-1], device=logits.device
    )
    link = weighted(x, index, rows, torch.ones_like(rows[:, 0]), policy.linear_kept, policy)
    word = torch.arange(count, device=logits.device)[:, None].expand_as(link.element)
    evidence = Evidence(
        word.reshape(-1),
        link.element.reshape(-1),
        link.direction.expand_as(link.share).reshape(-1),
        link.share.reshape(-1),
    )
    return x, evidence.where(evidence.mass > 0), 1 - link.share.sum(1)


@torch.inference_mode()
def attention(captioner: Captioner, features: Tensor, caption: Caption) -> Tensor:
    """(n, h, w): the model's attention weights for each word.

    Raises:
        PolicyError: the captioner has none.
    """
    weights = captioner.attention(features, caption.inputs(features.device))
    if weights is None:
        raise PolicyError(f"captioner {captioner.name!r} has no attention weights; use method='removal' or 'flow'")
    return weights[0]


def normalised(maps: Tensor | Sequence[Tensor]) -> Tensor:
    """(n, ...) maps with negative parts cut, each scaled to sum 1 (all 0 where nothing is positive)."""
    table = maps if isinstance(maps, Tensor) else torch.stack(list(maps))
    table = table.clamp_min(0)
    total = table.flatten(1).sum(1).view(-1, *[1] * (table.dim() - 1))
    return torch.where(total > 0, table / total.clamp_min(torch.finfo(table.dtype).tiny), torch.zeros_like(table))


def removed(captioner: Captioner, features: Tensor, caption: Caption, found: Flow) -> Tensor:
    """(n, h, w), each word's sum 1: what removal with the map's mean says, or the flow of a word that no removal makes
    less likely."""
    away = normalised(removal(captioner, features, caption, "mean"))
    return torch.where(away.sum((1, 2), keepdim=True) == 0, normalised(found.features.sum(1)), away)


def believed(lost: Tensor, effect: Tensor | float = 0.0) -> Tensor:
    """How far removals can be believed, 0..1: D / (D + `DOUBT` + `ACCOUNTED` E).

    Where a captioner is sure of a word, a cell more or less changes nothing, and drops come to no more than their
    rounding. And where the cells beside a removed one make up for it, single removals say little of all that the image
    did.

    Args:
        lost: (n,) D in nats, what the removals of all cells, each by itself, take from a word together.
        effect: (n,) E in nats, what the whole image does to it (`image_effect`); negative ones count as 0.
    """
    against = effect.clamp_min(0) if isinstance(effect, Tensor) else effect
    return lost / (lost + DOUBT + ACCOUNTED * against)


def joined(captioner: Captioner, features: Tensor, caption: Caption, found: Flow) -> tuple[Tensor, Tensor, Tensor]:
    """Removal and flow together.

    Removal knows which word a cell matters to but misses what neighbouring cells make up for; the flow misses nothing
    but tells words less apart. So removal is taken as far as it is `believed`, and the flow for the rest.

    Returns:
        two (n, h, w) tables, each word's sum 1 (0 where the flow does not reach the feature map): the geometric mean
        of both maps, (removal^2 flow)^(1/3), where evidence starts; and the arithmetic mean, what either says of a
        place. And (n,) nats, what all removals took.
    """
    drops = removal(captioner, features, caption).clamp_min(0)
    lost = drops.sum((1, 2))
    share = believed(lost)[:, None, None]
    along = normalised(found.features.sum(1))
    away = share * normalised(drops) + (1 - share) * along
    return normalised((away**2 * along) ** (1 / 3)), (away + along) / 2, lost


@torch.inference_mode()
def multiscale(
    captioner: Captioner,
    pixels: Tensor,
    place: Tensor,
    caption: Caption,
    fill: Fill = "zero",
    trust: Tensor | None = None,
) -> Tensor:
    """What cells mean to words, averaged over the image at several sizes.

    A CNN's cells change with where its grid happens to fall; what is found at every size is more the word's. The image
    is the same, and so are the words: only the CNN sees it a little smaller and a little larger (`SCALES`).

    Args:
        captioner: its CNN takes images, and its decoder maps, of other sizes.
        pixels: (1, C, H, W), the CNN's input.
        place: (n, h, w), what is known at the image's own size, each word's sum 1 (or 0).
        caption: the n words.
        fill: what a removed cell holds instead (`removal`).
        trust: (n,) how far removal is `believed`, so the weight of the other sizes; None: 1.

    Returns:
        (n, `FINER` h, `FINER` w), each word's sum 1 (or 0): the mean over all sizes, each taken bilinearly.

    Raises:
        PolicyError: the CNN or the decoder refuses another size.
    """
    height, width = place.shape[1:]

    def finer(view: Tensor) -> Tensor:
        grid = (FINER * height, FINER * width)
        return normalised(interpolate(view[:, None].float(), grid, mode="bilinear", align_corners=False)[:, 0])

    believed = 1.0 if trust is None else trust[:, None, None]
    views = [finer(place)]
    for scale in SCALES:
        sides = [
            max(1, round(scale * cells)) * side // cells
            for cells, side in zip((height, width), pixels.shape[2:], strict=True)
        ]
        resized = interpolate(pixels.float(), sides, mode="bilinear", align_corners=False, antialias=True)
        try:
            found = removal(captioner, captioner.encode(resized.to(pixels.dtype)), caption, fill)
        except (RuntimeError, ValueError) as error:
            raise PolicyError(
                f"captioner {captioner.name!r}: it does not take its image at {sides[1]} x {sides[0]} pixels "
                f"({(str(error) or 'error').splitlines()[0]}); use method='joined'"
            ) from error
        views.append(believed * finer(normalised(found)))
    return normalised(torch.stack(views).sum(0)).to(place.dtype)
