"""Data as they are published: Flickr30k Entities, COCO, and which of all kinds a path holds."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from ..errors import DataError
from . import needed
from .boxes import Box
from .data import Grounded, Phrase, Reference, grounded, lines, reference, scenes, stem

_MARKED = re.compile(r"\[/EN#(\d+)/(\S+)\s+([^\]]*)\]|(\S+)")


def entities(
    root: Path | str, images: Path | str | None = None, split: str | None = None, limit: int | None = None
) -> Iterator[Grounded]:
    """Flickr30k Entities in its published layout: ``Sentences/ID.txt``, ``Annotations/ID.xml``, and the photographs.

    Boxes are made 0-based (the files count from 1), all of a chain's boxes count; chains that are marked as a scene or
    as having no box, and those that are not in the picture (entity 0), are left out.

    Args:
        root: the folder with ``Sentences`` and ``Annotations``.
        images: where ``ID.jpg`` are; by default ``images``, ``flickr30k-images`` or ``flickr30k_images`` in ``root``.
        split: reads the ids from ``SPLIT.txt`` in ``root``; by default all, in order.
        limit: of photographs.

    Raises:
        DataError: something is missing or not of this form.
    """
    root = Path(root)
    places = [Path(images)] if images is not None else [root / n for n in ("images", *_PHOTOS)]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(f"{root}: no photographs; looked in {', '.join(map(str, places))}")
    listed = root / f"{split}.txt"
    if split is not None and not listed.is_file():
        raise DataError(f"{listed}: there is no such list of a split")
    if split is None:
        ids = sorted((file.stem for file in (root / "Sentences").glob("*.txt")), key=lambda id: (len(id), id))
    else:
        ids = listed.read_text(encoding="utf-8").split()
    for id in ids[:limit]:
        try:
            boxes = _chains(root / "Annotations" / f"{id}.xml")
            text = (root / "Sentences" / f"{id}.txt").read_text(encoding="utf-8")
        except (OSError, ElementTree.ParseError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{root}, photograph {id}: not of Flickr30k Entities' layout ({error!r})") from error
        references = [_marked(line, boxes) for line in text.splitlines() if line.strip()]
        if not references:
            raise DataError(f"{root / 'Sentences' / f'{id}.txt'}: no sentences in it")
        yield grounded(id, folder / f"{id}.jpg", references)


_PHOTOS = ("flickr30k-images", "flickr30k_images")


def _chains(path: Path) -> dict[str, tuple[Box, ...]]:
    """Chain -> its boxes, as fractions of the photograph; marked chains are left out."""
    tree = ElementTree.parse(path).getroot()
    width, height = (int(tree.findtext(f"size/{side}")) for side in ("width", "height"))  # type: ignore[arg-type]
    boxes: dict[str, list[Box]] = {}
    marked: set[str] = set()
    for thing in tree.iter("object"):
        names = [str(name.text).strip() for name in thing.findall("name")]
        if any(thing.findtext(flag, "0").strip() == "1" for flag in ("scene", "nobndbox")):
            marked.update(names)
        for at in thing.findall("bndbox"):
            x0, y0, x1, y1 = (int(at.findtext(edge)) - 1 for edge in ("xmin", "ymin", "xmax", "ymax"))  # type: ignore[arg-type]
            for name in names:
                boxes.setdefault(name, []).append((x0 / width, y0 / height, x1 / width, y1 / height))
    return {name: tuple(each) for name, each in boxes.items() if name not in marked}


def _marked(line: str, boxes: dict[str, tuple[Box, ...]]) -> Reference:
    words: list[str] = []
    phrases = []
    for chain, kinds, text, plain in _MARKED.findall(line):
        inside = text.split() if chain else [plain]
        if chain != "0" and chain in boxes:
            phrases.append(((len(words), len(words) + len(inside)), kinds.split("/")[0], boxes[chain]))
        words += inside
    return reference(words, phrases)


SYNONYMS = {
    "person": "man woman boy girl child kid baby toddler lady guy gentleman player people crowd skateboarder surfer "
    "skier snowboarder rider batter pitcher catcher cyclist biker worker chef officer policeman",
    "bicycle": "bike",
    "motorcycle": "motorbike moped",
    "airplane": "plane jet aeroplane aircraft jetliner airliner",
    "car": "suv sedan taxi cab minivan",
    "boat": "ship sailboat canoe kayak yacht",
    "traffic light": "stoplight",
    "cat": "kitten kitty",
    "dog": "puppy",
    "cow": "bull calf cattle ox",
    "sheep": "lamb",
    "horse": "pony",
    "handbag": "purse",
    "sports ball": "ball soccerball football baseball basketball",
    "couch": "sofa",
    "dining table": "table",
    "potted plant": "houseplant",
    "tv": "television",
    "cell phone": "phone cellphone smartphone",
    "laptop": "notebook",
    "refrigerator": "fridge",
    "donut": "doughnut",
    "teddy bear": "teddy",
    "stop sign": "stopsign",
    "wine glass": "wineglass",
    "hair drier": "hairdryer",
}
"""COCO's categories by other names. Words are compared by stems, and the longest name wins ("hot dog" is no dog)."""


def coco(root: Path | str, split: str = "val2017", limit: int | None = None) -> Iterator[Grounded]:
    """COCO: ``annotations/captions_SPLIT.json`` and ``annotations/instances_SPLIT.json``, photographs in ``SPLIT/``.

    A word (or several, "fire hydrant") that names a category stands for all of the photograph's instances of it, their
    masks together; a category without an instance stands for nothing. Read with pycocotools.

    Raises:
        DataError: a file is missing or not of this form.
        PolicyError: pycocotools is not installed.
    """
    root = Path(root)
    library = needed("pycocotools.coco")
    files = [root / "annotations" / f"{kind}_{split}.json" for kind in ("captions", "instances")]
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: there is no such file")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
            captions, instances = (library.COCO(str(file)) for file in files)
        names = {key: (str(c["name"]), str(c.get("supercategory", c["name"]))) for key, c in instances.cats.items()}
        table = category_table({key: name for key, (name, _) in names.items()})
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise DataError(f"{root}: not of COCO's layout ({error!r})") from error
    with_captions = (i for i in sorted(captions.imgs) if captions.getAnnIds(imgIds=[i]))
    for id in islice(with_captions, limit):
        masks: dict[int, Any] = {}
        try:
            for thing in instances.loadAnns(instances.getAnnIds(imgIds=[id])):
                mask = instances.annToMask(thing).astype(bool)
                key = int(thing["category_id"])
                masks[key] = mask | masks[key] if key in masks else mask
            texts = [str(a["caption"]) for a in captions.loadAnns(captions.getAnnIds(imgIds=[id]))]
            name = str(captions.imgs[id]["file_name"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{root}, photograph {id}: not of COCO's layout ({error!r})") from error
        references = []
        for text in texts:
            words = tuple(re.findall(r"\w+(?:['-]\w+)*", text.lower()))
            phrases = tuple(
                Phrase(places, names[key][1], mask=masks[key])
                for places, key in categories(words, table)
                if key in masks
            )
            references.append(Reference(words, phrases))
        yield grounded(name, root / split / name, references)


def category_table(names: dict[int, str]) -> dict[tuple[str, ...], int]:
    """Stems of one or several words -> category, from its name and `SYNONYMS`."""
    table = {tuple(stem(w) for w in other.split()): key
             for key, name in names.items() for other in SYNONYMS.get(name, "").split()}  # fmt: skip
    table |= {tuple(stem(w) for w in name.split()): key for key, name in names.items()}
    return table


def categories(words: Sequence[str], table: dict[tuple[str, ...], int]) -> list[tuple[tuple[int, ...], int]]:
    """Places of words that name a category, and which; the longest name from left to right."""
    stems = [stem(word) for word in words]
    longest = max((len(name) for name in table), default=0)
    found, k = [], 0
    while k < len(stems):
        for length in range(min(longest, len(stems) - k), 0, -1):
            key = table.get(tuple(stems[k : k + length]))
            if key is not None:
                found.append((tuple(range(k, k + length)), key))
                k += length
                break
        else:
            k += 1
    return found


def open_data(
    name: str,
    limit: int | None = None,
    first: int = 0,
    split: str | None = None,
    images: Path | None = None,
) -> Callable[[], Iterator[Grounded]]:
    """What a name or a path holds, to be read as often as one likes.

    Args:
        name: ``scenes``; a file in the lines format, or a folder with ``dev.jsonl``; a folder of Flickr30k Entities; a
            folder of COCO.
        limit: of pictures; scenes: 500 by default.
        first: scenes: seed of the first.
        split: scenes: ``test`` or ``held-out``; of the others, which file or list.
        images: Flickr30k Entities: the photographs' folder.

    Raises:
        DataError: there is nothing of these kinds.
    """
    path = Path(name)
    if name == "scenes":
        if split not in (None, "test", "held-out"):
            raise DataError(f"scenes have no split {split!r}; choose test or held-out")
        return lambda: scenes(500 if limit is None else limit, first, split or "test")
    if not path.exists():
        raise DataError(f"{name}: there is no such file or folder; give 'scenes' or a path")
    if path.is_file():
        return lambda: lines(path, limit)
    if (path / "Sentences").is_dir() and (path / "Annotations").is_dir():
        return lambda: entities(path, images, split, limit)
    if (path / "annotations").is_dir():
        return lambda: coco(path, split or "val2017", limit)
    if (path / f"{split or 'dev'}.jsonl").is_file():
        return lambda: lines(path / f"{split or 'dev'}.jsonl", limit)
    raise DataError(
        f"{name}: holds neither {split or 'dev'}.jsonl nor Flickr30k Entities (Sentences, Annotations) nor COCO "
        "(annotations)"
    )
