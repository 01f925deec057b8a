"""Training of the project's captioners with `transformers.Trainer`: on scenes, on COCO, on photographs in lines.

A training keeps everything it needs to go on in a work folder beside its output (`OUT.work`): prepared data, the
Trainer's checkpoints, and `latest`, a captioner that can be loaded while training runs. The same call again goes on
where it was cut off. Several processes: `torchrun --nproc-per-node N -m captionfix train ...`.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from captionfix.errors import CaptionerError, DataError, OutputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

    from captionfix.captioners.models import CaptionerModel

Family = Literal["show-attend-tell", "show-tell"]
Precision = Literal["float32", "bf16", "fp16"]

# Basic blocks on 128 pixels, ending at an 8 x 8 map.
SCENE_CNN: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 24,
    "hidden_sizes": [32, 64, 128],
    "depths": [1, 1, 2],
    "layer_type": "basic",
}


@dataclass(frozen=True)
class Captioned:
    """An image file and its captions."""

    image: Path
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """Settings of one run of the Trainer.

    Attributes:
        epochs: passes through the data.
        batch: images a step and process.
        rate: highest learning rate of the decoder; warmed up, then falling along a cosine.
        cnn_rate: the same of the CNN; 0 leaves it as it is.
        decay: weight decay of matrices and kernels.
        warmup: steps.
        precision: "bf16" or "fp16" is mixed precision.
        seed: of order, dropout and initial weights.
        save_every: steps between checkpoints.
        max_steps: ends earlier if positive.
    """

    epochs: float
    batch: int
    rate: float
    cnn_rate: float
    decay: float = 0.01
    warmup: int = 300
    precision: Precision = "float32"
    seed: int = 0
    save_every: int = 500
    max_steps: int = -1


def read_lines(path: Path, images: Path) -> list[Captioned]:
    """Photographs of a JSON-lines file: `{"photo": file, "captions": [{"words": [...]}, ...]}` a line.

    Raises:
        DataError: the file or a photograph is missing, or a line is not of this form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror}; give the folder that holds it") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            captions = tuple(" ".join(caption["words"]) for caption in entry["captions"])
            found.append(Captioned(images / entry["photo"], captions))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is not a photograph with captions ({error!r})") from error
    return _checked(found, path)


def read_coco(annotations: Path, images: Path) -> list[Captioned]:
    """Images of a COCO captions file, `{"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}`.

    Raises:
        DataError: the file or an image is missing, or the file is not of this form.
    """
    try:
        data = json.loads(annotations.read_text(encoding="utf-8"))
        captions: dict[int, list[str]] = {entry["id"]: [] for entry in data["images"]}
        for entry in data["annotations"]:
            captions[entry["image_id"]].append(entry["caption"])
        found = [Captioned(images / entry["file_name"], tuple(captions[entry["id"]])) for entry in data["images"]]
    except OSError as error:
        raise DataError(f"can't read {annotations}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{annotations} is not a COCO captions file ({error!r})") from error
    return _checked(found, annotations)


def _checked(found: list[Captioned], source: Path) -> list[Captioned]:
    found = [entry for entry in found if any(caption.strip() for caption in entry.captions)]
    if not found:
        raise DataError(f"{source} has no captioned image")
    missing = [entry.image for entry in found if not entry.image.is_file()]
    if missing:
        raise DataError(f"{len(missing)} images that {source} names are missing, such as {missing[0]}")
    return found


@dataclass
class Examples:
    """A data set for the Trainer: item i is `(kind, array, captions)`; `collate` makes a batch of them.

    Attributes:
        captions: word ids from start to end, per image.
        read: index -> (C, H, W) or (F, h, w) array: uint8 pixels in 0..255 or features.
        name: "pixel_values" or "features".
        pad: the id that fills up.
        each: captions of an image in a batch (some twice where it has fewer).
    """

    captions: Sequence[Sequence[Sequence[int]]]
    read: Callable[[int], np.ndarray]
    name: str
    pad: int
    each: int = 1

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[Sequence[int]]]:
        own = list(self.captions[index])
        chosen = random.sample(own, min(self.each, len(own)))
        return self.read(index), chosen + random.choices(own, k=self.each - len(chosen))

    def collate(self, items: list[tuple[np.ndarray, list[Sequence[int]]]]) -> dict[str, torch.Tensor]:
        import torch

        longest = max(len(caption) for _, captions in items for caption in captions)
        labels = torch.full((len(items), self.each, longest), self.pad, dtype=torch.long)
        for i, (_, captions) in enumerate(items):
            for k, caption in enumerate(captions):
                labels[i, k, : len(caption)] = torch.as_tensor(caption)
        inputs = torch.from_numpy(np.stack([array for array, _ in items]))
        if inputs.dtype == torch.uint8:
            inputs = (inputs.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        return {self.name: inputs.float(), "labels": labels}


def encode_captions(
    tokenizer: PreTrainedTokenizerFast, groups: Sequence[Sequence[str]], max_words: int
) -> list[list[list[int]]]:
    """Word ids from start to end of every image's captions; longer captions are cut, empty ones left out."""
    end = tokenizer.eos_token_id
    encoded = []
    for captions in groups:
        rows = [ids for ids in tokenizer(list(captions))["input_ids"] if len(ids) > 2]
        encoded.append([ids if len(ids) <= max_words + 2 else [*ids[: max_words + 1], end] for ids in rows])
    return encoded


def fit(
    model: CaptionerModel,
    examples: Examples,
    settings: Fit,
    work: Path,
    export: Callable[[], None],
    report: Callable[[], str] | None = None,
) -> None:
    """Trains `model` in place, going on from the last checkpoint in `work` if there is one."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    done = work / "finished.safetensors"
    if done.is_file():
        from safetensors.torch import load_model

        load_model(model, str(done))
        return

    class Export(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                was = model.training
                model.eval()
                export()
                if report is not None:
                    print(f"step {state.global_step} epoch {state.epoch:.2f}: {report()}", flush=True)
                model.train(was)

    groups = []
    for part, rate in ((model.encoder, settings.cnn_rate), (model.decoder, settings.rate)):
        for parameter in part.parameters():
            parameter.requires_grad_(rate > 0)
        matrices = [p for p in part.parameters() if p.ndim > 1 and rate > 0]
        vectors = [p for p in part.parameters() if p.ndim <= 1 and rate > 0]
        groups += [{"params": matrices, "lr": rate, "weight_decay": settings.decay}]
        groups += [{"params": vectors, "lr": rate, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.rate)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    steps = settings.max_steps if settings.max_steps > 0 else settings.epochs * len(examples) / settings.batch / world
    arguments = TrainingArguments(
        output_dir=str(work),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch,
        learning_rate=settings.rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(settings.warmup, max(1, int(steps / 5))),
        max_grad_norm=5.0,
        bf16=settings.precision == "bf16",
        fp16=settings.precision == "fp16",
        seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=50,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=examples.collate,
        optimizers=(optimizer, None),  # type: ignore[arg-type]
        callbacks=[Export()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    if trainer.is_world_process_zero():
        from safetensors.torch import save_model

        export()
        save_model(model, str(done) + ".part")
        os.replace(str(done) + ".part", done)
        for old in work.glob("checkpoint-*"):
            shutil.rmtree(old)


def _work(out: Path, work: Path | None) -> Path:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; choose another output folder")
    place = work if work is not None else out.with_name(out.name + ".work")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't make {place}: {error.strerror}") from error
    return place


@dataclass
class _Run:
    """A model with what belongs to it, and where it is written."""

    model: CaptionerModel
    tokenizer: PreTrainedTokenizerFast
    size: int
    work: Path
    half: bool = False
    check: Callable[[Any], str] | None = None
    extra: dict[str, object] = field(default_factory=dict)

    def captioner(self) -> Any:
        from captionfix.captioners.pretrained import PretrainedCaptioner
        from captionfix.captioners.words import square_processor

        return PretrainedCaptioner(self.model, self.tokenizer, square_processor(self.size))

    def write(self, folder: Path) -> None:
        self.captioner().save(folder, half=self.half)

    def export(self) -> None:
        """Replaces `work/latest`, a captioner that can be loaded at any time."""
        fresh, latest, old = self.work / "latest.part", self.work / "latest", self.work / "latest.old"
        for leftover in (fresh, old):
            shutil.rmtree(leftover, ignore_errors=True)
        fresh.mkdir()
        self.write(fresh)
        if latest.exists():
            os.replace(latest, old)
        os.replace(fresh, latest)
        shutil.rmtree(old, ignore_errors=True)

    def report(self) -> str:
        return "" if self.check is None else self.check(self.captioner())

    def finish(self, out: Path) -> Path:
        from captionfix.files import atomic_folder

        if int(os.environ.get("RANK", "0")) == 0:
            self.model.eval()
            with atomic_folder(out) as folder:
                self.write(folder)
        return out


def _model(family: Family, cnn: dict[str, Any], pixels: int, seed: int, **settings: Any) -> CaptionerModel:
    import torch
    from transformers import set_seed

    from captionfix.captioners import models

    set_seed(seed)
    config: models.CaptionerConfig
    probe = models.Encoder(models.CaptionerConfig(cnn=cnn)).eval()
    with torch.no_grad():
        shape = probe(torch.zeros(1, 3, pixels, pixels)).shape
    settings.update(cnn=cnn, image_size=pixels, feature_size=shape[1])
    if family == "show-tell":
        for key in ("positions", "value_size", "attention_size", "tie_words"):
            settings.pop(key, None)
        config = models.ShowTellConfig(**settings)
        model: CaptionerModel = models.ShowTellModel(config)
    else:
        settings.pop("pool", None)
        if settings.get("positions"):
            settings["positions"] = list(shape[2:])
        config = models.ShowAttendTellConfig(**settings)
        model = models.ShowAttendTellModel(config)
    return model.to(memory_format=torch.channels_last)


def train_scenes(
    out: str | Path,
    *,
    family: Family = "show-attend-tell",
    scenes: int = 48_000,
    epochs: float = 4.5,
    batch: int = 64,
    rate: float = 1.5e-3,
    hidden: int = 256,
    start: str | Path | None = None,
    precision: Precision = "float32",
    seed: int = 0,
    save_every: int = 500,
    max_steps: int = -1,
    work: str | Path | None = None,
) -> Path:
    """Trains a captioner of generated scenes from nothing.

    Args:
        out: the folder to write; it must not exist or be empty.
        family: "show-attend-tell" or "show-tell".
        scenes: number of training scenes (seeds 0, 1, ...); they are drawn once and kept in the work folder.
        epochs: passes through them.
        batch: scenes a step.
        rate: highest learning rate.
        hidden: units of the LSTM and size of embeddings.
        start: a captioner of scenes whose CNN is the start; None trains the CNN from nothing too.
        precision: "float32", or mixed "bf16" or "fp16".
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

    out, place = Path(out), _work(Path(out), Path(work) if work is not None else None)
    images, captions = _draw_scenes(place, scenes)
    tokenizer = word_tokenizer(vocabulary(captions))
    longest = max(len(caption.split()) for caption in captions)
    model = _model(
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
    )
    if start is not None:
        _take_cnn(model, start)
    run = _Run(model, tokenizer, SIDE, place, check=lambda c: str(score_scenes(c, 200)))
    examples = Examples(
        encode_captions(tokenizer, [[caption] for caption in captions], longest),
        lambda i: images[i].transpose(2, 0, 1),
        "pixel_values",
        tokenizer.pad_token_id,
    )
    settings = Fit(
        epochs, batch, rate, rate, precision=precision, seed=seed, save_every=save_every, max_steps=max_steps
    )
    fit(model, examples, settings, place / "fit", run.export, run.report)
    return run.finish(out)


def _take_cnn(model: CaptionerModel, start: str | Path) -> None:
    from captionfix.captioners.loading import load
    from captionfix.captioners.pretrained import PretrainedCaptioner

    source = load(start)
    assert isinstance(source, PretrainedCaptioner)
    try:
        model.encoder.load_state_dict(source.model.encoder.state_dict())
    except RuntimeError as error:
        raise CaptionerError(f"{start} has another CNN than this training: {error}") from error


def _draw_scenes(place: Path, count: int) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, 3) uint8 pictures and their captions, kept in the work folder."""
    from captionfix.files import atomic_write
    from captionfix.scenes import SIDE, scene

    file, text = place / "images.npy", place / "captions.txt"
    if not (file.is_file() and text.is_file() and len(text.read_text().splitlines()) == count):
        part = place / f"images.{os.getpid()}.part"
        images = np.lib.format.open_memmap(part, "w+", np.uint8, (count, SIDE, SIDE, 3))
        captions = []
        for i in range(count):
            drawn = scene(i)
            images[i] = drawn.image
            captions.append(drawn.caption)
        images.flush()
        atomic_write(text, "\n".join(captions) + "\n")
        os.replace(part, file)
    return np.load(file, mmap_mode="r"), text.read_text().splitlines()


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
    size: int = 224,
    epochs: float = 6,
    tune_epochs: float = 2,
    batch: int = 32,
    rate: float = 1e-3,
    tune_rate: float = 3e-4,
    cnn_rate: float = 5e-5,
    hidden: int = 512,
    at_least: int = 5,
    max_words: int = 20,
    dropout: float = 0.5,
    label_smoothing: float = 0.1,
    precision: Precision = "float32",
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
        size: side of the square to which images are squashed.
        epochs: of the first stage (CNN as it is; photographs and their mirror images).
        tune_epochs: of the second stage.
        batch: images a step; up to five captions of each.
        rate: the first stage's highest learning rate.
        tune_rate: the second stage's for the decoder.
        cnn_rate: the second stage's for the CNN.
        hidden: units of the LSTM, and size of embeddings, projected cells and attention.
        at_least: a word must occur so often to be in the vocabulary.
        max_words: longer captions are cut.
        dropout: see `CaptionerConfig`.
        label_smoothing: see `CaptionerConfig`.
        precision: "float32", or mixed "bf16" or "fp16".
        half: store the weights in 16 bits.
        seed: of weights and order.
        save_every: steps between checkpoints.
        max_steps: ends each stage earlier if positive.
        work: where checkpoints and features are kept; by default `OUT.work`.

    Returns:
        `out`.

    Raises:
        OutputError: `out` is not empty or can't be written.
        CaptionerError: `cnn` can't be read.
    """
    from captionfix.captioners.words import vocabulary, word_tokenizer
    from captionfix.scoring import score_captions

    out, place = Path(out), _work(Path(out), Path(work) if work is not None else None)
    tokenizer = word_tokenizer(vocabulary((c for entry in examples for c in entry.captions), at_least))
    config, weights = _pretrained_cnn(cnn)
    model = _model(
        family,
        config,
        size,
        seed,
        vocab_size=len(tokenizer),
        word_size=hidden,
        hidden_size=hidden,
        value_size=hidden,
        attention_size=hidden,
        dropout=dropout,
        label_smoothing=label_smoothing,
        tie_words=True,
        frozen_norms=True,
        max_words=max_words,
    )
    model.encoder.cnn.load_state_dict(weights)
    check = None if dev is None else lambda captioner: str(score_captions(captioner, dev[:200]))
    run = _Run(model, tokenizer, size, place, half=half, check=check)
    captions = encode_captions(tokenizer, [entry.captions for entry in examples], max_words)
    features = _keep_features(model, examples, place / "features.npy", size)
    first = Examples(captions, lambda i: features[i, random.randrange(2)], "features", tokenizer.pad_token_id, 5)
    common = {"precision": precision, "seed": seed, "save_every": save_every, "max_steps": max_steps}
    fit(model, first, Fit(epochs, batch, rate, 0.0, **common), place / "decoder", run.export, run.report)  # type: ignore[arg-type]
    second = Examples(
        captions, lambda i: _mirror(_read(examples[i].image, size)), "pixel_values", tokenizer.pad_token_id, 5
    )
    tune = Fit(tune_epochs, batch, tune_rate, cnn_rate, warmup=50, **common)  # type: ignore[arg-type]
    fit(model, second, tune, place / "tune", run.export, run.report)
    return run.finish(out)


def _pretrained_cnn(source: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(source)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CaptionerError(f"can't read the CNN {source}: {error}") from error
    unused = {"id2label", "label2id", "architectures", "dtype", "transformers_version", "_name_or_path", "problem_type"}
    config = {key: value for key, value in model.config.to_diff_dict().items() if key not in unused}
    return {**config, "model_type": model.config.model_type}, model.state_dict()


def _read(path: Path, size: int) -> np.ndarray:
    """(3, size, size) uint8, squashed."""
    from PIL import Image

    from captionfix.images import read_image

    image = read_image(path)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _mirror(array: np.ndarray) -> np.ndarray:
    return array[:, :, ::-1].copy() if random.random() < 0.5 else array


def _keep_features(model: CaptionerModel, examples: Sequence[Captioned], file: Path, size: int) -> np.ndarray:
    """(N, 2, F, h, w) float16: the CNN's map of every image and of its mirror image, kept in `file`."""
    import torch

    if not file.is_file():
        part, out, step = file.with_suffix(f".{os.getpid()}.part"), None, 16
        model.eval()
        for i in range(0, len(examples), step):
            pixels = torch.from_numpy(np.stack([_read(entry.image, size) for entry in examples[i : i + step]]))
            pixels = (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                pair = [model.encoder(pixels), model.encoder(pixels.flip(3))]
            kept = torch.stack(pair, 1).half().numpy()
            if out is None:
                out = np.lib.format.open_memmap(part, "w+", np.float16, (len(examples), *kept.shape[1:]))
            out[i : i + step] = kept
        assert out is not None
        out.flush()
        os.replace(part, file)
    found = np.load(file, mmap_mode="r")
    if len(found) != len(examples):
        raise DataError(f"{file} belongs to {len(found)} images, not to these {len(examples)}; remove it")
    return found
