"""What explaining costs beside captioning: seconds of each part, and ratios measured in turn in one run.

    python benchmarks/speed.py parts --threads 2      # CNNs x decoders, beside Grad-CAM and integrated gradients
    python benchmarks/speed.py curves --threads 2     # words, images in a batch, pixels
    python benchmarks/speed.py batch --device cuda    # 16 images at once, also on a GPU
    python benchmarks/speed.py memory --threads 2     # peak memory of captioning and of explaining
    CAPTIONFIX_COMPILED=0 python benchmarks/speed.py  # without the compiled loops (they need numba)

Captioning is one encode and one teacher-forced decode of the caption's words: the least that anybody can do. The
weights of the CNNs and decoders other than the bundled photo captioner's (MobileNetV2 with attention) are random: speed
depends on their shapes. Medians of ``--repeat`` rounds; every round runs each part once.
"""

from __future__ import annotations

import argparse
import gc
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import captionfix
from captionfix import map_to_pixels, word_to_map
from captionfix.captioners import models
from captionfix.captioners.captioner import Captioner
from captionfix.captioners.pretrained import PretrainedCaptioner
from captionfix.evaluate import methods
from captionfix.explain import settle
from captionfix.legs import METHODS, Leg, followed, unraveled, weighed
from captionfix.unravel import Policy

# name: (CNN, its channels, side of its input)
CNNS: dict[str, tuple[dict[str, str] | None, int, int]] = {
    "photos": (None, 1280, 320),  # the bundled captioner as it comes
    "MobileNetV2": (None, 1280, 224),  # the same on smaller images
    "ResNet-50": ({"model_type": "resnet"}, 2048, 224),
    "VGG-16": ({"torchvision": "vgg16"}, 512, 224),
    "Inception v3": ({"torchvision": "inception_v3"}, 2048, 299),
}
DECODERS = ("attention", "show-tell")
POLICIES = {name: Policy.named(name) for name in ("default", "fast", "thorough", "paper")}


def build(cnn: str, decoder: str) -> PretrainedCaptioner:
    """The bundled photo captioner, or one of its sizes with another CNN or decoder and random weights."""
    photos = captionfix.load("photos")
    assert isinstance(photos, PretrainedCaptioner)
    settings, channels, _ = CNNS[cnn]
    if settings is None and decoder == "attention":
        return photos
    own = photos.model.config.to_dict()
    options = {k: v for k, v in own.items() if k not in ("cnn", "feature_size", "architectures", "model_type")}
    options.update(cnn=settings or own["cnn"], feature_size=channels)
    torch.manual_seed(0)
    model: models.CaptionerModel
    if decoder == "attention":
        model = models.ShowAttendTellModel(models.ShowAttendTellConfig(**options))
    else:
        for key in ("positions", "value_size", "attention_size", "tie_words"):
            options.pop(key, None)
        model = models.ShowTellModel(models.ShowTellConfig(pool=1, **options))
    for module in model.modules():  # random weights with the spread of trained ones, or most neurons would be silent
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return PretrainedCaptioner(model.eval(), photos.tokenizer, photos.processor, f"{cnn}, {decoder}")


def picture(side: int, count: int = 1) -> Tensor:
    """(count, 3, side, side): a photograph that matplotlib ships, in [-1, 1]."""
    from matplotlib import cbook

    from captionfix.images import read_image

    image = read_image(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)).resize((side, side))
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 127.5 - 1
    return pixels.expand(count, -1, -1, -1).contiguous()


def caption_of(captioner: PretrainedCaptioner, words: int) -> word_to_map.Caption:
    ids = np.random.default_rng(0).integers(4, 100, words).tolist()
    return word_to_map.Caption(captioner.vocabulary.start, tuple(ids))


def everything(captioner: Captioner, pixels: Tensor, caption: word_to_map.Caption, policy: Policy) -> Tensor:
    """All words of all images explained, from pixels to pixels, as `explain` does it: (images x words, H, W)."""
    encoded = None if policy.tables and len(pixels) > 1 else map_to_pixels.encode(captioner, pixels)
    features = captioner.encode(pixels) if encoded is None else encoded.features
    found = word_to_map.flows(captioner, features, [caption] * len(pixels), policy)
    each = zip(pixels.split(1), features.split(1), found, strict=True)
    legs = [METHODS["joined"](captioner, image, own, caption, flow, policy) for image, own, flow in each]
    policy = followed(policy, legs)
    if encoded is None:
        parts = zip(pixels.split(1), legs, strict=True)
        return torch.cat([unraveled(map_to_pixels.encode(captioner, p), [leg], policy)[0] for p, leg in parts])
    return torch.cat(unraveled(encoded, legs, policy, range(len(pixels))))


def mapped(method: str, captioner: PretrainedCaptioner, pixels: Tensor, caption: word_to_map.Caption) -> list[Tensor]:
    """Another tool's maps of all words of each image."""
    maps, options = methods.resolve(method)
    return [maps(captioner, part, captioner.encode(part), caption, **options) for part in pixels.split(1)]


class Dispatched(TorchDispatchMode):
    """Sees every operation and does nothing: what recording can't be cheaper than."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def dispatched(captioner: PretrainedCaptioner, pixels: Tensor) -> Tensor:
    with Dispatched():
        return captioner.encode(pixels)


def removals(captioner: PretrainedCaptioner, features: Tensor, caption: word_to_map.Caption) -> list[Tensor]:
    """Each image's."""
    return [word_to_map.removal(captioner, one, caption) for one in features.split(1)]


def finished() -> None:
    """Waits for a GPU, which works on after a call has returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_turn(parts: dict[str, Callable[[], object]], repeat: int) -> dict[str, float]:
    """Median seconds of each part; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(repeat + 1):
        for name, part in parts.items():
            finished()
            begin = time.perf_counter()
            part()
            finished()
            seconds[name].append(time.perf_counter() - begin)
    return {name: float(np.median(each[1:])) for name, each in seconds.items()}


def parts(names: list[str], repeat: int, slow: bool) -> None:
    for cnn in names:
        side = CNNS[cnn][2]
        for decoder in DECODERS if cnn != "photos" else DECODERS[:1]:
            captioner = build(cnn, decoder)
            pixels, caption = picture(side), caption_of(captioner, 10)
            tokens = caption.inputs(pixels.device)
            default = POLICIES["default"]
            encoded = map_to_pixels.encode(captioner, pixels)
            features = encoded.features
            found = word_to_map.flow(captioner, features, caption, default)
            measured: dict[str, Callable[[], object]] = {
                "caption": partial(captioner.logits, pixels, tokens),
                "encode": partial(captioner.encode, pixels),
                "encode, dispatched": partial(dispatched, captioner, pixels),
                "encode, recorded": partial(map_to_pixels.encode, captioner, pixels),
                "removal": partial(word_to_map.removal, captioner, features, caption),
                "flow": partial(word_to_map.flow, captioner, features, caption, default),
            }
            policies = dict(POLICIES)
            if cnn == "photos":
                policies["own setting"] = settle(captioner).policy
            for name, policy in policies.items():
                leg = METHODS["joined"](captioner, pixels, features, caption, found, policy)
                measured[f"unravel, {name}"] = partial(unraveled, encoded, [leg], followed(policy, [leg]))
            for name in ("default", "thorough"):
                measured[f"all of it, {name}"] = partial(everything, captioner, pixels, caption, POLICIES[name])
            others = ["gradcam", "gradcam-shipped", *(["integrated-gradients"] if slow else [])]
            for other in others:
                measured[other] = partial(mapped, other, captioner, pixels, caption)
            with torch.inference_mode():
                seconds = in_turn(measured, repeat)
            print(f"{cnn}, {decoder}: {side} pixels, 10 words, {torch.get_num_threads()} threads")
            for part, value in seconds.items():
                print(f"  {part:24} {value * 1000:9.1f} ms {value / seconds['caption']:9.2f} of captioning", flush=True)


def invented(features: Tensor, words: int, decoder: str, policy: Policy) -> list[Leg]:
    """Legs as the default's, with random evidence for each word of each image of a batch."""
    places = torch.rand(len(features), words, *features.shape[2:], device=features.device)
    once = decoder == "show-tell"
    pairs = zip(features, places, strict=True)
    return [weighed(map_to_pixels.channels(one, place), place, once, policy) for one, place in pairs]


def started(
    captioner: PretrainedCaptioner, pixels: Tensor, words: int, decoder: str, policy: Policy
) -> Callable[[], object]:
    """Unravels invented legs as `explain` does: with full tables image by image, else all at once."""
    kept = followed(policy, invented(captioner.encode(pixels[:1]), words, decoder, policy))
    passes = [map_to_pixels.encode(captioner, part) for part in pixels.split(1 if kept.tables else len(pixels))]
    legs = [invented(each.features, words, decoder, policy) for each in passes]
    return lambda: [unraveled(each, own, kept, range(len(own))) for each, own in zip(passes, legs, strict=True)]


def curves(decoder: str, repeat: int) -> None:
    captioner = build("MobileNetV2", decoder)
    settings = [
        *((words, 1, 224) for words in (1, 2, 5, 10, 20, 40)),
        *((10, images, 224) for images in (4, 16, 32)),
        *((10, 1, side) for side in (448, 1024)),
    ]
    print("words  images  pixels   caption ms   default ms   ratio      fast ms   ratio")
    for words, images, side in settings:
        pixels, caption = picture(side, images), caption_of(captioner, words)
        tokens = caption.inputs(pixels.device).expand(images, -1)
        measured: dict[str, Callable[[], object]] = {"caption": partial(captioner.logits, pixels, tokens)}
        for name in ("default", "fast"):
            measured[name] = started(captioner, pixels, words, decoder, POLICIES[name])
        with torch.inference_mode():
            seconds = in_turn(measured, repeat)
        base, usual, few = (1000 * seconds[name] for name in ("caption", "default", "fast"))
        print(
            f"{words:5}  {images:6}  {side:6} {base:12.1f} {usual:12.1f} {usual / base:7.2f}"
            f" {few:12.1f} {few / base:7.2f}",
            flush=True,
        )


def batch(names: list[str], policies: list[str], repeat: int, images: int, device: str) -> None:
    """As `explain` does it for a list of images: with full tables image by image, else all at once."""
    on = torch.cuda.get_device_name(device) if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    print(f"{images} images, 10 words each, {on}; milliseconds for all, and how many times captioning")
    for cnn in names:
        side = CNNS[cnn][2]
        for decoder in DECODERS if cnn != "photos" else DECODERS[:1]:
            captioner = build(cnn, decoder)
            captioner.model.to(device)
            pixels, caption = picture(side, images).to(device), caption_of(captioner, 10)
            tokens, captions = caption.inputs(pixels.device).expand(images, -1), [caption] * images
            features = captioner.encode(pixels)
            measured: dict[str, Callable[[], object]] = {
                "caption": partial(captioner.logits, pixels, tokens),
                "caption, beam search": partial(captioner.generate, pixels, beams=3),
                "encode": partial(captioner.encode, pixels),
                "encode, recorded": partial(map_to_pixels.encode, captioner, pixels),
                "removal": partial(removals, captioner, features, caption),
                "flow": partial(word_to_map.flows, captioner, features, captions, POLICIES["default"]),
            }
            for name in policies:
                policy = POLICIES[name]
                measured[f"unravel, {name}"] = started(captioner, pixels, 10, decoder, policy)
                measured[f"all of it, {name}"] = partial(everything, captioner, pixels, caption, policy)
            measured["gradcam"] = partial(mapped, "gradcam", captioner, pixels, caption)
            print(f"{cnn}, {decoder}: {side} pixels", flush=True)
            base = math.nan
            for part, call in measured.items():
                with torch.inference_mode():
                    value = in_turn({part: call}, repeat)[part]
                base = value if part == "caption" else base
                print(f"  {part:24} {value * 1000:9.1f} ms {value / base:9.2f}", flush=True)


def memory(names: list[str], threads: int) -> None:
    """Each in a process of its own, since a process's peak never falls."""
    print(f"{'peak MiB':26} {'caption':>8} {'explain':>8} {'ratio':>8}   above the loaded captioner")
    for cnn in names:
        found = []
        for what in ("caption", "default"):
            command = [sys.executable, __file__, "peak", "--threads", str(threads), "--cnn", cnn, "--what", what]
            found.append([float(x) for x in subprocess.run(command, check=True, capture_output=True).stdout.split()])
        (caption, own), (explain, added) = found
        print(f"{cnn:26} {caption:8.0f} {explain:8.0f} {explain / caption:8.2f}   {own:.0f}, {added:.0f}", flush=True)


def peak(cnn: str, what: str) -> None:
    """Prints the process's peak in MiB, and how much of it is above the loaded captioner and libraries."""
    small = captionfix.load("scenes")  # libraries and compiled loops are there before the count begins
    everything(small, picture(128), word_to_map.Caption(small.vocabulary.start, (4, 5, 6)), POLICIES["default"])
    captioner = build(cnn, "attention")
    pixels, caption = picture(CNNS[cnn][2]), caption_of(captioner, 10)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    before = resident("VmRSS")
    with torch.inference_mode():
        if what == "caption":
            captioner.logits(pixels, caption.inputs(pixels.device))
        else:
            everything(captioner, pixels, caption, POLICIES[what])
    print(resident("VmHWM"), resident("VmHWM") - before)


def resident(field: str) -> float:
    """MiB of this process's memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["parts", "curves", "batch", "memory", "peak"], nargs="?", default="parts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--slow", action="store_true", help="integrated gradients with 50 steps too (minutes)")
    parser.add_argument("--cnn", choices=CNNS, help="only this one")
    parser.add_argument("--decoder", choices=DECODERS, default=DECODERS[0], help="for curves")
    parser.add_argument("--what", choices=["caption", *POLICIES], default="default", help="for peak")
    parser.add_argument("--policies", default="default,thorough", help="for batch")
    parser.add_argument("--images", type=int, default=16, help="for batch")
    parser.add_argument("--device", default="cpu", help="for batch: cpu, cuda, ...")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.table == "parts":
        parts([options.cnn] if options.cnn else list(CNNS), options.repeat, options.slow)
    elif options.table == "curves":
        curves(options.decoder, options.repeat)
    elif options.table == "batch":
        batch(
            [options.cnn] if options.cnn else list(CNNS),
            options.policies.split(","),
            options.repeat,
            options.images,
            options.device,
        )
    elif options.table == "memory":
        memory([options.cnn] if options.cnn else list(CNNS), options.threads)
    else:
        peak(options.cnn, options.what)


if __name__ == "__main__":
    main()
