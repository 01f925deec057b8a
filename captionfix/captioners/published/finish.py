"""The last step of every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from captionfix.captioners.captioner import Prepared, Vocabulary
from captionfix.captioners.module import ModuleCaptioner
from captionfix.captioners.published.decoders import Attending, FirstToken
from captionfix.errors import CaptionerError


def finished(
    model: FirstToken | Attending,
    vocabulary: Vocabulary,
    preprocess: Callable[[Image.Image], Prepared],
    paths: list[Path],
    max_words: int = 20,
    **options: Any,
) -> ModuleCaptioner:
    """The captioner of a model, in eval mode.

    Args:
        model: encodes and decodes.
        vocabulary: its words.
        preprocess: an image -> the CNN's input.
        paths: the files that it is from.
        max_words: longest caption.
        options: see `ModuleCaptioner`.

    Raises:
        CaptionerError: weights are NaN or infinite.
    """
    bad = [name for name, tensor in named_tensors(model) if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise CaptionerError(
            f"{len(bad)} tensors in {', '.join(path.name for path in paths)} hold NaN or infinite weights, such as "
            f"those of {bad[0]}; the file is damaged or its training diverged"
        )
    attention = model.attention if isinstance(model, Attending) else None
    return ModuleCaptioner(
        model.eval(),
        model.encode,
        model.decode,
        vocabulary,
        preprocess,
        max_words=max_words,
        attention=attention,
        **options,
    )


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Parameters and buffers."""
    return [*model.named_parameters(), *model.named_buffers()]
