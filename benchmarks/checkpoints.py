"""How closely captioners that are read from files of published structure score as their authors' own code does.

Run from the repository's root (about ten seconds):

    python benchmarks/checkpoints.py

The published weights themselves can't be had by a program; the files are written by the tests' samples
(``tests/captioners/published/samples.py``), of the same structure and in small: keys, pickled classes, containers.
Each is opened by ``captionfix.load`` and compared with a plain reimplementation of its author's code on two images and
random words. Prints a Markdown table: the largest difference of logits (of log-probabilities where the author's code
gives these), what the samples' scores span, and the seconds to open.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "captioners" / "published")]

from samples import CASES, difference, some_tokens  # noqa: E402

import captionfix  # noqa: E402


def main() -> None:
    torch.set_num_threads(1)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 97, 3), dtype=np.uint8))
    print("| captioner | structure tested | input | difference | of a span of | opened in |")
    print("|---|---|---|---|---|---|")
    for name, write in CASES.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            sample = write(Path(folder))
            began = time.perf_counter()
            captioner = captionfix.load(folder)
            seconds = time.perf_counter() - began
            pixels = captioner.prepare(image).pixels
            batch, tokens = torch.stack([pixels, pixels.flip(2)]), some_tokens(sample)
            with torch.no_grad():
                scores = sample.scores(batch, tokens)
            print(
                f"| {name} | {sample.structure} | {pixels.shape[1]} x {pixels.shape[2]} "
                f"| {difference(sample, captioner, batch, tokens):.1e} | {float(scores.max() - scores.min()):.1f} "
                f"| {seconds:.2f} s |",
                flush=True,
            )


if __name__ == "__main__":
    main()
