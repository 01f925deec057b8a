"""Training of the project's captioners with `transformers.Trainer`: on scenes, on COCO, on photographs in lines.

A training keeps everything it needs to go on in a work folder beside its output (`OUT.work`): prepared data, the
Trainer's checkpoints, and `latest`, a captioner that can be loaded while training runs. The same call again goes on
where it was cut off. Several processes: `torchrun --nproc-per-node N --no-python captionfix train ...`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from captionfix.errors import DataError
from captionfix.train_data import (
    Captioned,
    Examples,
    Photographs,
    draw_scenes,
    encode_boxes,
    encode_captions,
    read_coco,
    read_lines,
    read_square,
)
from captionfix.train_fit import Fit, Precision, Run, fit, work_folder
from captionfix.train_start import Family, new_model, pretrained_cnn, started, take_cnn

if TYPE_CHECKING:
    from captionfix.captioners.models import CaptionerModel

# Basic blocks on 128 pixels, ending at an 8 x 8 map.
SCENE_CNN: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 24,
    "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 2],
    "layer_type": "basic",
}


def train_scenes(
    out: str | Path,
    *,
    family: Family = "show-attend-tell",
    scenes: int = 48_000,
    epochs: float = 3,
    tune_epochs: float = 0.5,
    batch: int = 64,
    rate: float = 1.5e-3,
    tune_rate: float = 4e-4,
    hidden: int = 256,
    start: str | Path | None = None,
    precision: Precision = "float32",
    half: bool = False,
    seed: int = 0,
    save_every: int = 500,
    max_steps: int = -1,
    work: str | Path | None = None,
) -> Path:
    """Trains a captioner of generated scenes: all at once from nothing, or, with ``start``, the decoder on another
    captioner's CNN first (on its kept features) and then everything.

    Args:
        out: the folder to write; it must not exist or be empty.
        family: "show-attend-tell" or "show-tell".
        scenes: number of training scenes (seeds 0, 1, ...); they are drawn once and kept in the work folder.
        epochs: passes through them; with ``start``, of the decoder alone.
        tune_epochs: with ``start``, of everything after that.
        batch: scenes a step.
        rate: highest learning rate.
        tune_rate: the same of the second stage.
        hidden: units of the LSTM and size of embeddings.
        start: a captioner of scenes whose CNN is the start; None trains the CNN from nothing too.
        precision: "float32", or mixed "bf16" or "fp16".
        half: store the weights in 16 bits.
        seed: of weights and order.
        save_every: steps between checkpoints.
        max_steps: ends earlier if positive.
        work: where checkpoints and data are kept; by default `OUT.work`.

    Returns:
        `out`.

    Raises:
        OutputError: `out` is not empty or can't be written.
        CaptionerError: `start` is not a captioner with such a CNN.
    """
    from captionfix.captioners.words import vocabulary, word_tokenizer
    from captionfix.scenes import SIDE
    from captionfix.scoring import score_scenes

    out, place = Path(out), work_folder(Path(out), Path(work) if work is not None else None)
    images, captions = draw_scenes(place, scenes)
    tokenizer = word_tokenizer(vocabulary(captions))
    longest = max(len(caption.split()) for caption in captions)
    model = new_model(
        family,
        SCENE_CNN,
        SIDE,
        seed,
        vocab_size=len(tokenizer),
        word_size=hidden,
        hidden_size=hidden,
        value_size=hidden,
        attention_size=hidden // 2,
        positions=True,
        pool=4,
        dropout=0.0,
        max_words=longest + 4,
        # its attention points at objects, so the flow alone finds them best (docs/method.md)
        explain={"method": "flow", "policy": {"full": 0, "neurons": 200}} if family == "show-attend-tell" else None,
    )
    run = Run(model, tokenizer, SIDE, place, half=half, check=lambda c: str(score_scenes(c, 200)))
    encoded = encode_captions(tokenizer, [[caption] for caption in captions], longest)

    def read(i: int) -> np.ndarray:
        return images[i].transpose(2, 0, 1)

    pictures = Examples(encoded, lambda i, _: read(i), "pixel_values", tokenizer.pad_token_id)
    common: dict[str, Any] = {"precision": precision, "seed": seed, "save_every": save_every, "max_steps": max_steps}
    if start is None:
        fit(model, pictures, Fit(epochs, batch, rate, rate, **common), place / "fit", run.export, run.report)
        return run.finish(out)
    take_cnn(model, start)
    features = _keep_features(model, len(images), read, place / "features.npy")
    first = Examples(encoded, lambda i, _: features[i, 0], "features", tokenizer.pad_token_id)
    fit(model, first, Fit(epochs, batch, rate, 0.0, **common), place / "decoder", run.export, run.report)
    tune = Fit(tune_epochs, batch, tune_rate, tune_rate, warmup=50, **common)
    fit(model, pictures, tune, place / "tune", run.export, run.report)
    return run.finish(out)


def train_photos(data: str | Path, out: str | Path, **options: Any) -> Path:
    """Trains on photographs in lines: `data` holds `train.jsonl`, `dev.jsonl` and `images/`. See `train_images`."""
    data = Path(data)
    dev = data / "dev.jsonl"
    return train_images(
        read_lines(data / "train.jsonl", data / "images"),
        out,
        dev=read_lines(dev, data / "images") if dev.is_file() else None,
        **options,
    )


def train_coco(annotations: str | Path, images: str | Path, out: str | Path, **options: Any) -> Path:
    """Trains on a COCO captions file and its folder of images. See `train_images`."""
    return train_images(read_coco(Path(annotations), Path(images)), out, **options)


def train_images(
    examples: Sequence[Captioned],
    out: str | Path,
    *,
    dev: Sequence[Captioned] | None = None,
    cnn: str | Path = "google/mobilenet_v2_1.0_224",
    family: Family = "show-attend-tell",
    start: str | Path | None = None,
    size: int = 224,
    epochs: float = 6,
    tune_epochs: float = 2,
    batch: int = 32,
    rate: float = 1e-3,
    tune_rate: float = 3e-4,
    cnn_rate: float = 1e-4,
    crop: float = 1.0,
    region_loss: float = 0.0,
    hidden: int = 512,
    at_least: int = 5,
    max_words: int = 20,
    beam_length_power: float = 0.5,
    dropout: float | None = None,
    label_smoothing: float = 0.1,
    precision: Precision = "float32",
    workers: int = 0,
    half: bool = True,
    seed: int = 0,
    save_every: int = 200,
    max_steps: int = -1,
    work: str | Path | None = None,
) -> Path:
    """Trains a captioner of photographs in two stages: the decoder on the CNN's kept features, then everything.

    Args:
        examples: images with captions.
        out: the folder to write; it must not exist or be empty.
        dev: images on which BLEU is printed at every checkpoint, or None.
        cnn: folder (or hub id) of the `transformers` vision model to start from; its input is RGB in [-1, 1].
        family: "show-attend-tell" or "show-tell".
        start: a captioner of the project's own to go on from, as when it is to read larger images: its CNN, decoder,
            words and settings are taken, and ``cnn``, ``family`` and what describes a decoder say nothing.
        size: side of the square to which images are squashed.
        epochs: of the first stage (CNN as it is; photographs and their mirror images); 0 leaves it out.
        tune_epochs: of the second stage; 0 leaves it out.
        batch: images a step; up to five captions of each.
        rate: the first stage's highest learning rate.
        tune_rate: the second stage's for the decoder.
        cnn_rate: the second stage's for the CNN.
        crop: in the second stage a photograph is cut at random to between this part and all of its width, and of its
            height; 1 leaves it whole.
        region_loss: weight of a loss that grounds words in their boxes (see `CaptionerConfig`); 0: boxes are
            not read.
        hidden: units of the LSTM, and size of embeddings, projected cells and attention.
        at_least: a word must occur so often to be in the vocabulary.
        max_words: longer captions are cut.
        beam_length_power: see `CaptionerConfig`.
        dropout: see `CaptionerConfig`; None: 0.5, or with ``start`` what that was trained with.
        label_smoothing: see `CaptionerConfig`.
        precision: "float32", or mixed "bf16" or "fp16".
        workers: processes that read photographs ahead in the second stage, so that a GPU need not wait; 0: none.
        half: store the weights in 16 bits.
        seed: of weights and order.
        save_every: steps between checkpoints.
        max_steps: ends each stage earlier if positive.
        work: where checkpoints and features are kept; by default `OUT.work`.

    Returns:
        `out`.

    Raises:
        OutputError: `out` is not empty or can't be written.
        DataError: `crop` or `dropout` is not between 0 and 1, or words are to be held to boxes and there are none.
        CaptionerError: `cnn` can't be read, or `start` is none of the project's own captioners.
    """
    from captionfix.captioners.words import vocabulary, word_tokenizer
    from captionfix.scoring import score_captions

    if not 0 < crop <= 1:
        raise DataError(f"crop={crop}: give the smallest part of either side to keep, up to 1 (whole)")
    if dropout is not None and not 0 <= dropout <= 1:
        raise DataError(f"dropout={dropout}: give the share of values to drop, from 0 to 1")
    out, place = Path(out), work_folder(Path(out), Path(work) if work is not None else None)
    if start is not None:
        model, tokenizer = started(start, size, seed)
        max_words = model.config.max_words
        if dropout is not None:
            model.config.dropout = model.decoder.drop.p = dropout
    else:
        tokenizer = word_tokenizer(vocabulary((c for entry in examples for c in entry.captions), at_least))
        config, weights = pretrained_cnn(cnn)
        model = new_model(
            family,
            config,
            size,
            seed,
            vocab_size=len(tokenizer),
            word_size=hidden,
            hidden_size=hidden,
            value_size=hidden,
            attention_size=hidden,
            dropout=0.5 if dropout is None else dropout,
            label_smoothing=label_smoothing,
            tie_words=True,
            frozen_norms=True,
            max_words=max_words,
            beam_length_power=beam_length_power,
        )
        model.encoder.cnn.load_state_dict(weights)
    if region_loss > 0:
        if not any(boxes for entry in examples for caption in entry.boxes for boxes in caption):
            raise DataError("region_loss: no caption has phrases with boxes to hold words to")
        model.config.region_loss = region_loss
    check = None if dev is None else lambda captioner: str(score_captions(captioner, dev[:200]))
    run = Run(model, tokenizer, size, place, half=half, check=check)
    captions = encode_captions(tokenizer, [entry.captions for entry in examples], max_words)
    how: dict[str, Any] = {"each": 5, "seed": seed, "mirrored": True}
    if region_loss > 0:
        how |= {"boxes": encode_boxes(tokenizer, examples, max_words), "grid": _grid(model, size)}
    common = {"precision": precision, "seed": seed, "save_every": save_every, "max_steps": max_steps}
    if epochs > 0:
        features = _keep_features(
            model, len(examples), lambda i: read_square(examples[i].image, size), place / "features.npy", mirrored=True
        )
        first = Examples(
            captions, lambda i, view: features[i, int(view.mirrored)], "features", tokenizer.pad_token_id, **how
        )
        fit(model, first, Fit(epochs, batch, rate, 0.0, **common), place / "decoder", run.export, run.report)  # type: ignore[arg-type]
    if tune_epochs > 0:
        photographs = Photographs([entry.image for entry in examples], size)
        second = Examples(captions, photographs, "pixel_values", tokenizer.pad_token_id, crop=crop, **how)
        tune = Fit(tune_epochs, batch, tune_rate, cnn_rate, warmup=50, workers=workers, **common)  # type: ignore[arg-type]
        fit(model, second, tune, place / "tune", run.export, run.report)
    return run.finish(out)


def _grid(model: CaptionerModel, size: int) -> tuple[int, int]:
    """Height and width of the feature map of images of that size."""
    import torch

    with torch.no_grad():
        height, width = model.encoder.eval()(torch.zeros(1, 3, size, size)).shape[2:]
    return height, width


def _keep_features(
    model: CaptionerModel, count: int, read: Callable[[int], np.ndarray], file: Path, mirrored: bool = False
) -> np.ndarray:
    """(N, 1, F, h, w) float16: the CNN's map of every image, kept in `file`; (N, 2, ...) with its mirror image's.

    Of several processes on a machine the first makes it and the others wait: on large data it is the longest step and
    file.
    """
    import torch

    while int(os.environ.get("LOCAL_RANK", "0")) and not file.is_file():
        time.sleep(1)
    if not file.is_file():
        part, out, step = file.with_suffix(f".{os.getpid()}.part"), None, 16
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        encoder = model.encoder.eval().to(device)
        for i in range(0, count, step):
            pixels = torch.from_numpy(np.stack([read(k) for k in range(i, min(i + step, count))]))
            pixels = (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with torch.no_grad():
                maps = [encoder(view) for view in ((pixels, pixels.flip(3)) if mirrored else (pixels,))]
            kept = torch.stack(maps, 1).half().cpu().numpy()
            if out is None:
                out = np.lib.format.open_memmap(part, "w+", np.float16, (count, *kept.shape[1:]))
            out[i : i + step] = kept
        assert out is not None
        out.flush()
        os.replace(part, file)
    found = np.load(file, mmap_mode="r")
    if len(found) != count:
        raise DataError(f"{file} belongs to {len(found)} images, not to these {count}; remove it")
    return found
