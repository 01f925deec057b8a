"""Images per second of `captionfix ground` beside single calls of `captionfix.explain`, in turn in one process.

    python benchmarks/folders.py PHOTOS --count 24 --threads 1

Both load the captioner once and make the captions themselves (the same beam search). The folder's time has all that the
command does: readers started, captioner loaded, rows written and put in order. The single calls' has the loading of the
captioner and the reading of each image, and nothing is written. One call before them is not timed. Seconds of all
processors together, those of the readers among them, hold also on a machine that has other work.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

import captionfix
from captionfix.ground import Item, Options, ground, items


def single(files: Sequence[Item], options: Options) -> int:
    """Words explained, an image a call."""
    model = captionfix.load(options.captioner)
    return sum(
        len(captionfix.explain(model, file.file, method=options.method, policy=options.policy, beams=options.beams))
        for file in files
    )


def folder(files: Sequence[Item], options: Options, workers: int, batch: int | None) -> int:
    """Words explained, as the command does it."""
    with tempfile.TemporaryDirectory() as place:
        listed = Path(place) / "list.txt"
        listed.write_text("".join(f"{Path(file.file).absolute()}\n" for file in files), encoding="utf-8")
        ground(listed, Path(place) / "out", options, workers=workers, batch=batch)
        return len((Path(place) / "out" / "words.jsonl").read_text(encoding="utf-8").splitlines())


def main() -> None:
    """Prints a line a policy and way: seconds, images per second, times the single calls' rate, processors' time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, help="a folder of images, or a list as for captionfix ground")
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--captioner", default="photos")
    parser.add_argument("--policies", default="default,thorough")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batches", default="1,8,auto", help="images at once; auto: what fits into memory")
    parser.add_argument("--rounds", type=int, default=1, help="each way is run so often, in turn; the best counts")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    files = items(asked.photos)[: asked.count]
    sizes = {name: None if name == "auto" else int(name) for name in asked.batches.split(",")}
    print("policy    way               seconds  images/s  times single  processors' seconds  images/s")
    for policy in asked.policies.split(","):
        options = Options(asked.captioner, policy=policy)
        ways: dict[str, Callable[[Sequence[Item]], int]] = {"single calls": partial(single, options=options)}
        for name, size in sizes.items():
            ways[f"folder, batch {name}"] = partial(folder, options=options, workers=asked.workers, batch=size)
        single(files[:1], options)  # what is made once
        best = dict.fromkeys(ways, (float("inf"), float("inf")))
        words = {}
        for _ in range(asked.rounds):
            for name, way in ways.items():
                begun, used = time.perf_counter(), sum(os.times()[:4])
                words[name] = way(files)
                taken = time.perf_counter() - begun, sum(os.times()[:4]) - used
                best[name] = min(best[name][0], taken[0]), min(best[name][1], taken[1])
        if len(set(words.values())) != 1:
            sys.exit(f"not the same words: {words}")
        for name, (seconds, used) in best.items():
            rates = f"{len(files) / seconds:8.2f}  {best['single calls'][0] / seconds:12.2f}"
            print(f"{policy:8}  {name:16}  {seconds:7.1f}  {rates}  {used:19.1f}  {len(files) / used:8.2f}", flush=True)


if __name__ == "__main__":
    main()
