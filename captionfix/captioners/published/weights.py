"""Modules out of the tensors of a file: whatever size they have there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from captionfix.errors import CaptionerError

Module = TypeVar("Module", bound=nn.Module)


@dataclass(eq=False)
class Weights:
    """The tensors of one file; what has been made a module of is remembered.

    Attributes:
        path: the file.
        tensors: by name.
        settings: plain numbers that lay beside the tensors in a pickled module.
        taken: names that were asked for.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, int] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def take(self, name: str) -> Tensor:
        """A tensor by its name, floating numbers as float32."""
        if name not in self.tensors:
            raise CaptionerError(f"{self.path} has no {name!r}, which a file of this kind has")
        self.taken.add(name)
        tensor = self.tensors[name]
        return tensor.float() if tensor.is_floating_point() else tensor

    def take_under(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose names begin so, by the rest of their names."""
        return {name[len(prefix) :]: self.take(name) for name in self.tensors if name.startswith(prefix)}

    def refuse_rest(self, allowed: tuple[str, ...] = ()) -> None:
        """Raises CaptionerError where tensors are left that nobody asked for: another architecture."""
        rest = [n for n in self.tensors if n not in self.taken and not n.startswith(allowed or ("\0",))]
        if rest:
            raise CaptionerError(
                f"{self.path} has {len(rest)} tensors of parts that this kind of captioner has not, "
                f"such as {rest[0]!r}: "
                "it is another architecture; wrap its own module with captionfix.wrap"
            )


def filled(make: Callable[[], Module], state: dict[str, Tensor], path: Path) -> Module:
    """A module with these tensors as its parameters.

    Raises:
        CaptionerError: they do not fit.
    """
    try:
        with torch.device("meta"):  # nothing is drawn or allocated
            module = make()
        module.load_state_dict(state, assign=True)
    except KeyError as error:
        raise CaptionerError(f"the tensors in {path} do not fit together: there is no {error}") from error
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        lines = str(error).splitlines()
        raise CaptionerError(
            f"the tensors in {path} do not fit together: {lines[min(1, len(lines) - 1)].strip()}"
        ) from error
    return module


def linear(weights: Weights, name: str) -> nn.Linear:
    """The linear layer of that name."""
    weight = weights.take(f"{name}.weight")
    if weight.dim() != 2:
        raise CaptionerError(f"{weights.path}: {name}.weight has {weight.dim()} dimensions instead of 2")
    bias = f"{name}.bias" in weights.tensors
    state = {"weight": weight, **({"bias": weights.take(f"{name}.bias")} if bias else {})}
    return filled(lambda: nn.Linear(weight.shape[1], weight.shape[0], bias=bias), state, weights.path)


def embedding(weights: Weights, name: str) -> nn.Embedding:
    """The embedding of that name."""
    weight = weights.take(f"{name}.weight")
    if weight.dim() != 2:
        raise CaptionerError(f"{weights.path}: {name}.weight has {weight.dim()} dimensions instead of 2")
    return filled(lambda: nn.Embedding(weight.shape[0], weight.shape[1]), {"weight": weight}, weights.path)


def norm(weights: Weights, name: str) -> nn.BatchNorm1d:
    """The one-dimensional batch norm of that name."""
    state = weights.take_under(f"{name}.")
    return filled(lambda: nn.BatchNorm1d(len(state["weight"])), state, weights.path)


def lstm(weights: Weights, name: str) -> nn.LSTM:
    """The (stacked) LSTM of that name, batch first; without biases where the file has none."""
    state = weights.take_under(f"{name}.")
    layers = sum(key.startswith("weight_ih_l") for key in state)
    if {key for key in state if key.startswith("weight")} != {
        f"weight_{k}_l{i}" for k in ("ih", "hh") for i in range(layers)
    }:
        raise CaptionerError(f"{weights.path}: {name} is not a plain LSTM (it has {', '.join(sorted(state))})")
    inputs, hidden = state["weight_ih_l0"].shape[1], state["weight_hh_l0"].shape[1]
    if len(state["weight_ih_l0"]) != 4 * hidden:
        raise CaptionerError(
            f"{weights.path}: {name} has {len(state['weight_ih_l0'])} rows for {hidden} units, an LSTM has 4 for each; "
            "wrap its own module with captionfix.wrap"
        )
    bias = "bias_ih_l0" in state
    return filled(lambda: nn.LSTM(inputs, hidden, layers, batch_first=True, bias=bias), state, weights.path)


def cell(weights: Weights, name: str) -> nn.LSTMCell:
    """The LSTM cell of that name."""
    state = weights.take_under(f"{name}.")
    if "weight_ih" not in state:
        raise CaptionerError(f"{weights.path} has no {name + '.weight_ih'!r}, which a file of this kind has")
    rows, inputs = state["weight_ih"].shape
    return filled(lambda: nn.LSTMCell(inputs, rows // 4, bias="bias_ih" in state), state, weights.path)


def same(a: int, b: int, what_a: str, what_b: str) -> None:
    """Raises CaptionerError with both numbers where two sizes that must agree do not."""
    if a != b:
        raise CaptionerError(f"{what_a} {a}, {what_b} {b}: they are not of one training")
