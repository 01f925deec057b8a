"""Is the evidence in the right place? Ways to explain, beside each other, on generated scenes and on photographs with
phrase boxes.

    python benchmarks/grounding.py scenes --count 500
    python benchmarks/grounding.py scenes --count 200 --split held-out
    python benchmarks/grounding.py photos --data ../shared/photos/dev.jsonl --count 300

Prints, for every way and for raw and specific maps, the pointing game, the mass inside and (photographs) word
discrimination, each a mean with a 95 % bootstrap interval over images, and the count. ``--out FILE`` also writes every
single score as JSON lines, from which a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch

import captionfix
from captionfix.evaluate import data, metrics
from captionfix.evaluate.compare import BASELINES, UPSAMPLED, WAYS, compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scenes", "photos"])
    parser.add_argument("--captioner", help="default: the bundled one of that name")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=100_000, help="scenes: seed of the first")
    parser.add_argument("--split", default="test", choices=["test", "held-out"], help="scenes: which")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/photos/dev.jsonl"), help="photos: a file in the lines format"
    )
    parser.add_argument("--ways", default=",".join([*WAYS, UPSAMPLED, *BASELINES]))
    parser.add_argument("--sigma", type=float, help="of the maps' Gaussian, a fraction of the CNN's input")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    captioner = captionfix.load(options.captioner or options.what)
    if options.what == "scenes":
        items = data.scenes(options.count, options.first, options.split)
    else:
        items = data.lines(options.data, options.count)
    rows = (
        [json.loads(line) for line in options.out.read_text().splitlines()]
        if options.out and options.out.exists()
        else []
    )
    done = 1 + max((row["image"] for row in rows), default=-1)
    found = compare(captioner, itertools.islice(items, done, None), options.ways.split(","), options.sigma)
    for number, each in enumerate(found, done):
        fresh = [
            {
                "way": r.way,
                "specific": r.specific,
                "image": number,
                "kind": s.kind,
                "metric": s.metric,
                "value": s.value,
            }
            for r in each
            for s in r.scores
        ]
        rows += fresh
        if options.out:
            with options.out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in fresh)
        print(f"\r{number + 1} / {options.count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    report(rows)


def report(rows: list[dict]) -> None:  # type: ignore[type-arg]
    """A table: a line for each way and kind of map."""
    names = list(dict.fromkeys((row["way"], row["specific"]) for row in rows))
    kinds = [k for k in dict.fromkeys(row["kind"] for row in rows) if k in data.CONTENT]
    for way, specific in names:
        mine = [row for row in rows if row["way"] == way and row["specific"] == specific]
        cells = []
        for metric in ("pointing", "mass", "discrimination"):
            chosen = [row for row in mine if row["metric"] == metric]
            if chosen and not (kinds and metric == "discrimination"):
                cells.append(f"{metric} {metrics.mean([r['value'] for r in chosen], [r['image'] for r in chosen])}")
        for kind in kinds:
            of_kind = [row for row in mine if row["kind"] == kind]
            pair = [metrics.mean([r["value"] for r in of_kind if r["metric"] == m]).value for m in ("pointing", "mass")]
            cells.append(f"{kind} {pair[0]:.3f} / {pair[1]:.3f}")
        print(f"{way + (', specific' if specific else ''):28}" + "  ".join(cells))


if __name__ == "__main__":
    main()
