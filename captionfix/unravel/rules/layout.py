"""Operations that only move numbers: one rule for all. The same operation runs on element numbers, and its result says
where each element came from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..policy import Policy
from ..registry import Link, register, register_tables
from ..trace import Operation, Slot
from .common import coordinates, ravel, same
from .pointwise import MASKS

# Which argument numbers are the signals; the others (indices, masks, sizes) are given to the operation as they were.
_SIGNALS: dict[str, Sequence[int]] = {
    **dict.fromkeys(["cat", "stack", "hstack", "vstack", "concat", "concatenate", "block_diag"], (0,)),
    **dict.fromkeys(
        [
            "view",
            "reshape",
            "_reshape_copy",
            "_unsafe_view",
            "view_copy",
            "flatten",
            "transpose",
            "t",
            "permute",
            "movedim",
            "swapaxes",
            "select",
            "slice",
            "narrow",
            "split",
            "split_with_sizes",
            "chunk",
            "tensor_split",
            "unbind",
            "squeeze",
            "unsqueeze",
            "expand",
            "expand_as",
            "broadcast_to",
            "repeat",
            "repeat_interleave",
            "tile",
            "flip",
            "roll",
            "rot90",
            "contiguous",
            "clone",
            "alias",
            "index_select",
            "index",
            "gather",
            "take",
            "take_along_dim",
            "masked_select",
            "pixel_shuffle",
            "pixel_unshuffle",
            "channel_shuffle",
            "diagonal",
            "tril",
            "triu",
            "unfold",
            "im2col",
            "_pack_padded_sequence",
            "_pad_packed_sequence",
            "upsample_nearest1d",
            "upsample_nearest2d",
            "upsample_nearest3d",
            "pad",
            "constant_pad_nd",
            "reflection_pad2d",
            "replication_pad2d",
            "masked_fill",
            "fill",
            "zero",
            "lift_fresh",
            "detach",
            "_unsafe_index",
            "as_strided",
            "new_empty_strided",
        ],
        (0,),
    ),
    "where": (1, 2),
    "copy": (1,),
    "index_put": (0, 2),
    "_index_put_impl": (0, 2),
    "masked_scatter": (0, 2),
    "index_copy": (0, 3),
    "scatter": (0, 3),
    "slice_scatter": (0, 1),
    "select_scatter": (0, 1),
    "index_fill": (0,),
}


def moved(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    slots, tables = _origin(op)
    origin = tables[output].reshape(-1)[neurons]
    links, first = [], 0
    for slot in slots:
        mine = (origin >= first) & (origin < first + slot.numel)
        if slot.value.variable and bool(mine.any()):
            links.append(
                Link(
                    slot,
                    torch.where(mine, origin - first, 0)[:, None],
                    mine.to(direction.dtype)[:, None],
                    direction[:, None],
                )
            )
        first += slot.numel
    return links


for _name, _signals in _SIGNALS.items():
    if _name not in ("scatter", "index_put", "_index_put_impl"):
        register(_name, reads=[i for i in range(10) if i not in _signals])(moved)


@register("cat", "concat", "concatenate", reads=False)
def concatenation(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """As `moved`, without a table of all elements."""
    slots, out = op.args[0], op.outputs[output]
    assert out is not None
    if any(len(slot.shape) != len(out.shape) for slot in slots):  # an empty one may have any shape
        return moved(op, output, neurons, direction, policy)
    axis = op.argument(1, "dim", 0) % len(out.shape)
    inner = math.prod(out.shape[axis + 1 :])
    row, at = neurons.div(out.shape[axis] * inner, rounding_mode="floor"), neurons.remainder(out.shape[axis] * inner)
    links, first = [], 0
    for slot in slots:
        width = slot.shape[axis] * inner
        if slot.value.variable:
            mine = (at >= first) & (at < first + width)
            element = torch.where(mine, row * width + (at - first), 0)
            links.append(Link(slot, element[:, None], mine.to(direction.dtype)[:, None], direction[:, None]))
        first += width
    return links


@register_tables("cat")
def parted(
    op: Operation, output: int, mass: Tensor, direction: int, policy: Policy
) -> list[tuple[Slot, int, Tensor]] | None:
    slots, out = op.args[0], op.outputs[output]
    assert out is not None
    if any(len(slot.shape) != len(out.shape) for slot in slots):  # an empty one may have any shape
        return None
    axis = op.argument(1, "dim", 0) % len(out.shape)
    parts = mass.view(-1, *out.shape).split([slot.shape[axis] for slot in slots], axis + 1)
    pairs = zip(slots, parts, strict=True)
    return [(slot, direction, part.flatten(1)) for slot, part in pairs if slot.value.variable]


def _adds_nothing(op: Operation) -> bool:
    """Whether a padding has no width: some models pad before every convolution, needed or not."""
    return not any(op.argument(1, "pad"))


@register("pad", "constant_pad_nd", reads=range(1, 10), pointwise=_adds_nothing)
def padded(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """A constant around a tensor; what is no constant is replayed as every layout operation is."""
    if op.name == "pad" and op.argument(2, "mode", "constant") != "constant":
        return moved(op, output, neurons, direction, policy)
    slot, out = op.args[0], op.outputs[output]
    assert out is not None
    if _adds_nothing(op):
        return same(slot, neurons, direction)
    widths = op.argument(1, "pad")
    before = widths[::2][::-1]  # the last dimension comes first
    lead = len(slot.shape) - len(before)  # dimensions that stay as they are count as one
    shapes = [(math.prod(shape[:lead]), *shape[lead:]) for shape in (out.shape, slot.shape)]
    first, *where = coordinates(neurons, shapes[0])
    where = [at - low if low else at for at, low in zip(where, before, strict=True)]
    inside = torch.ones_like(neurons, dtype=torch.bool)
    for at, extent in zip(where, slot.shape[lead:], strict=True):
        inside &= (at >= 0) & (at < extent)
    element = torch.where(inside, ravel([first, *where], shapes[1]), 0)
    return [Link(slot, element[:, None], inside.to(direction.dtype)[:, None], direction[:, None])]


@register_tables("pad", "constant_pad_nd")
def unpadded(
    op: Operation, output: int, mass: Tensor, direction: int, policy: Policy
) -> list[tuple[Slot, int, Tensor]] | None:
    out = op.outputs[output]
    assert out is not None
    if op.name == "pad" and op.argument(2, "mode", "constant") != "constant":
        return None
    back = torch.nn.functional.pad(mass.view(-1, *out.shape), [-width for width in op.argument(1, "pad")])
    return [(op.args[0], direction, back.flatten(1))]


def _origin(op: Operation) -> tuple[list[Slot], list[Tensor]]:
    """The signals, and for every output a tensor of its shape that says which element of which signal (numbered
    through) it is; -1 where it is a constant."""
    if "origin" in op.memo:
        found: tuple[list[Slot], list[Tensor]] = op.memo["origin"]
        return found
    slots: list[Slot] = []
    count = 0

    def numbers(argument: Any) -> Any:
        nonlocal count
        if isinstance(argument, Slot):
            slots.append(argument)
            count += argument.numel
            return torch.arange(count - argument.numel, count, device=argument.value.device).view(argument.shape)
        if isinstance(argument, (list, tuple)):
            return [numbers(item) for item in argument]
        return -1 if isinstance(argument, (int, float)) and not isinstance(argument, bool) else argument

    def plain(argument: Any) -> Any:
        if isinstance(argument, Slot):
            return argument.read()
        return [plain(item) for item in argument] if isinstance(argument, (list, tuple)) else argument

    signals = _SIGNALS[op.name]
    args = [numbers(a) if i in signals else plain(a) for i, a in enumerate(op.args)]
    kwargs = {k: plain(v) for k, v in op.kwargs.items()}
    for position, name in _FILL.get(op.name, ()):
        if position < len(args):
            args[position] = torch.tensor(-1) if isinstance(op.args[position], Slot) else -1
        elif op.name != "pad" or op.argument(2, "mode", "constant") == "constant":
            kwargs[name] = -1
    if op.name == "copy":  # what is written over does not matter, only its shape
        args[0] = torch.empty(op.args[0].shape, dtype=torch.long, device=args[1].device)
    if op.name in ("fill", "zero"):
        tables = [torch.full(op.args[0].shape, -1)]
    elif op.name == "copy":
        tables = [args[1].expand(op.args[0].shape)]
    elif op.name in ("tril", "triu"):
        tables = [op.func(args[0] + 1, *args[1:], **kwargs) - 1]
    elif op.name.startswith("upsample_nearest") or op.name in ("reflection_pad2d", "replication_pad2d", "im2col"):
        # numbered from 1, so that the zeros that im2col pads with are told from element 0
        tables = [op.func(args[0].double() + 1, *args[1:], **kwargs).long() - 1]
    elif op.name == "pad" and op.argument(2, "mode", "constant") != "constant":
        tables = [op.func(args[0].double(), *args[1:], **kwargs).long()]
    else:
        result = op.func(*args, **kwargs)
        tables = list(result) if isinstance(result, (tuple, list)) else [result]
    op.memo["origin"] = slots, tables
    return slots, tables


# arguments that hold a constant to be written
_FILL = {
    "pad": ((3, "value"),),
    "constant_pad_nd": ((2, "value"),),
    "masked_fill": ((2, "value"),),
    "index_fill": ((3, "value"),),
    "_pad_packed_sequence": ((3, "padding_value"),),
}


@register("sort", "topk", "kthvalue", "mode")
def ordered(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """The element that was chosen, by the operation's own indices."""
    slot = op.args[0]
    result = op.call(lambda s: s.read())
    axis = op.argument(1 if op.name in ("sort", "mode") else 2, "dim", -1)
    numbers = torch.arange(slot.numel, device=neurons.device).view(slot.shape)
    if result[1].dim() == numbers.dim():
        origin = numbers.gather(axis, result[1])
    else:
        origin = numbers.gather(axis, result[1].unsqueeze(axis)).squeeze(axis)
    return [Link(slot, origin.reshape(-1)[neurons][:, None], torch.ones_like(direction)[:, None], direction[:, None])]


@register("embedding", reads=False)
def embedding(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """A leaf: all evidence on a word's vector is credited to the token that was looked up."""
    tokens = op.argument(1, "indices")
    out = op.outputs[output]
    assert out is not None
    if not tokens.value.variable:
        return []
    index = neurons.div(out.shape[-1], rounding_mode="floor")
    return [Link(tokens, index[:, None], torch.ones_like(direction)[:, None], direction[:, None])]


@register(
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
    "upsample_linear1d",
)
def resampled(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """A weighted sum of few pixels; its weights are read off the operation's own derivative, one plane for all
    channels.
    """
    from .sums import weighted

    slot, out = op.args[0], op.outputs[output]
    assert out is not None
    spatial = slot.shape[2:]
    area, out_area = 1, 1
    for extent, out_extent in zip(spatial, out.shape[2:], strict=True):
        area, out_area = area * extent, out_area * out_extent
    plane, place = neurons.div(out_area, rounding_mode="floor"), neurons.remainder(out_area)
    places, inverse = torch.unique(place, return_inverse=True)
    rows = _resampling_rows(op, spatial, places, direction.dtype)
    k = min(16, area)
    _, taps = rows.abs().topk(k, 1)
    taps_of = taps[inverse]
    return [
        weighted(
            slot, plane[:, None] * area + taps_of, rows[inverse].gather(1, taps_of), direction, policy.sums, policy
        )
    ]


def _resampling_rows(op: Operation, spatial: Sequence[int], places: Tensor, dtype: torch.dtype) -> Tensor:
    """(places, area): how much each input position weighs in some output positions."""
    area = 1
    for extent in spatial:
        area *= extent
    basis = torch.eye(area, dtype=dtype, device=places.device).view(area, 1, *spatial)
    response = torch.cat([op.func(b, *op.args[1:], **op.kwargs).flatten(1) for b in basis.split(256)])
    return response[:, places].t().contiguous()


@register(
    "one_hot",
    "arange",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
    "new_zeros",
    "new_ones",
    "new_full",
    "argmax",
    "argmin",
    "argsort",
    *MASKS,
    reads=False,
)
def constant(op: Operation, output: int, neurons: Tensor, direction: Tensor, policy: Policy) -> list[Link]:
    """What does not change where the input changes a little."""
    return []
