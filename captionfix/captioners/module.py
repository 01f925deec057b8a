"""A captioner out of a module's own parts: something that encodes, something that decodes, words and preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from captionfix.captioners.captioner import Captioner, Prepared, Vocabulary
from captionfix.captioners.words import split
from captionfix.errors import CaptionError

Encode = Callable[[Tensor], Tensor]
Decode = Callable[[Tensor, Tensor], Tensor]


class ModuleCaptioner(Captioner):
    """Any PyTorch captioner, given as functions.

    Args:
        model: the module that the functions run; operations are named by its submodules. It must be in eval mode.
        encode: (B, C, H, W) pixels -> (B, F, h, w) feature map.
        decode: (B, F, h, w) features and (B, T) tokens, the start first -> (B, T, V) logits; position t scores the
            word that follows `tokens[:, : t + 1]`.
        vocabulary: words and special ids.
        preprocess: an RGB image -> `Prepared`.
        name: shown in results.
        max_words: longest caption.
        attention: (features, tokens) -> (B, T, h, w) weights with which each next word is predicted, if there are any.
        words: splits a caption into words as the captioner's training did; by default lower case without punctuation.
        length_power: of the beam search; see `decoding.generate`.
    """

    def __init__(
        self,
        model: nn.Module,
        encode: Encode,
        decode: Decode,
        vocabulary: Vocabulary,
        preprocess: Callable[[Image.Image], Prepared],
        *,
        name: str = "captioner",
        max_words: int = 20,
        attention: Callable[[Tensor, Tensor], Tensor] | None = None,
        words: Callable[[str], list[str]] = split,
        length_power: float = 1.0,
    ) -> None:
        self.model = model
        self.vocabulary = vocabulary
        self.name = name
        self.max_words = max_words
        self.length_power = length_power
        self._encode, self._decode, self._attention = encode, decode, attention
        self._prepare, self._words = preprocess, words

    @property
    def device(self) -> torch.device:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            return tensor.device
        return torch.device("cpu")

    def prepare(self, image: Image.Image) -> Prepared:
        return self._prepare(image.convert("RGB"))

    def encode(self, pixels: Tensor) -> Tensor:
        return self._encode(pixels)

    def decode(self, features: Tensor, tokens: Tensor) -> Tensor:
        return self._decode(features, tokens)

    def attention(self, features: Tensor, tokens: Tensor) -> Tensor | None:
        return None if self._attention is None else self._attention(features, tokens)

    def generate_from(
        self,
        features: Tensor,
        beams: int = 3,
        max_words: int | None = None,
        sample: bool = False,
        seed: int | None = None,
    ) -> list[tuple[int, ...]]:
        from captionfix.captioners import decoding

        longest = self.max_words if max_words is None else max_words
        model = decoding.Prefixes(self.decode, len(self.vocabulary), features.device)
        return decoding.generate(model, features, self.vocabulary, beams, longest, sample, seed, self.length_power)

    def tokenize(self, caption: str, unknown: Literal["error", "map"] = "error") -> tuple[int, ...]:
        words = self._words(caption)
        if not words:
            raise CaptionError(f"the caption {caption!r} has no words; give at least one")
        if len(words) > self.max_words:
            raise CaptionError(f"the caption has {len(words)} words, {self.name} takes at most {self.max_words}")
        v = self.vocabulary
        ids = [v.id(word) for word in words]
        known = [i if i is not None and i not in v.special else v.unknown for i in ids]
        missing = sorted({word for word, i in zip(words, known, strict=True) if i is None or i == v.unknown})
        if missing and (unknown == "error" or v.unknown is None):
            remedy = "use other words, or unknown='map'" if v.unknown is not None else "use other words"
            raise CaptionError(f"{self.name} does not know: {', '.join(missing)}; {remedy}")
        return tuple(i for i in known if i is not None)
