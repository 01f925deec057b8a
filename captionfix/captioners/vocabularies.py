"""Which word is which id: the forms that captioners keep it in, and their names for the special words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from captionfix.captioners.captioner import Vocabulary
from captionfix.errors import CaptionerError

# What people call the special words. Plain words ("start", "end") are left out: they may occur in captions.
NAMES: dict[str, tuple[str, ...]] = {
    "start": (
        *("<start>", "<START>", "<Start>", "<s>", "<S>", "<sos>", "<SOS>", "<bos>", "<BOS>", "<go>", "<GO>"),
        *("[CLS]", "[BOS]", "[SOS]", "[START]", "startseq", "<|startoftext|>", "<begin>"),
    ),
    "end": (
        *("<end>", "<END>", "<End>", "</s>", "</S>", "<eos>", "<EOS>"),
        *("[SEP]", "[EOS]", "[END]", "endseq", "<|endoftext|>", "<stop>"),
    ),
    "pad": ("<pad>", "<PAD>", "<Pad>", "[PAD]", "<null>", "<NULL>", "<blank>"),
    "unknown": ("<unk>", "<UNK>", "<Unk>", "[UNK]", "<unknown>", "<UNKNOWN>", "<oov>", "<OOV>", "UNK"),
}
# Attributes under which vocabulary objects keep a table.
TABLES = (
    *("idx2word", "itos", "id2word", "index2word", "idx_to_word", "ix_to_word", "id_to_word", "index_to_word"),
    *("i2w", "words", "word2idx", "stoi", "word2id", "word2index", "word_to_idx", "word_to_ix", "word_to_id"),
    *("word_to_index", "w2i", "vocab"),
)
METHODS = ("get_itos", "get_stoi", "get_vocab")


def read_vocabulary(
    given: Any,
    start: str | int | None = None,
    end: str | int | None = None,
    pad: str | int | None = None,
    unknown: str | int | None = None,
) -> Vocabulary:
    """A vocabulary in whatever form a captioner keeps it.

    Args:
        given: a list of words (a word's place is its id), ``{word: id}``, ``{id: word}`` (ids may be strings of
            digits), an object that holds such a table (``word2idx``, ``idx2word``, ``stoi``, ``itos``, ``id2word``,
            ``get_vocab()``, ...), or a `Vocabulary`.
        start: the word that begins captions, or its id. None: found by its usual name.
        end: the word that ends captions, or its id. None: found by its usual name.
        pad: the word that fills shorter captions up, or its id. None: found by its usual name, if there is one.
        unknown: the word for words that are not known, or its id. None: found by its usual name, if there is one.

    Raises:
        CaptionerError: there is no such table in it, ids are missing or double, or a special word is missing or could
            be several.
    """
    special = {"start": start, "end": end, "pad": pad, "unknown": unknown}
    if isinstance(given, Vocabulary):
        if any(value is not None for value in special.values()):
            raise CaptionerError("a Vocabulary says itself what start, end, pad and unknown are: leave them out")
        return given
    table = _table(given)
    for role, value in special.items():  # a special id that no word has, as where 0 begins and ends captions
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0 and value not in table:
            table[value] = {"unknown": "<unk>"}.get(role, f"<{role}>")
    missing = [i for i in range(max(table) + 1) if i not in table]
    if missing or min(table) < 0:
        shown = ", ".join(map(str, [*[i for i in table if i < 0], *missing][:5]))
        raise CaptionerError(
            f"vocabulary: no word has id {shown} ({len(table)} words, ids up to {max(table)}); say what such an id is "
            "(start=, end=, pad= or unknown= with the id), or add it to the table"
        )
    words = tuple(table[i] for i in range(len(table)))
    ids = {role: _special(role, value, words) for role, value in special.items()}
    if ids["start"] is None or ids["end"] is None:
        role = "start" if ids["start"] is None else "end"
        verb = "begins" if role == "start" else "ends"
        raise CaptionerError(
            f"vocabulary: which word {verb} a caption? None of the usual names is among its {len(words)} words "
            f"({', '.join(NAMES[role][:6])}, ...). Give {role}= as a word or an id"
        )
    return Vocabulary(words, ids["start"], ids["end"], ids["pad"], ids["unknown"])


def _special(role: str, value: str | int | None, words: tuple[str, ...]) -> int | None:
    if value is None:
        present = [name for name in NAMES[role] if name in words]
        if len(present) > 1:
            raise CaptionerError(f"vocabulary: {role} could be {' or '.join(present)}; give {role}=")
        return words.index(present[0]) if present else None
    if isinstance(value, str):
        if value not in words:
            raise CaptionerError(f"vocabulary: {role}={value!r} is not among its {len(words)} words")
        return words.index(value)
    if isinstance(value, bool) or not 0 <= int(value) < len(words):
        raise CaptionerError(f"vocabulary: {role}={value!r} is no id; the ids are 0 to {len(words) - 1}")
    return int(value)


def _table(given: Any) -> dict[int, str]:
    """id -> word."""
    if isinstance(given, Mapping):
        return _from_mapping(given)
    if isinstance(given, (list, tuple)):
        if not given or not all(isinstance(word, str) for word in given):
            raise CaptionerError("vocabulary: a list must hold words (strings), each at the place of its id")
        return dict(enumerate(given))
    for name in TABLES:
        inner = getattr(given, name, None)
        if isinstance(inner, (Mapping, list, tuple)) and len(inner):
            return _table(inner)
    for name in METHODS:
        method = getattr(given, name, None)
        if callable(method):
            return _table(method())
    raise CaptionerError(
        f"vocabulary: a {type(given).__name__} holds no table of words that is known here. Give a list of words, "
        f"{{word: id}} or {{id: word}}, or an object with one of {', '.join((*TABLES[:3], 'word2idx', 'stoi'))}"
    )


def _from_mapping(given: Mapping[Any, Any]) -> dict[int, str]:
    if not given:
        raise CaptionerError("vocabulary: it is empty")
    if all(_is_id(value) for value in given.values()):
        pairs: Iterable[tuple[Any, Any]] = ((i, word) for word, i in given.items())
    elif all(isinstance(value, str) for value in given.values()):
        pairs = given.items()
    else:
        raise CaptionerError("vocabulary: a mapping must be {word: id} or {id: word}")
    table: dict[int, str] = {}
    for key, word in pairs:
        try:
            i = int(key)
        except (TypeError, ValueError):
            raise CaptionerError(f"vocabulary: {key!r} (of the word {word!r}) is no id") from None
        if i in table:
            raise CaptionerError(f"vocabulary: the id {i} belongs to both {table[i]!r} and {word!r}")
        table[i] = str(word)
    return table


def _is_id(value: Any) -> bool:
    try:
        return not isinstance(value, (bool, str)) and int(value) == value
    except (TypeError, ValueError):
        return False
