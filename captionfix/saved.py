"""How an explanation is saved and read: ``explanation.json``, ``arrays.npz`` and the image in a folder."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import captionfix
from captionfix.errors import CaptionfixError, OutputError
from captionfix.explanation import Explanation, Word
from captionfix.files import atomic_folder
from captionfix.images import read_image

FORMAT = "captionfix-explanation"
VERSION = 2
"""Of the saved form (1 had no ``even``). Readers refuse newer ones."""
_PNG_PIXELS = 2_000_000


def write(explanation: Explanation, folder: str | os.PathLike[str]) -> Path:
    """`Explanation.save`."""
    image = explanation.image
    photo = "image.png" if image.width * image.height <= _PNG_PIXELS else "image.jpg"
    with atomic_folder(folder) as place:
        try:
            image.save(place / photo, quality=95) if photo.endswith("jpg") else image.save(place / photo)
            np.savez_compressed(place / "arrays.npz", **_arrays(explanation.words))
            text = json.dumps(_record(explanation, photo), indent=1, ensure_ascii=False, allow_nan=False)
            (place / "explanation.json").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"can't write into {folder}: {error.strerror or error}") from error
    return Path(folder)


def read(folder: str | os.PathLike[str]) -> Explanation:
    """Reads what `Explanation.save` wrote; neither torch nor a captioner is needed.

    Raises:
        OutputError: There is no such folder, a file is missing or damaged, or a newer captionfix wrote it.
    """
    place = Path(folder)
    if not place.is_dir():
        raise OutputError(f"{place}: there is no such folder")
    try:
        record = json.loads((place / "explanation.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OutputError(f"{place}: no explanation.json in it, so it is not a saved explanation") from None
    except (OSError, ValueError) as error:
        raise OutputError(f"{place / 'explanation.json'}: can't be read ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise OutputError(f"{place / 'explanation.json'}: not a saved explanation")
    if not isinstance(record.get("version"), int) or record["version"] > VERSION:
        raise OutputError(
            f"{place}: saved in form {record.get('version')} by captionfix {record.get('captionfix')}, "
            f"and this captionfix ({captionfix.__version__}) reads up to {VERSION}; install a newer one"
        )
    try:
        image = read_image(place / Path(record["image"]).name)
        if [*image.size] != record["size"]:
            raise ValueError(f"the image is {image.size}, not {record['size']}")
        with np.load(place / "arrays.npz", allow_pickle=False) as arrays:
            words = _words(record["words"], arrays)
        return Explanation(
            image=image,
            words=words,
            caption=record["caption"],
            captioner=record["captioner"],
            method=record["method"],
            policy=record["policy"],
            window=tuple(record["window"]),
            grid=tuple(record["grid"]),
            version=record["captionfix"],
        )
    except (
        CaptionfixError,
        OSError,
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        EOFError,
        zipfile.BadZipFile,
    ) as error:
        raise OutputError(f"{place}: the saved explanation is damaged or incomplete ({error})") from error


def _arrays(words: tuple[Word, ...]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for word in words:
        named[f"fixations_{word.index}"] = np.asarray(word.fixations, dtype=np.float32)
        named[f"feature_map_{word.index}"] = np.asarray(word.feature_map, dtype=np.float32)
        if len(word.even):
            named[f"even_{word.index}"] = np.asarray(word.even, dtype=np.float32)
    return named


def _record(explanation: Explanation, photo: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "captionfix": explanation.version,
        "caption": explanation.caption,
        "captioner": explanation.captioner,
        "method": explanation.method,
        "policy": dict(explanation.policy),
        "image": photo,
        "size": [*explanation.image.size],
        "window": [float(edge) for edge in explanation.window],
        "grid": [int(side) for side in explanation.grid],
        "words": [
            {
                "text": word.text,
                "token": int(word.token),
                "probability": _number(word.probability),
                "image_share": _number(word.image_share),
                "language": [[text, _number(share)] for text, share in word.language],
                "other": _number(word.other),
                "image_effect": _number(word.image_effect),
                "alternatives": [[text, _number(share)] for text, share in word.alternatives],
                "contrast": word.contrast,
            }
            for word in explanation.words
        ],
    }


def _words(records: list[dict[str, Any]], arrays: Mapping[str, np.ndarray]) -> tuple[Word, ...]:
    words = []
    for index, record in enumerate(records):
        fixations, feature_map = arrays[f"fixations_{index}"], arrays[f"feature_map_{index}"]
        even = arrays[f"even_{index}"] if f"even_{index}" in arrays else fixations[:0]
        if any(points.ndim != 2 or points.shape[1] != 3 for points in (fixations, even)) or feature_map.ndim != 2:
            shapes = f"{fixations.shape}, {even.shape} and {feature_map.shape}"
            raise ValueError(f"word {index} has arrays of shapes {shapes}")
        words.append(
            Word(
                text=record["text"],
                index=index,
                token=record["token"],
                probability=_value(record["probability"]),
                fixations=fixations,
                feature_map=feature_map,
                image_share=_value(record["image_share"]),
                language=tuple((text, _value(share)) for text, share in record["language"]),
                other=_value(record["other"]),
                image_effect=_value(record["image_effect"]),
                alternatives=tuple((text, _value(share)) for text, share in record["alternatives"]),
                contrast=record["contrast"],
                even=even,
            )
        )
    return tuple(words)


def _number(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return float(value) if math.isfinite(value) else None


def _value(value: float | None) -> float:
    return math.nan if value is None else float(value)
