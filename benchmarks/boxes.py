"""How well `word.box()` fits what the word speaks of: IoU with the best box of each phrase whose last word it is.

    python benchmarks/boxes.py scenes --limit 100
    python benchmarks/boxes.py PHOTOS --first 500 --limit 100 --methods default,joined,gradcam

Beside it the box of the whole image, which photographs' large objects fill well. The captions are people's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice

import captionfix
from captionfix.evaluate import boxes
from captionfix.evaluate.data import WHOLE
from captionfix.evaluate.metrics import mean
from captionfix.evaluate.published import open_data
from captionfix.evaluate.run import ids_of
from captionfix.explain import explain_ids, settle


def scores(data: str, methods: Sequence[str], first: int, limit: int) -> dict[str, list[tuple[int, float]]]:
    """(picture, IoU) of each phrase, by method, and of the whole image."""
    captioner = captionfix.load("scenes" if data == "scenes" else "photos")
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in ("whole image", *methods)}
    read = open_data(data, first + limit, first=100_000)
    for number, item in islice(enumerate(read()), first, None):
        ids = ids_of(captioner, item.words)
        width, height = item.image.size
        wanted = [phrase for phrase in item.phrases if phrase.all_boxes and phrase.words[-1] < len(ids)]
        found["whole image"] += [(number, boxes.best_iou(WHOLE, phrase.all_boxes)) for phrase in wanted]
        for method in methods:
            (explained,) = explain_ids(captioner, [item.image], [ids], settle(captioner, method))
            for phrase in wanted:
                box = explained[phrase.words[-1]].box()
                part = None if box is None else (box[0] / width, box[1] / height, box[2] / width, box[3] / height)
                score = 0.0 if part is None else boxes.best_iou(part, phrase.all_boxes)
                found[method].append((number, score))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="IoU of word.box() with phrases' boxes.")
    parser.add_argument("data", help="as for captionfix evaluate")
    parser.add_argument("--methods", default="default", help="names with commas, policies behind colons")
    parser.add_argument("--first", type=int, default=0, help="pictures to leave out")
    parser.add_argument("--limit", type=int, default=100, help="pictures to take")
    options = parser.parse_args()
    found = scores(options.data, options.methods.split(","), options.first, options.limit)
    for name, values in found.items():
        pictures, each = zip(*values, strict=True)
        hits = [float(score > boxes.HIT) for score in each]
        print(f"{name:24} IoU {mean(each, pictures)}   above {boxes.HIT} {mean(hits, pictures)}")


if __name__ == "__main__":
    main()
