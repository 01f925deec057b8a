"""How much of the evidence is followed: the dial between speed and completeness."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import PolicyError


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
            published, or ``"centre"``, the window's centre, as in the authors' released code.
        winner: take a convolution's winner in the paper's two steps (needs ``convolutions=1``).
        linear: contributors kept at fully connected layers where that differs from other sums (the paper keeps all
            agreeing contributors there but one summand in residual branches); "sums" follows ``sums``.
        mass: ``"share"`` splits a neuron's mass in proportion to the contributions; ``"set"`` splits it evenly among
            those kept, and every fixation weighs the same in the end (the paper works with sets).
        opposed: where the mass of a neuron goes that no contribution agrees with: ``"bias"``, or ``"input"`` for the
            least opposed input.
    """

    sums: int | None = 16
    convolutions: int | None = 4
    neurons: int | None = 300
    location: Literal["location", "centre"] = "location"
    winner: bool = False
    linear: int | Literal["sums"] | None = "sums"
    mass: Literal["share", "set"] = "share"
    opposed: Literal["bias", "input"] = "bias"

    def __post_init__(self) -> None:
        for name in ("sums", "convolutions", "neurons"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool) or number < 1):
                raise PolicyError(f"policy {name}={number!r}: give a whole number from 1 up, or None for all")
        for name, allowed in (
            ("location", ("location", "centre")),
            ("mass", ("share", "set")),
            ("opposed", ("bias", "input")),
        ):
            if getattr(self, name) not in allowed:
                raise PolicyError(f"policy {name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.winner and self.convolutions != 1:
            raise PolicyError("policy winner=True is the paper's rule for one kept contributor: set convolutions=1")

    @property
    def linear_kept(self) -> int | None:
        return self.sums if self.linear == "sums" else self.linear

    def dense(self, operation: str) -> bool:
        """Whether an operation keeps all contributors, so that it is better computed for all neurons at once."""
        if self.opposed == "input":
            return False
        return self.linear_kept is None if operation == "linear" else self.convolutions is None

    @property
    def everything(self) -> bool:
        """Whether nothing is left out anywhere, so that full tables pay."""
        return (
            self.neurons is None and self.convolutions is None and self.linear_kept is None and self.opposed == "bias"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def named(cls, policy: Policy | str | dict[str, Any]) -> Policy:
        """A policy by name (``default``, ``paper``, ``marginal``), or from its fields, or itself.

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
            return cls(**policy)
        if policy not in POLICIES:
            raise PolicyError(
                f"no policy is named {policy!r}; choose one of {', '.join(POLICIES)}, or give a captionfix.Policy"
            )
        return POLICIES[policy]


POLICIES = {
    "default": Policy(),
    "paper": Policy(sums=1, convolutions=1, neurons=None, winner=True, linear=None, mass="set"),
    "marginal": Policy(sums=None, convolutions=None, neurons=None),
}


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
        value, column = contributions.topk(keep, 1)
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
