"""A captioner of the project's own families, from a folder that `save` or training has written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from captionfix.captioners.captioner import Captioner, Prepared, Vocabulary
from captionfix.errors import CaptionError

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast

    from captionfix.captioners.models import CaptionerModel


class PretrainedCaptioner(Captioner):
    """A model with its tokeniser and image processor.

    Args:
        model: a `ShowTellModel` or `ShowAttendTellModel`; it is put into eval mode.
        tokenizer: a word-level tokeniser whose template adds start and end.
        processor: what makes an RGB image the CNN's input.
        name: shown in results.
        defaults: the captioner's own settings for `explain`.
    """

    def __init__(
        self,
        model: CaptionerModel,
        tokenizer: PreTrainedTokenizerFast,
        processor: BaseImageProcessor,
        name: str = "captioner",
        defaults: Mapping[str, object] | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor
        self.name = name
        self.max_words = int(model.config.max_words)
        self.defaults = dict(defaults or {})
        ids = tokenizer.get_vocab()
        self.vocabulary = Vocabulary(
            words=tuple(sorted(ids, key=lambda word: ids[word])),
            start=ids[str(tokenizer.bos_token)],
            end=ids[str(tokenizer.eos_token)],
            pad=ids.get(str(tokenizer.pad_token)),
            unknown=ids.get(str(tokenizer.unk_token)),
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    def prepare(self, image: Image.Image) -> Prepared:
        # As an array with its layout said: the processor would have to guess that of a picture one pixel high.
        array = np.array(image.convert("RGB"))
        pixels = self.processor(array, return_tensors="pt", input_data_format="channels_last")["pixel_values"][0]
        return Prepared(pixels.float(), image.size, (0.0, 0.0, float(image.width), float(image.height)))

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.encoder(pixels)

    def decode(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.decoder(features, tokens)

    def decode_without(
        self, features: torch.Tensor, gone: torch.Tensor, filling: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        return self.model.decoder.without(features, gone, filling, tokens)

    def attention(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        from captionfix.captioners.decoders import ShowAttendTellDecoder

        decoder = self.model.decoder
        return decoder.attention(features, tokens) if isinstance(decoder, ShowAttendTellDecoder) else None

    def generate_from(
        self,
        features: torch.Tensor,
        beams: int = 3,
        max_words: int | None = None,
        sample: bool = False,
        seed: int | None = None,
    ) -> list[tuple[int, ...]]:
        from captionfix.captioners.decoding import generate

        longest = self.max_words if max_words is None else max_words
        power = self.model.config.beam_length_power
        return generate(self.model, features, self.vocabulary, beams, longest, sample, seed, power)

    def tokenize(self, caption: str, unknown: Literal["error", "map"] = "error") -> tuple[int, ...]:
        from captionfix.captioners.words import split

        words = split(caption)
        # A person's "<end>" is the word "end", not the special one.
        encoded = self.tokenizer(caption, split_special_tokens=True)["input_ids"]
        ids = [i for i in encoded if i not in (self.vocabulary.start, self.vocabulary.end)]
        if not ids:
            raise CaptionError(f"the caption {caption!r} has no words; give at least one")
        if len(ids) > self.max_words:
            raise CaptionError(f"the caption has {len(ids)} words, {self.name} takes at most {self.max_words}")
        if unknown == "error" and self.vocabulary.unknown in ids:
            missing = sorted({word for word in words if self.vocabulary.id(word) is None})
            raise CaptionError(f"{self.name} does not know: {', '.join(missing)}; use other words, or unknown='map'")
        return tuple(ids)

    def save(self, folder: str | Path, half: bool = False) -> None:
        """Writes model, tokeniser and image processor into a folder that exists; `half` stores weights in 16 bits."""
        from captionfix.captioners.loading import write

        write(Path(folder), self.model, self.tokenizer, self.processor, half=half)
