"""One run of `transformers.Trainer`, resumable, and the model's way to its folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from captionfix.errors import DataError, OutputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from captionfix.captioners.models import CaptionerModel
    from captionfix.captioners.pretrained import PretrainedCaptioner
    from captionfix.train_data import Examples

Precision = Literal["float32", "bf16", "fp16"]


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
        workers: processes that read examples ahead.
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
    workers: int = 0


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
    from transformers.utils import is_accelerate_available

    if not is_accelerate_available():
        raise DataError("training needs the package accelerate: install captionfix[train]")

    done = work / "finished.safetensors"
    if done.is_file():
        from safetensors.torch import load_model

        load_model(model, str(done))
        return

    class Export(TrainerCallback):
        # Not as the data set's `set_epoch`: accelerate would call that with 0 in the epoch in which a training goes on.
        def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            examples.epoch = int(state.epoch or 0)

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
        use_cpu=not torch.accelerator.is_available(),  # else several processes on a CPU would not work together
        seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=2,
        logging_steps=50,
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_num_workers=settings.workers,
        average_tokens_across_devices=False,  # the model's loss is a mean: else it would count once for each process
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=examples.collate,
        optimizers=(optimizer, None),
        callbacks=[Export()],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.is_dir() else None)
    if trainer.is_world_process_zero():
        from safetensors.torch import save_model

        export()
        save_model(model, str(done) + ".part")
        os.replace(str(done) + ".part", done)
        trainer.state.save_to_json(str(work / "trainer_log.json"))
        for old in work.glob("checkpoint-*"):
            shutil.rmtree(old)


def check_empty(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty; choose another output folder")


def work_folder(out: Path, work: Path | None) -> Path:
    check_empty(out)
    place = work if work is not None else out.with_name(out.name + ".work")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"can't make {place}: {error.strerror}") from error
    return place


@dataclass
class Run:
    """A model with what belongs to it, and where it is written."""

    model: CaptionerModel
    tokenizer: PreTrainedTokenizerFast
    size: int
    work: Path
    half: bool = False
    check: Callable[[Any], str] | None = None

    def captioner(self) -> PretrainedCaptioner:
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
