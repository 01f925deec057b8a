"""Unravels every CNN of torchvision's registry, transformers' and (where installed) timm's, and prints a table: name,
kinds of operation met, worst conservation error, least part of a class's mass that reached the pixels, seconds to
classify and to unravel one class with the default policy.

    python benchmarks/architectures.py                         # all, 127 x 131 pixels
    python benchmarks/architectures.py resnet18 "regnet_y_.*"  # those whose names match
    python benchmarks/architectures.py --list

Weights are random: nothing is downloaded. Sizes are odd on purpose. The architectures are those of the tests
(``tests/unravel/cnns.py``).
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torchvision
from torch import nn

from captionfix.errors import CaptionfixError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "unravel"))
from cnns import (
    TIMM,
    awake,
    excluded,
    family,
    measure,
    timm_cnn,
    torchvision_cnn,
    transformers_cnns,
)


def every() -> dict[str, Callable[[], nn.Module]]:
    """All architectures by name, and how each is made."""
    made: dict[str, Callable[[], nn.Module]] = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        known = family(name)
        if known is not None:
            made[f"torchvision {name}"] = partial(torchvision_cnn, name, **known.options)
    made.update({f"transformers {name}": make for name, make in transformers_cnns(tiny=False).items()})
    if find_spec("timm") is not None:
        made.update({f"timm {name}": partial(timm_cnn, name) for name in TIMM})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="patterns of names; none for all")
    parser.add_argument("--height", type=int, default=127)
    parser.add_argument("--width", type=int, default=131)
    parser.add_argument("--policies", default="default", help="checked for conservation, with commas between")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="show the names and end")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = {
        name: make
        for name, make in every().items()
        if not options.names or any(re.fullmatch(pattern, name.split(" ", 1)[1]) for pattern in options.names)
    }
    if options.list:
        print("\n".join(chosen))
        return
    size, policies = (options.height, options.width), tuple(options.policies.split(","))
    print(f"{size[0]} x {size[1]} pixels, {options.threads} thread(s), policies {', '.join(policies)}", flush=True)
    print(
        "| name | operations | error | reached pixels | classify s | unravel s |\n|---|---|---|---|---|---|", flush=True
    )
    failed, kinds = 0, set()
    for name, make in chosen.items():
        torch.manual_seed(0)
        try:
            # timm's TensorFlow-style and anti-aliased members want even sizes
            each = (128, 128) if name.startswith("timm") else size
            found = measure(awake(make(), each), each, policies=policies)
        except (CaptionfixError, RuntimeError, ValueError) as error:
            failed += 1
            print(f"| {name} | FAILED: {' '.join(str(error).split())} | | | | |", flush=True)
            continue
        finally:
            gc.collect()
        kinds.update(found.operations)
        failed += not found.equal or found.error >= 1e-4
        print(
            f"| {name} | {', '.join(found.operations)} | {found.error:.1e} | {found.reached:.2f} | "
            f"{found.classify:.2f} | {found.unravel:.2f} |{'' if found.equal else ' logits differ'}",
            flush=True,
        )
    print(
        f"\n{len(chosen)} architectures, {failed} failed; {len(kinds)} kinds of operation: {', '.join(sorted(kinds))}"
    )
    left_out = {
        name: excluded(name) for name in torchvision.models.list_models(module=torchvision.models) if excluded(name)
    }
    print("left out of torchvision's registry:")
    for reason in dict.fromkeys(left_out.values()):
        print(f"- {', '.join(name for name, why in left_out.items() if why == reason)}: {reason}")
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
