"""Where a captioner ends to be a CNN: its last feature map, and running what comes before and after it alone.

Any module whose output every path from the image passes can stand in for its own recorded output: the rest of the
captioner then runs on feature maps that it is given, its code unchanged, and the CNN does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captionfix.captioners.calm import replaced
from captionfix.captioners.causality import BLIND, MIXED, NOT_FINITE, VARYING, Unfit
from captionfix.captioners.recording import Call, Run, key, planes_of, record
from captionfix.captioners.signatures import Reading
from captionfix.errors import CaptionerError
from captionfix.unravel import Slot, Trace, find_feature_map

REMEDY = (
    "name the module whose output is the CNN's last feature map, (B, F, h, w), with features='encoder.layer4' (the "
    "path of the module), or give encode= and decode="
)


class _Reached(BaseException):
    """The feature map has been computed; what would follow is not needed. No Exception: nobody's `except` is meant."""

    def __init__(self, features: Any) -> None:
        self.features = features


@dataclass(eq=False)
class Split:
    """A captioner in two parts, made of one.

    Attributes:
        run: the whole.
        module: whose output is the feature map.
        name: its path.
        nth: which of its calls.
        image_shape: (C, H, W) of the images it was found with.
        before: per module that runs before and is left out, what its calls returned.
        batch: how many images it was found with.
    """

    run: Run
    module: nn.Module
    name: str
    nth: int
    image_shape: tuple[int, ...]
    batch: int
    before: Mapping[nn.Module, list[Any]] = field(default_factory=dict)

    def encode(self, images: Tensor, captions: Tensor) -> Tensor:
        """(B, C, H, W) images -> (B, F, h, w). The captions are fed where a decoder runs before its CNN."""
        calls = 0

        def reach(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            output = original(*args, **kwargs)
            calls += 1
            if calls > self.nth:
                raise _Reached(output)
            return output

        try:
            with replaced({self.module: reach}):
                self.run(images, captions)
        except _Reached as reached:
            features: Tensor = reached.features
            return features
        raise CaptionerError(f"{self.name} did not run on images {tuple(images.shape)}, though it did before")

    def decode(self, features: Tensor, captions: Tensor) -> Any:
        """What the whole returns when its feature map is this one."""
        calls: dict[nn.Module, int] = dict.fromkeys([*self.before, self.module], 0)

        def stand_in(module: nn.Module) -> Callable[..., Any]:
            known = self.before.get(module, [])
            last = len(known) if self.before else self.nth

            def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                number = calls[module]
                calls[module] += 1
                if number < len(known):
                    return _empty(known[number], features, self.batch)
                if module is self.module and number == last:
                    return features.clone()  # the captioner may write on it
                return original(*args, **kwargs)

            return forward

        shape = (len(features), *self.image_shape)
        images = features.new_zeros(shape)  # nobody reads it, unless the CNN runs for want of a better way
        with replaced({module: stand_in(module) for module in calls}):
            return self.run(images, captions)

    def __str__(self) -> str:
        return f"feature map: output of {self.name}"


def find_split(
    run: Run,
    images: Tensor,
    captions: Tensor,
    options: Sequence[Reading],
    names: Mapping[int, str],
    named: str | nn.Module | None = None,
) -> Split:
    """Finds the feature map and checks that both parts together give what the whole gives.

    Args:
        run: the captioner.
        images: (B, C, H, W) to try it with.
        captions: (B, T) likewise.
        options: where its logits are, and in which layouts they may be.
        names: paths of modules, by their ids.
        named: the module whose output is the feature map, or its path; None: found.

    Raises:
        CaptionerError: there is no such module, or the logits depend on the image in other ways too.
        Unfit: what comes out is not finite, differs between two equal calls or with another batch, or does not depend
            on the image.
    """
    reading = options[0]
    calls, trace, image, target, recorded = record(run, images, captions, reading)
    batch, fed = captions.shape
    with torch.no_grad():
        whole = reading(run(images, captions), batch, fed)
    if not bool(torch.isfinite(whole).all()):
        raise Unfit(NOT_FINITE)
    if recorded.shape != whole.shape or not bool(((recorded - whole).abs() <= 1e-4 * whole.abs().amax()).all()):
        raise Unfit(VARYING)
    tried: list[str] = []
    for call in _candidates(calls, trace, image, target, names, named):
        name = names.get(id(call.module)) or type(call.module).__name__
        nth = call.nth
        for before in (_left_out(calls, call), {}):
            split = Split(run, call.module, name, nth, tuple(images.shape[1:]), batch, before)
            if _same(split, images, captions, options, whole):
                return split
        tried.append(name)
    if named is not None:
        raise CaptionerError(
            f"features={tried[0] if isinstance(named, nn.Module) else named!r}: with its output put in by hand the "
            "captioner says something else: the image reaches the words by other ways too. Name a module that all of "
            "them pass, or give encode= and decode="
        )
    _explain_failure(run, images, captions, options)
    if not calls:
        raise CaptionerError(f"no module ran, so no feature map can be found: {REMEDY}")
    raise CaptionerError(
        "no feature map found: no module's output is a (B, F, h, w) map with several positions that every path from "
        f"the image to the words passes{' and stands in for it' if tried else ''}; {REMEDY}"
    )


@torch.no_grad()
def _explain_failure(run: Run, images: Tensor, captions: Tensor, options: Sequence[Reading]) -> None:
    """Finds what else is wrong where no feature map is found."""
    batch, fed = captions.shape
    other = [*range(batch), 0]
    once, blank = run(images, captions), run(torch.zeros_like(images), captions)
    if _close(options[0](blank, batch, fed), options[0](once, batch, fed)):
        raise Unfit(BLIND)
    more = run(images[other], captions[other])
    if not any(_close(reading(more, batch + 1, fed), reading(once, batch, fed)[other]) for reading in options):
        raise Unfit(MIXED.format("image and words"))


def _close(part: Tensor, wanted: Tensor) -> bool:
    tolerance = 1e-5 * float(wanted.abs().amax().clamp_min(1e-6))
    return part.shape == wanted.shape and bool(((part - wanted).abs() <= tolerance).all())


@torch.no_grad()
def _same(split: Split, images: Tensor, captions: Tensor, options: Sequence[Reading], whole: Tensor) -> bool:
    """Whether decoding the encoded images gives what the whole gave, also in another batch."""
    batch, fed = captions.shape
    other = [*range(batch), 0]
    try:
        features = split.encode(images, captions)
        once = split.decode(features, captions)
        more = split.decode(features[other], captions[other])
        return _close(options[0](once, batch, fed), whole) and any(
            _close(reading(more, batch + 1, fed), reading(once, batch, fed)[other]) for reading in options
        )
    except Exception:
        return False  # the next way is slower and surer


def _candidates(
    calls: list[Call],
    trace: Trace,
    image: Slot,
    target: Slot,
    names: Mapping[int, str],
    named: str | nn.Module | None,
) -> Iterator[Call]:
    if named is not None:
        yield _by_name(calls, names, named)
        return
    if not target.value.variable:
        raise Unfit(BLIND)
    outermost: dict[tuple[Any, ...], Call] = {}
    for call in calls:
        if call.key is not None:
            outermost.setdefault(call.key, call)  # calls are in the order of their beginnings
    planes = planes_of(trace, image)
    rejected: set[tuple[Any, ...]] = set()
    while True:
        slot = find_feature_map(
            trace,
            image,
            target,
            lambda s: (s.value, s.shape) in planes and key(s) in outermost and key(s) not in rejected,
        )
        if slot is None:
            return
        rejected.add(key(slot))
        yield outermost[key(slot)]


def _by_name(calls: list[Call], names: Mapping[int, str], named: str | nn.Module) -> Call:
    ran = [c for c in calls if c.module is named or (isinstance(named, str) and names.get(id(c.module)) == named)]
    if not ran:
        maps = [names.get(id(c.module)) for c in calls if len(c.shape) == 4 and c.shape[2] * c.shape[3] > 1]
        shown = ", ".join(dict.fromkeys(name for name in maps[-6:] if name))
        known = isinstance(named, nn.Module) or named in names.values()
        raise CaptionerError(
            f"features={named if isinstance(named, str) else type(named).__name__!r}: "
            f"{'that module does not run' if known else 'there is no such module'}; the last that give maps are {shown}"
        )
    if len(ran[-1].shape) != 4:
        what = f"of shape {ran[-1].shape}" if ran[-1].shape else "that is no tensor"
        raise CaptionerError(
            f"features={names.get(id(ran[-1].module), '')!r}: its output must be a (B, F, h, w) map, not one {what}"
        )
    return ran[-1]


def _left_out(calls: list[Call], feature: Call) -> dict[nn.Module, list[Any]]:
    """The outermost calls that end before the feature map's begins and depend on the image: they feed only it."""
    result: dict[nn.Module, list[Any]] = {}
    out: set[Call] = set()
    for call in calls:
        if call.parent in out:
            out.add(call)
        elif -1 < call.end < feature.begin and call.depends and call.template is not None:
            out.add(call)
            result.setdefault(call.module, []).append(call.template)
    result.setdefault(feature.module, [])
    return result


def _empty(template: Any, features: Tensor, batch: int) -> Any:
    """Zeros as a template says, for the batch of the features."""
    if isinstance(template, dict):
        return {key: _empty(value, features, batch) for key, value in template.items()}
    if isinstance(template, tuple) and len(template) == 2 and isinstance(template[1], torch.dtype):
        shape, dtype = template
        if shape and shape[0] % batch == 0:
            shape = (shape[0] // batch * len(features), *shape[1:])
        return torch.zeros(shape, dtype=dtype, device=features.device)
    return type(template)(_empty(item, features, batch) for item in template)
