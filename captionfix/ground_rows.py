"""A row a word: what a folder's explanations are written as, one JSON object each, and how they are found again."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from captionfix.errors import OutputError
from captionfix.explanation import Explanation
from captionfix.saved import FORMAT, read

Row = dict[str, Any]
WORDS, PARTS, FAILED, RUN = "words.jsonl", "parts", "failed.jsonl", "run.json"
FIXATIONS = 10
"""Kept in a row of a word, the heaviest first."""


def rows(explanation: Explanation, image: str, file: str | os.PathLike[str], folder: str | None = None) -> list[Row]:
    """One row a word.

    Args:
        explanation: Of the image.
        image: The image's name.
        file: Where the image lies.
        folder: Where the explanation is saved, if it is, from the folder of the rows.

    Returns:
        For each word: ``image``, ``file``, ``folder``, ``size`` (width, height) and ``window`` (what the CNN sees) of
        the image; ``caption``; ``place`` from 0, ``word``, ``probability``, ``image_share``, ``image_effect`` (nats),
        ``other``, ``language`` and ``alternatives`` (pairs), ``contrast``; ``box`` (x0, y0, x1, y1) and ``point`` (x,
        y: the map's maximum) of the word's specific map, or None; ``fixations`` (the heaviest: x, y, mass);
        ``feature_map`` (rows of shares). Coordinates are original pixels; what is not known is None.
    """
    common = {
        "image": image,
        "file": str(file),
        "folder": folder,
        "size": [*explanation.image.size],
        "window": [round(float(edge), 3) for edge in explanation.window],
        "caption": explanation.caption,
    }
    result = []
    for word in explanation.words:
        heaviest = np.argsort(-word.fixations[:, 2], kind="stable")[:FIXATIONS]
        box, point = word.box(), word.point()
        result.append(
            {
                **common,
                "place": word.index,
                "word": word.text,
                "probability": number(word.probability),
                "image_share": number(word.image_share),
                "image_effect": number(word.image_effect),
                "other": number(word.other),
                "language": [[text, number(share)] for text, share in word.language],
                "alternatives": [[text, number(share)] for text, share in word.alternatives],
                "contrast": word.contrast,
                "box": None if box is None else [round(edge, 2) for edge in box],
                "point": None if point is None else [round(edge, 2) for edge in point],
                "fixations": [[round(x, 2), round(y, 2), number(m)] for x, y, m in word.fixations[heaviest].tolist()],
                "feature_map": [[number(share) for share in line] for line in word.feature_map.tolist()],
            }
        )
    return result


def number(value: float) -> float | None:
    """Six digits, or None for what JSON does not have."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def line(record: Any) -> str:
    """A line of a JSON-lines file."""
    return json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n"


def lines(path: Path) -> Iterator[Any]:
    """The objects of a JSON-lines file.

    Raises:
        OutputError: It can't be read.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for count, text in enumerate(file, 1):
                try:
                    yield json.loads(text)
                except ValueError as error:
                    raise OutputError(f"{path}, line {count}: not JSON ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"{path}: can't be read ({error})") from error


def parts(folder: Path) -> list[Path]:
    """The finished parts of a folder that is being worked on or done, in order. Others' names are not theirs."""
    return sorted(path for path in (folder / PARTS).glob("*.jsonl") if path.stem.isdigit())


def saved_rows(folder: Path) -> Iterator[Row]:
    """The rows that `captionfix ground` wrote into a folder, also where it has not come to its end.

    Raises:
        OutputError: They can't be read.
    """
    finished = parts(folder)
    if finished:
        for part in finished:
            for record in lines(part):
                yield from record.get("words", ())
    elif (folder / WORDS).is_file():
        for count, row in enumerate(lines(folder / WORDS), 1):
            if not (isinstance(row, dict) and row.keys() >= {"image", "place", "word"}):
                raise OutputError(f"{folder / WORDS}, line {count}: not a row of captionfix ground")
            yield row


def explained_rows(folder: Path, whole: bool = False) -> Iterator[Row]:
    """Rows of the explanations that were saved in a folder or anywhere under it.

    Args:
        folder: Where to look.
        whole: Whether boxes, points and fixations are wanted, for which the explanations are read whole.

    Raises:
        OutputError: One is damaged.
    """
    for path in sorted(folder.rglob("explanation.json")):
        place = path.parent
        name = place.relative_to(folder).as_posix()
        name = place.name if name == "." else name
        if whole:
            yield from rows(read(place), name, place, str(place))
            continue
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError("not a saved explanation")
            common = {"image": name, "folder": str(place), "caption": record["caption"]}
            found = [{**common, "place": k, "word": word["text"], **word} for k, word in enumerate(record["words"])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path}: can't be read ({error!r})") from error
        yield from found
