"""What a captioner is: an image becomes a feature map, the map and some words the logits of the next word."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Prepared:
    """One image, ready for the captioner.

    Attributes:
        pixels: (C, H, W) float32, the CNN's input.
        size: width and height of the original image, in pixels.
        window: x0, y0, x1, y1: the part of the original that the input shows, in original pixels.
    """

    pixels: torch.Tensor
    size: tuple[int, int]
    window: tuple[float, float, float, float]


@dataclass(frozen=True)
class Vocabulary:
    """The words of a captioner; a word's place in `words` is its id.

    Attributes:
        words: id -> word, special words among them.
        start: id of the word that begins every caption.
        end: id of the word that ends every caption.
        pad: id that fills up a shorter caption in a batch, or None.
        unknown: id that stands for words the captioner does not know, or None.
    """

    words: tuple[str, ...]
    start: int
    end: int
    pad: int | None = None
    unknown: int | None = None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    @cached_property
    def special(self) -> frozenset[int]:
        """Ids that are no words of a caption: start, end, pad and unknown."""
        return frozenset(i for i in (self.start, self.end, self.pad, self.unknown) if i is not None)

    def id(self, word: str) -> int | None:
        """The word's id, or None if the captioner does not know it."""
        return self._ids.get(word)

    def word(self, id: int) -> str:
        """The word of an id."""
        return self.words[id]

    def __len__(self) -> int:
        return len(self.words)


class Captioner(ABC):
    """A CNN encoder and a recurrent decoder. Batch first everywhere; B images, T words, V words known."""

    name: str
    vocabulary: Vocabulary
    max_words: int
    defaults: Mapping[str, object] = MappingProxyType({})  # the captioner's own settings for `explain`

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def prepare(self, image: Image.Image) -> Prepared:
        """Makes an RGB image the CNN's input."""

    @abstractmethod
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) pixels -> (B, F, h, w): the CNN's last feature map, exactly what the decoder sees."""

    @abstractmethod
    def decode(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(B, F, h, w) features and (B, T) int64 tokens -> (B, T, V) logits.

        `tokens[:, 0]` is the start; `logits[:, t]` scores the token that follows `tokens[:, : t + 1]`.
        """

    def logits(self, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """`decode(encode(pixels), tokens)`: (B, T, V)."""
        return self.decode(self.encode(pixels), tokens)

    def decode_without(
        self, features: torch.Tensor, gone: torch.Tensor, filling: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """`decode` of one caption from one feature map with cells taken out, for many such choices of cells.

        Args:
            features: (1, F, h, w).
            gone: (B, h, w) bool, the cells taken out each time.
            filling: (1, F, 1, 1), what they hold instead.
            tokens: (1, T).

        Returns:
            (B, T, V) logits.
        """
        import torch

        return self.decode(torch.where(gone[:, None], filling, features), tokens.expand(len(gone), -1))

    def attention(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """(B, T, h, w) attention weights with which each next word is predicted, or None where the model has none."""
        return None

    def generate(
        self,
        pixels: torch.Tensor,
        beams: int = 3,
        max_words: int | None = None,
        sample: bool = False,
        seed: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Captions of (B, C, H, W) pixels: `generate_from(encode(pixels), ...)`."""
        import torch

        with torch.no_grad():
            return self.generate_from(self.encode(pixels), beams, max_words, sample, seed)

    @abstractmethod
    def generate_from(
        self,
        features: torch.Tensor,
        beams: int = 3,
        max_words: int | None = None,
        sample: bool = False,
        seed: int | None = None,
    ) -> list[tuple[int, ...]]:
        """Captions of (B, F, h, w) feature maps, as word ids without start and end.

        Args:
            features: what `encode` returns.
            beams: width of the beam search, whose scores are log-probabilities divided by length (or by the
                captioner's own power of it); 1 is greedy.
            max_words: longest caption; None is the captioner's own `max_words`.
            sample: draw each word from the model's distribution instead of searching; `beams` is not used then.
            seed: of the drawing; None draws freshly.
        """

    @abstractmethod
    def tokenize(self, caption: str, unknown: Literal["error", "map"] = "error") -> tuple[int, ...]:
        """Word ids of a caption, without start and end.

        Raises:
            CaptionError: the caption is empty or too long, or (with `unknown="error"`) has words that are not known.
        """

    def text(self, ids: Sequence[int]) -> str:
        """The caption of word ids; start, end and pad are left out."""
        skip = self.vocabulary.special - {self.vocabulary.unknown}
        return " ".join(self.vocabulary.word(int(i)) for i in ids if int(i) not in skip)
