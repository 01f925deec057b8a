"""How much better one method scored than each other, picture by picture, from the folder of a `captionfix evaluate`.

    python benchmarks/differences.py FOLDER --method default

Intervals of two methods on the same pictures may overlap though one is better on most of them. So each phrase's (or
pair's) two scores are subtracted first; their mean has a 95 % bootstrap interval over pictures. What is not defined
for one of the two is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from captionfix.evaluate.measure import Record
from captionfix.evaluate.metrics import Mean, mean

Scores = dict[tuple[str, str], dict[int, list[float]]]
"""By kind of map and metric, then picture."""


def scores(records: Sequence[Record]) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    for record in records:
        mine = found.setdefault(record.method, {})
        for maps, _, metric, value in record.scores:
            mine.setdefault((maps, metric), {}).setdefault(record.image, []).append(value)
    return found


def difference(ours: dict[int, list[float]], theirs: dict[int, list[float]]) -> Mean:
    """Ours minus theirs, on the pictures that both have."""
    both = sorted(ours.keys() & theirs.keys())
    pairs = [(image, a - b) for image in both for a, b in zip(ours[image], theirs[image], strict=True)]
    return mean([value for _, value in pairs], [image for image, _ in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description="Differences between methods, picture by picture.")
    parser.add_argument("folder", type=Path, help="what captionfix evaluate wrote")
    parser.add_argument("--method", default="default", help="the method that the others are compared with")
    parser.add_argument("--metrics", default="pointing,mass,discrimination,discrimination-joint")
    options = parser.parse_args()
    lines = (options.folder / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    found = scores([Record.read(line) for line in lines])
    if options.method not in found:
        parser.error(f"{options.folder} has no scores of {options.method}; it has {', '.join(sorted(found))}")
    ours, metrics = found.pop(options.method), options.metrics.split(",")
    if not any(metric in metrics for _, metric in ours):
        known = ", ".join(sorted({metric for _, metric in ours}))
        parser.error(f"{options.folder} has no scores in {options.metrics}; it has {known}: name some with --metrics")
    for maps in ("raw", "specific"):
        for metric in metrics:
            for name, theirs in found.items():
                if (maps, metric) in ours and (maps, metric) in theirs:
                    print(f"{maps:9}{metric:22}{name:20}{difference(ours[maps, metric], theirs[maps, metric])}")


if __name__ == "__main__":
    main()
