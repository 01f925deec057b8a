"""Thousands of images explained, a row a word: resumable after a kill at any moment, with nothing lost or done twice.

How: the images are done batch by batch, and a batch's rows are one file ``parts/NNNNNN.jsonl`` that appears whole or
not at all (`captionfix.files.atomic_write`). What is done is what the parts say; everything else is derived from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captionfix.errors import CaptionfixError, DataError, OutputError
from captionfix.files import atomic_write
from captionfix.ground_rows import FAILED, PARTS, RUN, WORDS, Row, line, lines, parts, rows

if TYPE_CHECKING:
    from PIL import Image

    from captionfix.captioners.captioner import Captioner

SUFFIXES = frozenset(".jpg .jpeg .png .webp .gif .bmp .tif .tiff .avif .jp2".split())  # noqa: SIM905
LARGEST = {"cpu": 8}
"""Images in a batch, at most, where the size is to be found: a processor gains nothing by more
(``benchmarks/folders.py``), and a kill costs what the batch had done.
"""
LARGEST_ELSEWHERE = 32


@dataclass(frozen=True)
class Item:
    """An image to explain: its name among the others, its file, and a caption if it is not the captioner's own."""

    name: str
    file: str
    caption: str | None = None


@dataclass(frozen=True)
class Options:
    """How images are explained; a folder is only gone on with by the same.

    Attributes:
        captioner: A bundled captioner's name, a folder, or a hub id.
        method, policy, beams, unknown: As of `captionfix.explain`.
        pictures: Whether each explanation is saved too, with its page.
    """

    captioner: str
    method: str = "default"
    policy: Any = "default"
    beams: int = 3
    unknown: str = "error"
    pictures: bool = False


@dataclass
class Progress:
    """How far it is.

    Attributes:
        total: Images in all.
        done: Of them, with those of earlier runs.
        here: Done by this run.
        failed: The records of this run's images that could not be explained.
    """

    total: int
    done: int = 0
    here: int = 0
    failed: list[dict[str, Any]] = field(default_factory=list)


def items(source: str | os.PathLike[str]) -> list[Item]:
    """The images of a folder (at any depth), or of a list.

    Args:
        source: A folder; a text file with a path a line; or a ``.jsonl`` file with ``{"image": path, "caption": text}``
            a line, the caption optional. Paths are from the list's folder. An image named twice is one.

    Raises:
        DataError: There is no such folder or list, it holds no image, or a line is not of its form.
    """
    place = Path(source)
    if place.is_dir():
        files = (Path(root, name) for root, _, names in os.walk(place) for name in names)
        found = sorted(f for f in files if f.suffix.lower() in SUFFIXES and not f.name.startswith("."))
        listed = [Item(file.relative_to(place).as_posix(), str(file)) for file in found]
    elif place.is_file():
        listed = list(_listed(place))
    else:
        raise DataError(f"{place}: there is no such folder or list of images")
    if not listed:
        raise DataError(f"{place}: holds no image")
    return list({item.name: item for item in reversed(listed)}.values())[::-1]


def _listed(path: Path) -> Iterator[Item]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as a list of images ({error})") from error
    for count, entry in enumerate(text.splitlines(), 1):
        if not entry.strip():
            continue
        name, caption = entry.strip(), None
        if path.suffix == ".jsonl":
            try:
                record = json.loads(entry)
                name, caption = str(record["image"]), record.get("caption")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f'{path}, line {count}: not of the form {{"image": path, "caption": text}}') from error
        yield Item(name, str(path.parent / name), caption)


def ground(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: Options,
    *,
    device: str = "cpu",
    workers: int = 2,
    batch: int | None = None,
    engine: str = "local",
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Explains the images of a folder or a list, and writes a row a word.

    Args:
        source: As for `items`.
        out: A folder for the results: ``words.jsonl`` (`captionfix.ground_rows.rows`), ``failed.jsonl`` (images that
            could not be explained and why), ``parts/``, and with ``pictures`` the explanations in ``images/``. The
            same call again goes on where it was cut off, and does images that have been added.
        options: How they are explained.
        device: Where to compute.
        workers: Processes that read images ahead; with the engine ``"ray"`` those that explain them.
        batch: Images at once; None for as many as fit into the memory.
        engine: ``"local"``, or ``"ray"`` for a cluster of Ray's (several GPUs and machines).
        report: Called after each batch.

    Returns:
        How it ended.

    Raises:
        DataError: There are no images.
        OutputError: The folder holds results of other options, is being worked on, or can't be written.
        CaptionerError: The captioner can't be loaded or its output is not finite.
    """
    from captionfix.ground_engines import ENGINES

    wanted = items(source)
    folder = Path(out)
    with _alone(folder):
        _same_options(folder, options)
        done = {record["image"] for part in _tidied(folder) for record in lines(part)}
        todo = [item for item in wanted if item.name not in done]
        progress = Progress(len(wanted), len(wanted) - len(todo))
        report(progress)
        if todo:
            last = max((int(part.stem) for part in parts(folder)), default=0)
            run = ENGINES[engine](todo, folder, options, device, workers, batch)
            for number, records in enumerate(run, last + 1):
                atomic_write(folder / PARTS / f"{number:06d}.jsonl", "".join(map(line, records)))
                progress.done += len(records)
                progress.here += len(records)
                progress.failed += [record for record in records if "error" in record]
                report(progress)
        finish(folder, [item.name for item in wanted])
    return progress


def record_of(item: Item, folder: Path, explain: Callable[[], Any], options: Options) -> dict[str, Any]:
    """What is written of an image: its rows, or why there are none."""
    try:
        explanation = explain()
        saved = None
        if options.pictures:
            saved = f"images/{_folder_name(item.name)}"
            shutil.rmtree(folder / saved, ignore_errors=True)  # of a run that was cut off before the rows were written
            explanation.save(folder / saved)
            explanation.to_html(folder / saved / "page.html")
        return {"image": item.name, "words": rows(explanation, item.name, os.path.abspath(item.file), saved)}
    except OutputError:
        raise  # the disk is full, or the like: no image's own trouble
    except CaptionfixError as error:
        return {"image": item.name, "error": " ".join(str(error).split())}


def explained(
    model: Captioner, batch: Sequence[tuple[Item, Image.Image | str]], folder: Path, options: Options
) -> list[dict[str, Any]]:
    """A batch's records. An image that can't be explained does not keep the others from it.

    Args:
        model: The captioner.
        batch: Items with their pictures, or with what is wrong with those.
        folder: For the pictures.
        options: How they are explained.
    """
    from captionfix.explain import explain

    def run(pairs: Sequence[tuple[Item, Any]]) -> list[Any]:
        captions: Any = [item.caption for item, _ in pairs]  # None: the captioner's own
        unknown: Any = options.unknown
        return explain(
            model,
            [picture for _, picture in pairs],
            captions,
            method=options.method,
            policy=options.policy,
            beams=options.beams,
            unknown=unknown,
            batch_size=len(pairs),
        )

    good = [pair for pair in batch if not isinstance(pair[1], str)]
    found: dict[str, Callable[[], Any]] = {}
    try:
        for (item, _), result in zip(good, run(good) if good else [], strict=True):
            found[item.name] = lambda result=result: result  # type: ignore[misc]
    except CaptionfixError:  # of one of them: find out of which
        found = {pair[0].name: lambda pair=pair: run([pair])[0] for pair in good}  # type: ignore[misc]
    return [
        {"image": item.name, "error": picture}
        if isinstance(picture, str)
        else record_of(item, folder, found[item.name], options)
        for item, picture in batch
    ]


def finish(folder: Path, names: Iterable[str]) -> None:
    """Writes ``words.jsonl`` and ``failed.jsonl`` out of the parts, in the order of the names."""
    order = {name: place for place, name in enumerate(names)}
    # only places are held, not rows: a folder may have millions
    places: list[tuple[int, Path, int]] = []
    for part in parts(folder):
        with part.open("rb") as file:
            at = 0
            for text in file:
                places.append((order.get(json.loads(text)["image"], len(order)), part, at))
                at += len(text)
    for name, pick in ((WORDS, _words_of), (FAILED, _failure_of)):
        temporary = folder / f".{name}.new"
        try:
            with temporary.open("w", encoding="utf-8") as file:
                for _, part, at in sorted(places, key=lambda place: place[0]):
                    with part.open("rb") as source:
                        source.seek(at)
                        file.writelines(map(line, pick(json.loads(source.readline()))))
            os.replace(temporary, folder / name)
        except OSError as error:
            raise OutputError(f"can't write {folder / name}: {error.strerror or error}") from error


def _words_of(record: dict[str, Any]) -> list[Row]:
    return record.get("words", [])


def _failure_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [record] if "error" in record else []


def _same_options(folder: Path, options: Options) -> None:
    path = folder / RUN
    mine = asdict(options)
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(name != LOCK for name in os.listdir(folder)):
            raise OutputError(f"{folder} holds something else; choose an empty folder") from None
        atomic_write(path, json.dumps(mine, indent=1) + "\n")
        return
    except (OSError, ValueError) as error:
        raise OutputError(f"{path}: can't be read ({error})") from error
    other = [f"{name} {theirs.get(name)!r}, not {value!r}" for name, value in mine.items() if theirs.get(name) != value]
    if other:
        raise OutputError(f"{folder} was begun with {'; '.join(other)}: choose another folder, or the same options")


def _tidied(folder: Path) -> list[Path]:
    """The finished parts; what a killed run left of an unfinished one is removed."""
    for left in (folder / PARTS).glob(".*.jsonl.*"):
        left.unlink(missing_ok=True)
    return parts(folder)


LOCK = ".lock"
_held: list[Any] = []
"""Open files that lock folders."""


def let_go() -> None:
    """In a process that was forked off a run: closes its copies of the run's locks, so that they end with the run."""
    while _held:
        _held.pop().close()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps a second run out of the folder. The system lets go of the lock however the run ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise OutputError(f"can't make the folder {folder}: {error.strerror or error}") from error
    with file:
        with suppress(ImportError):  # where there is no such lock, a second run is the user's to avoid
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OutputError(f"another run is at work in {folder}; wait for it, or end it") from None
        _held.append(file)
        try:
            yield
        finally:
            _held.remove(file)


def _folder_name(name: str) -> str:
    """The image's name as that of a folder: no path leads out of ``images/``, and two images never share one."""
    plain = re.sub(r"[^\w.-]+", "_", name).lstrip(".")[-100:]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
