"""Captioners out of several trainings: the mean of their weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from captionfix.errors import CaptionerError
from captionfix.train_fit import check_empty
from captionfix.train_start import own_captioner


def average(folders: Sequence[str | Path], out: str | Path, *, half: bool = True) -> Path:
    """Writes the captioner whose weights are the mean of several ones' that were trained from one start.

    Trainings that differ in order and chance alone end in the same valley; their mean is often better than each, and
    costs no more to run (Wortsman et al. 2022, "Model soups").

    Args:
        folders: two of the project's own captioners or more, alike in everything but their weights.
        out: the folder to write; it must not exist or be empty.
        half: store the weights in 16 bits.

    Returns:
        `out`.

    Raises:
        CaptionerError: there are fewer than two, one is none of the project's own, or they are not alike.
        OutputError: `out` is not empty or can't be written.
    """
    import torch

    from captionfix.files import atomic_folder

    out = Path(out)
    if len(folders) < 2:
        raise CaptionerError("an average needs two captioners or more")
    check_empty(out)
    first, *others = (own_captioner(folder) for folder in folders)
    mean = {name: value.double() for name, value in first.model.state_dict().items()}
    for folder, other in zip(folders[1:], others, strict=True):
        weights = other.model.state_dict()
        if other.vocabulary != first.vocabulary or {n: v.shape for n, v in weights.items()} != {
            n: v.shape for n, v in mean.items()
        }:
            raise CaptionerError(f"{folder} has other words or another shape than {folders[0]}; they have no average")
        for name, value in weights.items():
            mean[name] += value.double()
    kinds = {name: value.dtype for name, value in first.model.state_dict().items()}
    with torch.no_grad():
        first.model.load_state_dict({name: (value / len(folders)).to(kinds[name]) for name, value in mean.items()})
    with atomic_folder(out) as folder:
        first.save(folder, half=half)
    return out
