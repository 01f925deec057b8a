"""Word-level tokenisers and image processors of the project's captioners."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<start>", "<end>", "<unk>")


def split(caption: str) -> list[str]:
    """The words of a caption: lower case, without accents' variants of encoding, without punctuation.

    A hyphen or an apostrophe inside a word stays ("t-shirt", "man's"), everything else that is neither letter nor
    digit separates. The same steps as `word_tokenizer`'s.
    """
    text = unicodedata.normalize("NFKC", caption).lower().replace("\u2019", "'")
    kept = [c if c.isalnum() else _inner(text, i) for i, c in enumerate(text)]
    return "".join(kept).split()


def _inner(text: str, i: int) -> str:
    inside = text[i] in "'-" and 0 < i < len(text) - 1 and text[i - 1].isalnum() and text[i + 1].isalnum()
    return text[i] if inside else " "


def vocabulary(captions: Iterable[str], at_least: int = 1) -> list[str]:
    """Words that occur at least so often, the commonest first, after the four special words."""
    counts = Counter(word for caption in captions for word in split(caption))
    kept = [word for word, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if n >= at_least]
    return [*SPECIAL, *kept]


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokeniser whose ids are the places in `words`, which begins with pad, start, end, unknown."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, start, end, unknown = SPECIAL
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=unknown))
    outside = Regex(r"(?<![\p{L}\p{N}])['-]|['-](?![\p{L}\p{N}])|[^\p{L}\p{N}\s'-]")
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace("\u2019", "'"),
            normalizers.Replace(outside, " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, words.index(start)), (end, words.index(end))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=start,
        eos_token=end,
        unk_token=unknown,
        clean_up_tokenization_spaces=False,
    )


def square_processor(size: int) -> BaseImageProcessor:
    """RGB squashed to size x size pixels (the aspect is not kept) and scaled to [-1, 1]."""
    from transformers import ViTImageProcessor

    return ViTImageProcessor(
        size={"height": size, "width": size}, image_mean=[0.5, 0.5, 0.5], image_std=[0.5, 0.5, 0.5], do_convert_rgb=True
    )
