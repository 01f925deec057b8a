"""How well evidence is conserved on random captioners: all leaves and the bias must hold a word's whole mass, 1.

Run from the repository's root (about a second for two networks):

    python benchmarks/invariants.py --networks 200 --seed 0

The networks are those of the engine's property tests (``tests/unravel/networks.py``): random stacks of
convolutions, norms, activations, poolings, residuals, concatenations, shuffles and gates under random LSTM,
GRU and attention decoders, float32, random weights. Prints a line for each policy: the worst error of a
word's total, and where it was.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unravel")]

from networks import FOLLOWED, captioner  # noqa: E402

from captionfix.unravel import Trace, start, walk  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, words, operations = time.perf_counter(), 0, 0
    kinds: set[str] = set()
    shares: list[float] = []
    worst = dict.fromkeys(FOLLOWED, (0.0, options.seed))
    for seed in range(options.seed, options.seed + options.networks):
        network, pixels, tokens = captioner(random.Random(seed).choice)
        with Trace(network) as trace:
            image = trace.slot(trace.watch("image", pixels))
            trace.watch("tokens", tokens)
            logits = network(pixels, tokens)
            target = trace.slot(logits)
        scores = target.read()
        best = scores.argmax(-1).flatten() + torch.arange(scores[..., 0].numel()) * scores.shape[-1]
        words, operations = words + len(best), operations + len(trace.operations)
        kinds.update(operation.name for operation in trace.operations)
        for name, policy in FOLLOWED.items():
            account = walk(trace, [(target, start(target, best))], policy)
            shares += account.share(image).tolist()
            worst[name] = max(worst[name], (float((account.total() - 1).abs().max()), seed))
    print(
        f"{options.networks} random networks, {operations} operations of {len(kinds)} kinds, {words} words, "
        f"{time.perf_counter() - began:.0f} s; float32\n"
        f"mass that ends in the image: {sum(shares) / len(shares):.2f} on average"
    )
    for name, (error, seed) in worst.items():
        print(f"{name:>18}: worst |total - 1| = {error:.2e} (network {seed})")
    print(f"{'all':>18}: worst |total - 1| = {max(worst.values())[0]:.2e}")


if __name__ == "__main__":
    main()
