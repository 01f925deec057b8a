"""The error browser: a folder's words in the order of their suspicion, those that the image said little of first."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from PIL import Image

from captionfix.errors import CaptionfixError, OutputError
from captionfix.function_words import FUNCTION_WORDS
from captionfix.ground_rows import Row, explained_rows, saved_rows
from captionfix.images import read_image
from captionfix.render import contact, figure
from captionfix.render.page_browse import Card, browse_page, row_thumbnail
from captionfix.saved import read

LIMIT = 150
"""Words shown of each order."""
THUMBNAIL = 190  # pixels of the longer side


@dataclass
class Entry:
    """A word of some image.

    Attributes:
        row: What is known of it (`captionfix.ground_rows.rows`).
        words: All words of its caption.
        folder: Where its explanation is saved, if it is.
        miss: How far the map's maximum lies from the region that the word stands for, as a part of the image's
            diagonal: 0 for a hit; None where no region is known.
    """

    row: Row
    words: tuple[str, ...]
    folder: Path | None
    miss: float | None = None


ORDERS: dict[str, Any] = {
    "share": lambda entry: _low(entry.row.get("image_share")),
    "probability": lambda entry: _low(entry.row.get("probability")),
    "effect": lambda entry: _low(entry.row.get("image_effect")),
    "pointing": lambda entry: math.inf if entry.miss is None else -entry.miss,
}
"""By what a folder's words are sorted, the most suspicious first."""


def browse(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    sort: str = "share",
    regions: str | os.PathLike[str] | None = None,
    limit: int = LIMIT,
    function_words: bool = False,
) -> Path:
    """Writes a page of a folder's words, the most suspicious first: one HTML file that needs no network.

    Args:
        folder: Holds saved explanations (`Explanation.save`), at any depth, or what `captionfix ground` wrote.
        out: The page; by default ``browse.html`` in the folder.
        sort: The order that the page opens with: one of `ORDERS`.
        regions: Known regions, for ``"pointing"``: a file in the lines format of `captionfix.evaluate.data.lines`,
            whose photographs have the names of the folder's images.
        limit: Words shown of each order.
        function_words: Whether words that name nothing to be seen are shown too.

    Returns:
        The page.

    Raises:
        OutputError: There is nothing to show, it can't be read, or the page can't be written.
        DataError: The regions can't be read.
    """
    from captionfix.files import atomic_write

    place = Path(folder)
    if sort not in ORDERS:
        raise OutputError(f"no order {sort!r}; there are: {', '.join(ORDERS)}")
    entries = collect(place, whole=regions is not None)
    if not entries:
        raise OutputError(f"{place}: no saved explanations and no rows of captionfix ground in it")
    if regions is not None:
        _point(entries, Path(regions))
    total = len(entries)
    if not function_words:
        entries = [entry for entry in entries if entry.row["word"].lower() not in FUNCTION_WORDS]
    chosen = suspicious(entries, limit)
    target = Path(out) if out is not None else place / "browse.html"
    cards = [_card(entry, picture, target.parent) for entry, picture in _pictures(chosen)]
    images = len({entry.row["image"] for entry in entries})
    summary = f"{len(cards)} of {total} words of {images} image{'s' * (images != 1)}"
    atomic_write(target, browse_page(cards, place.resolve().name, summary, sort))
    return target


def collect(folder: Path, whole: bool = False) -> list[Entry]:
    """All words in a folder, image by image.

    Args:
        folder: As for `browse`.
        whole: Whether points are needed.

    Raises:
        OutputError: There is no such folder, or something in it can't be read.
    """
    if not folder.is_dir():
        raise OutputError(f"{folder}: there is no such folder")
    images: dict[str, list[Row]] = defaultdict(list)
    saved: dict[str, Path] = {}
    for row in saved_rows(folder):
        images[row["image"]].append(row)
        if row.get("folder"):
            saved[row["image"]] = folder / row["folder"]
    known = {path.resolve() for path in saved.values()}
    for row in explained_rows(folder, whole):
        if Path(row["folder"]).resolve() not in known:
            images[row["image"]].append(row)
            saved[row["image"]] = Path(row["folder"])
    return [
        Entry(row, tuple(each["word"] for each in found), saved.get(image))
        for image, found in images.items()
        for row in found
    ]


def suspicious(entries: Sequence[Entry], limit: int) -> list[Entry]:
    """The first ``limit`` words of each order, in the order of the entries."""
    chosen: set[int] = set()
    for key in ORDERS.values():
        ranked = sorted(
            (k for k in range(len(entries)) if math.isfinite(key(entries[k]))), key=lambda k: key(entries[k])
        )
        chosen.update(ranked[:limit])
    return [entries[k] for k in sorted(chosen)]


def miss(point: Sequence[float], boxes: Iterable[Sequence[float]], size: Sequence[float]) -> float:
    """Distance of a point (original pixels) to the nearest of some boxes (fractions of the image), as a part of the
    image's diagonal; 0 inside of one.
    """
    x, y = point
    away = []
    for x0, y0, x1, y1 in boxes:
        across = max(x0 * size[0] - x, 0.0, x - x1 * size[0])
        down = max(y0 * size[1] - y, 0.0, y - y1 * size[1])
        away.append(math.hypot(across, down))
    return min(away) / math.hypot(*size)


def _point(entries: Sequence[Entry], regions: Path) -> None:
    """Sets the entries' misses, for words whose stem is that of a word in some phrase of the image's captions."""
    from captionfix.evaluate.data import lines, stem

    known: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for photo in lines(regions):
        for caption in photo.references:
            for phrase in caption.phrases:
                for name in {stem(caption.words[k]) for k in phrase.words}:
                    known[Path(photo.name).stem, name] += phrase.all_boxes
    for entry in entries:
        boxes = known.get((Path(entry.row["image"]).stem, stem(entry.row["word"].lower())))
        if boxes and entry.row.get("point"):
            entry.miss = miss(entry.row["point"], boxes, entry.row["size"])


def _pictures(entries: Sequence[Entry]) -> Iterable[tuple[Entry, Image.Image | None]]:
    """The entries with their words' maps over the photographs; each image is read once."""
    by_image: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_image[entry.row["image"]].append(entry)
    for group in by_image.values():
        folder = group[0].folder
        if folder is not None:
            whole = read(folder)
            scale = figure.scale(whole)
            size = contact.fitted(whole.image.size, (THUMBNAIL, THUMBNAIL))
            for entry in group:
                yield entry, contact.thumbnail(whole.words[entry.row["place"]], size, scale, box=True)
            continue
        try:
            image = read_image(group[0].row["file"])
        except CaptionfixError:
            image = None  # the photographs may have moved since; the numbers are still worth a look
        for entry in group:
            yield entry, None if image is None else row_thumbnail(image, entry.row, THUMBNAIL)


def _card(entry: Entry, picture: Image.Image | None, beside: Path) -> Card:
    row = entry.row
    link = None
    if entry.folder is not None:
        for name in ("page.html", "figure.png"):
            if (entry.folder / name).is_file():
                path = quote(Path(os.path.relpath(entry.folder / name, beside)).as_posix())
                link = f"{path}#word-{row['place']}" if name == "page.html" else path
                break
    return Card(
        image=row["image"],
        words=entry.words,
        place=row["place"],
        probability=row.get("probability"),
        share=row.get("image_share"),
        effect=row.get("image_effect"),
        miss=entry.miss,
        alternatives=tuple((text, share) for text, share in row.get("alternatives", ())),
        link=link,
        picture=picture,
    )


def _low(value: float | None) -> float:
    return math.inf if value is None else value
