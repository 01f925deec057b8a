"""Greedy, beam and sampled decoding, through transformers' generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from captionfix.captioners.captioner import Vocabulary
from captionfix.errors import CaptionError


@torch.no_grad()
def generate(
    model: Any,
    features: Tensor,
    vocabulary: Vocabulary,
    beams: int,
    max_words: int,
    sample: bool = False,
    seed: int | None = None,
    length_power: float = 1.0,
) -> list[tuple[int, ...]]:
    """Captions of (B, F, h, w) feature maps, as word ids without start and end; at least one word each.

    Args:
        model: a `transformers` model with generation that takes `features`.
        features: of the images.
        vocabulary: its special words, but the end, are never chosen.
        beams: width of the beam search; 1 is greedy.
        max_words: longest caption.
        sample: draw each word from the model's distribution instead.
        seed: of the drawing; None draws freshly.
        length_power: finished captions compare by log-probability divided by length to this power.

    Raises:
        CaptionError: `beams` or `max_words` is less than 1.
    """
    if beams < 1 or max_words < 1:
        raise CaptionError(f"beams ({beams}) and max_words ({max_words}) must be at least 1")
    v = vocabulary
    # Where one id both begins and ends captions, rows end at their first one after the start.
    config = GenerationConfig(
        max_new_tokens=max_words,
        min_new_tokens=1,
        num_beams=1 if sample else beams,
        do_sample=sample,
        **({"top_k": 0} if sample else {}),
        **({"length_penalty": length_power, "early_stopping": False} if beams > 1 and not sample else {}),
        bos_token_id=v.start,
        eos_token_id=v.end,
        pad_token_id=v.pad if v.pad is not None else v.end,
        suppress_tokens=sorted(v.special - {v.end}) or None,
    )
    start = torch.full((len(features), 1), v.start, dtype=torch.long, device=features.device)
    with torch.random.fork_rng(devices=[features.device] if features.is_cuda else [], enabled=sample):
        if sample:
            torch.manual_seed(seed) if seed is not None else torch.seed()
        rows = model.generate(start, features=features, generation_config=config)
    return [tuple(i for i in row if i not in v.special) for row in rows[:, 1:].tolist()]


class Prefixes(PreTrainedModel, GenerationMixin):
    """Makes a function that decodes whole prefixes a model that transformers can generate with.

    Args:
        decode: (B, F, h, w) features and (B, T) tokens -> (B, T, V) logits.
        size: V, words known.
        device: of the logits.
    """

    config_class = PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, decode: Callable[[Tensor, Tensor], Tensor], size: int, device: torch.device) -> None:
        config = PretrainedConfig()
        config.vocab_size, config.use_cache = size, False
        super().__init__(config)
        self._decode = decode
        self.place = torch.nn.Parameter(torch.empty(0, device=device), requires_grad=False)  # where generation looks

    def forward(self, input_ids: Tensor, features: Tensor, **_: Any) -> ModelOutput:
        """Logits of the word after each prefix, (B, 1, V)."""
        return ModelOutput(logits=self._decode(features, input_ids)[:, -1:])

    def prepare_inputs_for_generation(self, input_ids: Tensor, features: Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids, "features": features}

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
