"""Vocabularies of published captioners, whatever form they were saved in."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from captionfix.captioners.captioner import Vocabulary
from captionfix.captioners.published.safe_pickle import Held
from captionfix.errors import CaptionerError

START = ("<start>", "<S>", "<s>", "<SOS>", "<sos>", "<BOS>", "<bos>")
END = ("<end>", "</S>", "</s>", "<EOS>", "<eos>")
PAD = ("<pad>", "<PAD>")
UNKNOWN = ("<unk>", "<UNK>", "<unknown>", "UNK")
_TABLES = ("idx2word", "itos", "ix_to_word", "id2word", "word2idx", "stoi", "word2ix", "word2id", "word_map", "vocab")


def in_order(value: Any) -> tuple[str, ...] | None:
    """The words by their ids, out of a pickled vocabulary of any class, a table in either direction, or a list.

    None where it is no vocabulary: it has no words for start and end, or its ids are not 0, 1, 2, ...
    """
    if isinstance(value, Held):
        tables = {**value.entries, **value.attributes}
        found = (in_order(tables[name]) for name in _TABLES if name in tables)
        return next((words for words in found if words is not None), None)
    words: Sequence[Any] | None = None
    if isinstance(value, dict) and value:
        pairs = dict.items(value)
        if all(isinstance(v, int) and isinstance(k, str) for k, v in pairs):
            words = _contiguous({v: k for k, v in pairs}) if len({*dict.values(value)}) == len(value) else None
        else:
            words = _contiguous({int(k) if str(k).isdecimal() else k: v for k, v in pairs})
    elif isinstance(value, (list, tuple)):
        words = value
    if not words or not all(isinstance(word, str) for word in words):
        return None
    return tuple(words) if _first(words, START) is not None and _first(words, END) is not None else None


def _contiguous(table: dict[Any, Any]) -> list[Any] | None:
    return [table[i] for i in range(len(table))] if all(i in table for i in range(len(table))) else None


def counted(path: Path) -> tuple[str, ...] | None:
    """The words of im2txt's ``word_counts.txt``: one a line with its count; a word's id is its line's number.

    A word that was written as Python 3 shows bytes (``b'dog'``) is taken out of that. None where the file is no such
    list.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise CaptionerError(f"{path} can't be read: {error}") from error
    words = [_unquoted(line.split()[0]) for line in lines if line.strip()]
    if _first(words, START) is None or _first(words, END) is None:
        return None
    return tuple(words if _first(words, UNKNOWN) is not None else [*words, "<UNK>"])


def _unquoted(word: str) -> str:
    if word[:2] in ("b'", 'b"') and word[-1] == word[1] and len(word) > 2:
        try:
            return str(ast.literal_eval(word).decode("utf-8", "replace"))
        except (ValueError, SyntaxError):
            return word
    return word


def _first(words: Sequence[str], names: Sequence[str]) -> int | None:
    return next((i for name in names for i, word in enumerate(words) if word == name), None)


def vocabulary(
    words: Sequence[str], rows: int, words_from: Path, weights_from: Path, spare: bool = False
) -> Vocabulary:
    """The vocabulary, if its size is that of the embedding.

    Args:
        words: by id.
        rows: of the embedding.
        words_from: file of the words.
        weights_from: file of the embedding.
        spare: the embedding may have up to as many rows again that no word has, as im2txt's.

    Raises:
        CaptionerError: it is not, with both numbers.
    """
    if not (len(words) <= rows < 2 * len(words) if spare else len(words) == rows):
        raise CaptionerError(
            f"the vocabulary {words_from} has {len(words)} words, the weights in {weights_from} are for {rows}: "
            "they are not of one training; take the vocabulary that was published with these weights"
        )
    start, end = _first(words, START), _first(words, END)
    if start is None or end is None:
        raise CaptionerError(f"the vocabulary {words_from} has no words for start and end")
    filled = (*words, *(f"<unused {i}>" for i in range(len(words), rows)))
    return Vocabulary(filled, start, end, _first(words, PAD), _first(words, UNKNOWN))
