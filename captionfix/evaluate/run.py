"""Runs methods over data: one record a picture and method, written as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from ..captioners.captioner import Captioner
from ..errors import CaptionfixError, OutputError, PolicyError
from ..explain import settle
from ..files import atomic_write
from .data import Grounded, generated
from .measure import Plan, Record, Subject, measure


def subjects(
    captioner: Captioner, items: Iterable[Grounded], plan: Plan, skip: Callable[[int], bool]
) -> Iterator[Subject]:
    """The pictures that are not done yet, each with its caption as ids (words it does not know as its unknown word)."""
    for number, item in enumerate(items):
        if skip(number):
            continue
        one = generated(captioner, item, plan.beams) if plan.captions == "model" else item
        yield Subject(captioner, one, number, plan, one.image, ids_of(captioner, one.words))


def ids_of(captioner: Captioner, words: Sequence[str]) -> tuple[int, ...]:
    """A caption's words as ids, as many as the captioner takes; a word it does not know as its unknown word."""
    unknown = captioner.vocabulary.unknown
    ids = [captioner.vocabulary.id(word) for word in words[: captioner.max_words]]
    return tuple(i if i is not None else unknown if unknown is not None else captioner.vocabulary.end for i in ids)


def run(
    captioner: Captioner,
    read: Callable[[], Iterator[Grounded]],
    plan: Plan,
    out: Path,
    tell: Callable[[int, str], None] = lambda done, what: None,
) -> tuple[list[Record], dict[str, str]]:
    """Measures what `out` does not hold yet. A run that was cut off at any moment goes on where it was.

    Args:
        captioner: that the plan names.
        read: gives the data; called again where the words of all captions are asked for.
        plan: what is measured.
        out: folder of ``plan.json`` and ``scores.jsonl``, a line a picture and method.
        tell: called with the number of records and what is done now.

    Returns:
        all records of the plan's methods and pictures, and why methods were left out that this captioner can't follow.

    Raises:
        OutputError: `out` holds a run of another plan, or can't be written.
        PolicyError: a method does not exist, or none is left.
    """
    for method in plan.methods:
        settle(captioner, method)
    records = _begin(out, plan)
    done = {(r.image, r.method) for r in records}
    left_out: dict[str, str] = {}
    classes: frozenset[str] = frozenset()
    if "f1" in plan.metrics:
        classes = frozenset(name for item in read() for r in item.references for name, _ in r.mentions.boxed)
    with (out / "scores.jsonl").open("a", encoding="utf-8") as file:
        missing = lambda number: all((number, method) in done for method in plan.methods)  # noqa: E731
        for subject in subjects(captioner, read(), plan, missing):
            if not subject.ids:
                continue
            for method in plan.methods:
                if method in left_out or (subject.number, method) in done:
                    continue
                tell(len(records), f"{subject.item.name}: {method}")
                try:
                    record = measure(subject, method, classes)
                except PolicyError as error:
                    left_out[method] = str(error)
                    if len(left_out) == len(plan.methods):
                        raise
                    continue
                file.write(record.line() + "\n")
                file.flush()
                os.fsync(file.fileno())
                records.append(record)
    tell(len(records), "done")
    wanted = [r for r in records if r.method in plan.methods and (plan.limit is None or r.image < plan.limit)]
    return sorted(wanted, key=lambda r: (plan.methods.index(r.method), r.image)), left_out


def _begin(out: Path, plan: Plan) -> list[Record]:
    """What `out` holds already, its last line cut off if it was not written to its end."""
    mine, place = plan.as_dict(), out / "plan.json"
    try:
        if place.exists():
            theirs = json.loads(place.read_text(encoding="utf-8"))
            may_grow = ("methods", "limit")
            other = sorted(key for key in mine if key not in may_grow and mine[key] != theirs.get(key))
            if other:
                told = ", ".join(f"{key} {theirs.get(key)!r} there, {mine[key]!r} here" for key in other)
                raise OutputError(f"{out} holds an evaluation of another kind ({told}); choose another folder")
        elif out.is_dir() and any(out.iterdir()):
            raise OutputError(f"{out} holds something that is no evaluation; choose another folder")
        atomic_write(place, json.dumps(mine, indent=1) + "\n")
        path = out / "scores.jsonl"
        if not path.exists():
            return []
        whole = path.read_bytes()
        kept = whole[: whole.rfind(b"\n") + 1]
        if len(kept) < len(whole):
            os.truncate(path, len(kept))
        return [Record.read(line) for line in kept.decode().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CaptionfixError):
            raise
        raise OutputError(f"{out}: can't go on from what is there ({error}); choose another folder") from error


def fingerprint(captioner: Captioner) -> str:
    """Sixteen characters that say whether weights are the same."""
    digest = hashlib.sha256()
    model = getattr(captioner, "model", None)
    if isinstance(model, torch.nn.Module):
        for name, value in model.state_dict().items():
            digest.update(
                name.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:16]
