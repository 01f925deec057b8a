"""What explaining costs beside captioning: seconds of each part, and the ratio to captioning measured in the same run.

    python benchmarks/speed.py --threads 2

Captioning is one encode and one teacher-forced decode of ten words. MobileNetV2 is the bundled photo captioner,
ResNet-50 the same decoder on that CNN with random weights. Medians of ``--repeat`` rounds, all parts in each round.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

import captionfix
from captionfix import map_to_pixels, word_to_map
from captionfix.captioners import models
from captionfix.captioners.captioner import Captioner
from captionfix.captioners.pretrained import PretrainedCaptioner
from captionfix.explain import METHODS
from captionfix.images import read_image
from captionfix.unravel import Policy

WORDS = 10


def resnet50(like: PretrainedCaptioner) -> PretrainedCaptioner:
    """The photo captioner's decoder on a ResNet-50, random weights."""
    settings = {
        k: v for k, v in like.model.config.to_dict().items() if k not in ("cnn", "feature_size", "architectures")
    }
    torch.manual_seed(0)
    config = models.ShowAttendTellConfig(cnn={"model_type": "resnet"}, feature_size=2048, **settings)
    return PretrainedCaptioner(models.ShowAttendTellModel(config), like.tokenizer, like.processor, "resnet-50")


def measure(captioner: Captioner, repeat: int) -> dict[str, float]:
    """Median seconds of each part."""
    from matplotlib import cbook

    pixels = captioner.prepare(read_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))).pixels[None]
    ids = tuple(np.random.default_rng(0).integers(4, 100, WORDS).tolist())
    caption = word_to_map.Caption(captioner.vocabulary.start, ids)
    policy = Policy.named("default")
    tokens = caption.inputs(pixels.device)
    encoded = map_to_pixels.encode(captioner, pixels)
    features = encoded.features
    with torch.inference_mode():
        found = word_to_map.flow(captioner, features, caption, policy)
        evidence = METHODS["joined"](captioner, features, caption, found).evidence
    parts: dict[str, Callable[[], object]] = {
        "caption": lambda: captioner.logits(pixels, tokens),
        "encode": lambda: captioner.encode(pixels),
        "encode, recorded": lambda: map_to_pixels.encode(captioner, pixels),
        "removal": lambda: word_to_map.removal(captioner, features, caption),
        "flow": lambda: word_to_map.flow(captioner, features, caption, policy),
        "unravel to pixels": lambda: map_to_pixels.pixels(encoded, evidence, policy),
        "unravel, paper": lambda: map_to_pixels.pixels(encoded, evidence, Policy.named("paper")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    with torch.inference_mode():
        for _ in range(repeat + 1):
            for name, part in parts.items():
                begin = time.perf_counter()
                part()
                seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(each[1:])) for name, each in seconds.items()}  # the first round warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    photos = captionfix.load("photos")
    assert isinstance(photos, PretrainedCaptioner)
    for name, captioner in (("MobileNetV2", photos), ("ResNet-50", resnet50(photos))):
        seconds = measure(captioner, options.repeat)
        print(f"{name}, 224 pixels, {WORDS} words, {options.threads} threads")
        for part, value in seconds.items():
            print(f"  {part:20} {value * 1000:8.1f} ms   {value / seconds['caption']:6.2f} of captioning")


if __name__ == "__main__":
    main()
