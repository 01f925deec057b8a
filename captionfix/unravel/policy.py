"""How much of the evidence is followed: the dial between speed and completeness."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import PolicyError

if TYPE_CHECKING:
    from .trace import Operation, Slot


@dataclass(frozen=True)
class Policy:
    """What a rule keeps.

    Attributes:
        sums: contributors kept at sums (linear, add, mean, weighted sums, recurrent cells); None keeps all.
        convolutions: contributors kept at convolutions, out of all (channel, location) pairs of the window; None keeps
            all.
        neurons: how many neurons a word may hold in one layer, the heaviest, renormalised; None sets no limit.
        location: what a convolution with one kept contributor (the paper's winner: the channel with the largest summed
            contribution, then a location inside it) takes as location: ``"location"``, the largest contribution, as
            published; ``"centre"``, the window's centre; ``"released"``, the input position stride * output position,
            as in the authors' released code: the centre too where the padding is half the window, its first corner
            where there is none.
        winner: take a convolution's winner in the paper's two steps (needs ``convolutions=1``).
        linear: contributors kept at fully connected layers where that differs from other sums (the paper keeps all
            agreeing contributors there but one summand in residual branches); "sums" follows ``sums``.
        flattened: the same where a fully connected layer reads a flattened feature map (the released code keeps one);
            "linear" follows ``linear``.
        mass: ``"share"`` splits a neuron's mass in proportion to the contributions; ``"set"`` splits it evenly among
            those kept, and every fixation weighs the same in the end (the paper works with sets).
        opposed: where the mass of a neuron goes that no contribution agrees with: ``"bias"``, or ``"input"`` for the
            least opposed input.
        full: from the targets back to the first map of more positions (height x width) than this, everything is kept,
            in full tables; only from there on does it count what is kept. Deep maps are small, and there the many small
            contributions tell words apart; near the image they are many and alike. 0: nowhere.
        fallback: what to do at an operation without a rule: ``"error"`` says so, ``"gradient"`` follows the operation's
            local gradient times its input (slow: one derivative a neuron).
    """

    sums: int | None = 16
    convolutions: int | None = 4
    neurons: int | None = 200
    location: Literal["location", "centre", "released"] = "location"
    winner: bool = False
    linear: int | Literal["sums"] | None = "sums"
    flattened: int | Literal["linear"] | None = "linear"
    mass: Literal["share", "set"] = "share"
    opposed: Literal["bias", "input"] = "bias"
    full: int = 0
    fallback: Literal["error", "gradient"] = "error"

    def __post_init__(self) -> None:
        for name in ("sums", "convolutions", "neurons"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise PolicyError(f"policy {name}={number!r}: give a whole number from 1 up, or None for all")
        if not isinstance(self.full, int) or isinstance(self.full, bool) or self.full < 0:
            raise PolicyError(f"policy full={self.full!r}: give a whole number from 0 up")
        for name, allowed in (
            ("location", ("location", "centre", "released")),
            ("mass", ("share", "set")),
            ("opposed", ("bias", "input")),
            ("fallback", ("error", "gradient")),
        ):
            if getattr(self, name) not in allowed:
                raise PolicyError(f"policy {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.winner and self.convolutions != 1:
            raise PolicyError("policy winner=True is the paper's rule for one kept contributor: set convolutions=1")

    @property
    def linear_kept(self) -> int | None:
        return self.sums if self.linear == "sums" else self.linear

    def linear_keeps(self, operation: Operation) -> int | None:
        """Contributors that a fully connected layer keeps."""
        if self.flattened == "linear" or not _reads_map(operation.args[0]):
            return self.linear_kept
        return self.flattened

    def dense(self, operation: Operation) -> bool:
        """Whether a convolution or fully connected layer keeps all contributors, so that it is better computed for all
        neurons at once.
        """
        if self.opposed == "input" or not operation.args[0].value.variable:
            return False
        return (self.linear_keeps(operation) if operation.name == "linear" else self.convolutions) is None

    @property
    def plain(self) -> bool:
        """Whether what is kept of a sum is its largest agreeing contributions, which share the mass in proportion."""
        return not self.winner and self.mass == "share" and self.opposed == "bias" and self.location == "location"

    @property
    def everything(self) -> bool:
        """Whether nothing is left out anywhere, so that full tables pay."""
        return (
            self.neurons is None
            and self.convolutions is None
            and self.linear_kept is None
            and self.flattened in ("linear", None)
            and self.opposed == "bias"
        )

    @property
    def tables(self) -> bool:
        """Whether full tables are held from the targets on, of some maps or of all."""
        return self.full > 0 or self.everything

    @property
    def unlimited(self) -> Policy:
        """The same with everything kept."""
        return replace(
            self, sums=None, convolutions=None, neurons=None, linear="sums", flattened="linear", winner=False
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def named(cls, policy: Policy | str | dict[str, Any]) -> Policy:
        """A policy by name (``default``, ``fast``, ``thorough``, ``paper``, ``released``, ``marginal``), or the
        default with some fields changed, or itself.

        Raises:
            PolicyError: for a name or a field that does not exist.
        """
        if isinstance(policy, Policy):
            return policy
        if isinstance(policy, dict):
            unknown = set(policy) - set(cls.__dataclass_fields__)
            if unknown:
                raise PolicyError(
                    f"policy has no {', '.join(sorted(unknown))}; it has {', '.join(cls.__dataclass_fields__)}"
                )
            return replace(POLICIES["default"], **policy)
        if policy not in POLICIES:
            raise PolicyError(
                f"no policy is named {policy!r}; choose one of {', '.join(POLICIES)}, or give a captionfix.Policy"
            )
        return POLICIES[policy]


POLICIES = {
    "default": Policy(),
    "fast": Policy(neurons=100),
    "thorough": Policy(neurons=1000, full=256),
    "paper": Policy(sums=1, convolutions=1, neurons=None, winner=True, linear=None, mass="set"),
    "released": Policy(
        sums=1,
        convolutions=1,
        neurons=None,
        location="released",
        winner=True,
        linear=None,
        flattened=1,
        mass="set",
    ),
    "marginal": Policy(sums=None, convolutions=None, neurons=None),
}


def _reads_map(slot: Slot) -> bool:
    """Whether a fully connected layer's input is a feature map of several positions, through any number of views."""
    producer = slot.value.producer
    made = [s for s in producer.outputs if s is not None and s.value is slot.value] if producer is not None else []
    return bool(made) and len(made[0].shape) > 2 and made[0].numel > made[0].shape[0] * made[0].shape[1]


def split(contributions: Tensor, keep: int | None, policy: Policy) -> tuple[Tensor, Tensor]:
    """How a neuron's mass splits over the contributions that agree with it.

    Args:
        contributions: (D, K), already times the neuron's direction: what agrees is positive.
        keep: how many are kept, the largest.

    Returns:
        columns (D, k) of those kept and their shares (D, k); a row without any agreement has shares 0.
    """
    if keep is None or keep >= contributions.shape[1]:
        value, column = (
            contributions,
            torch.arange(contributions.shape[1], device=contributions.device).expand_as(contributions),
        )
    else:
        value, column = largest(contributions, keep)
    if policy.opposed == "input":  # the least opposed stands in where nothing agrees
        if value is contributions:
            value, column = contributions.sort(dim=1, descending=True)
        none = value[:, :1] <= 0
        value = torch.cat([torch.where(none, torch.ones_like(value[:, :1]), value[:, :1]), value[:, 1:]], 1)
    value = value.clamp_min(0)
    if policy.mass == "set":
        value = (value > 0).to(value.dtype)
    total = value.sum(1, keepdim=True)
    return column, torch.where(
        total > 0, value / total.clamp_min(torch.finfo(value.dtype).tiny), torch.zeros_like(value)
    )


def largest(values: Tensor, keep: int, block: int = 16) -> tuple[Tensor, Tensor]:
    """``values.topk(keep, 1)`` of (D, K): the largest lie in the blocks with the largest maxima, and a maximum is far
    cheaper than a selection.
    """
    columns = values.shape[1]
    if columns < 4 * keep * block:
        value, column = values.topk(keep, 1)
        return value, column
    blocks, rest = divmod(columns, block)
    best = values[:, : columns - rest].view(-1, block, blocks).amax(1).topk(keep, 1).indices
    steps = torch.arange(block, device=values.device) * blocks
    candidates = (best[:, :, None] + steps).flatten(1)
    if rest:
        tail = torch.arange(columns - rest, columns, device=values.device).expand(len(values), rest)
        candidates = torch.cat([candidates, tail], 1)
    value, place = values.gather(1, candidates).topk(keep, 1)
    return value, candidates.gather(1, place)
