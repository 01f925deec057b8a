"""`captionfix train ...`: the command line of training and of its scores."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(no_args_is_help=True, help="Train captioners, and score them.")


class Family(str, Enum):
    """The project's two families."""

    attend = "show-attend-tell"
    tell = "show-tell"


class Precision(str, Enum):
    """Number format of the computation."""

    float32 = "float32"
    bf16 = "bf16"
    fp16 = "fp16"


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; new or empty.")]
Work = Annotated[Path | None, typer.Option(help="Where checkpoints are kept to go on from; default OUT.work.")]
FamilyOption = Annotated[Family, typer.Option(help="Model family.")]
PrecisionOption = Annotated[Precision, typer.Option(help="bf16 or fp16: mixed precision.")]
Seed = Annotated[int, typer.Option(help="Of weights and order.")]
MaxSteps = Annotated[int, typer.Option(help="End (each stage) after so many steps; -1: by epochs.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Cnn = Annotated[str, typer.Option(help="Folder or hub id of the transformers vision model to start from.")]
Start = Annotated[
    str | None, typer.Option(help="A captioner to go on from: its weights and words; --cnn, --family ... are not read.")
]
Size = Annotated[int, typer.Option(help="Side of the square that photographs are squashed to.")]
Rate = Annotated[float, typer.Option(help="Highest learning rate of the first stage.")]
Epochs = Annotated[float, typer.Option(help="Passes of the decoder over the CNN's kept features.")]
TuneEpochs = Annotated[float, typer.Option(help="Passes of everything, end to end.")]
TuneRate = Annotated[float, typer.Option(help="Highest learning rate of the decoder in the second stage.")]
CnnRate = Annotated[float, typer.Option(help="Highest learning rate of the CNN in the second stage.")]
Crop = Annotated[float, typer.Option(help="Second stage: cut to this part of either side at least, at random; 1: no.")]
RegionLoss = Annotated[
    float, typer.Option(min=0, help="Weight of a loss that grounds words in the boxes of phrases; 0: none.")
]
Workers = Annotated[int, typer.Option(min=0, help="Second stage: processes that read photographs ahead.")]
Batch = Annotated[int, typer.Option(help="Images a step and process.")]
Dropout = Annotated[
    float | None, typer.Option(min=0, max=1, help="Share dropped; default 0.5, or with --start as that was trained.")
]
Hidden = Annotated[int, typer.Option(help="Units of the LSTM.")]
AtLeast = Annotated[int, typer.Option(help="A word must occur so often to be in the vocabulary.")]


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value.value if isinstance(value, Enum) else value for key, value in options.items()}


@app.command()
def scenes(
    out: Out,
    family: FamilyOption = Family.attend,
    scenes: Annotated[int, typer.Option(help="Number of training scenes.")] = 48_000,
    epochs: Annotated[float, typer.Option(help="Passes through them; with --start, of the decoder alone.")] = 3,
    tune_epochs: Annotated[float, typer.Option(help="With --start: passes of everything after that.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Scenes a step and process.")] = 64,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1.5e-3,
    tune_rate: Annotated[float, typer.Option(help="With --start: highest rate of the second stage.")] = 4e-4,
    hidden: Hidden = 256,
    start: Annotated[str | None, typer.Option(help="A captioner of scenes whose CNN is the start.")] = None,
    precision: PrecisionOption = Precision.float32,
    half: Annotated[bool, typer.Option("--half", help="Store the weights in 16 bits.")] = False,
    seed: Seed = 0,
    save_every: SaveEvery = 500,
    max_steps: MaxSteps = -1,
    work: Work = None,
) -> None:
    """Train on generated scenes, from nothing. The same command again goes on where it was cut off."""
    options = _plain(locals())
    from captionfix.train import train_scenes

    typer.echo(f"wrote {train_scenes(**options)}")


@app.command()
def photos(
    data: Annotated[Path, typer.Argument(help="Folder with train.jsonl, images/ and perhaps dev.jsonl.")],
    out: Out,
    cnn: Cnn = "google/mobilenet_v2_1.0_224",
    family: FamilyOption = Family.attend,
    start: Start = None,
    size: Size = 224,
    epochs: Epochs = 6,
    tune_epochs: TuneEpochs = 2,
    batch: Batch = 32,
    rate: Rate = 1e-3,
    tune_rate: TuneRate = 3e-4,
    cnn_rate: CnnRate = 1e-4,
    crop: Crop = 1.0,
    region_loss: RegionLoss = 0.0,
    hidden: Hidden = 512,
    at_least: AtLeast = 5,
    dropout: Dropout = None,
    precision: PrecisionOption = Precision.float32,
    workers: Workers = 0,
    seed: Seed = 0,
    save_every: SaveEvery = 200,
    max_steps: MaxSteps = -1,
    work: Work = None,
) -> None:
    """Train on photographs with captions in lines. The same command again goes on where it was cut off."""
    options = _plain(locals())
    from captionfix.train import train_photos

    typer.echo(f"wrote {train_photos(**options)}")


@app.command()
def coco(
    annotations: Annotated[Path, typer.Argument(help="COCO captions JSON.")],
    images: Annotated[Path, typer.Argument(help="Folder of its images.")],
    out: Out,
    cnn: Cnn = "google/mobilenet_v2_1.0_224",
    family: FamilyOption = Family.attend,
    start: Start = None,
    size: Size = 224,
    epochs: Epochs = 6,
    tune_epochs: TuneEpochs = 2,
    batch: Batch = 32,
    rate: Rate = 1e-3,
    tune_rate: TuneRate = 3e-4,
    cnn_rate: CnnRate = 1e-4,
    crop: Crop = 1.0,
    hidden: Hidden = 512,
    at_least: AtLeast = 5,
    dropout: Dropout = None,
    precision: PrecisionOption = Precision.float32,
    workers: Workers = 0,
    seed: Seed = 0,
    save_every: SaveEvery = 200,
    max_steps: MaxSteps = -1,
    work: Work = None,
) -> None:
    """Train on a COCO captions file. The same command again goes on where it was cut off."""
    options = _plain(locals())
    from captionfix.train import train_coco

    typer.echo(f"wrote {train_coco(**options)}")


@app.command()
def average(
    folders: Annotated[list[str], typer.Argument(help="Captioners trained from one start, two or more.")],
    out: Out,
    half: Annotated[bool, typer.Option(help="Store the weights in 16 bits.")] = True,
) -> None:
    """Average the weights of captioners that were trained from one start: often better than each."""
    from captionfix import train_average

    typer.echo(f"wrote {train_average.average(folders, out, half=half)}")


@app.command()
def score(
    captioner: Annotated[str, typer.Argument(help="Bundled name or folder.")],
    scenes: Annotated[int, typer.Option(help="Score on so many fresh scenes.")] = 0,
    held_out: Annotated[bool, typer.Option(help="Scenes with (colour, shape) pairs kept out of training.")] = False,
    photos: Annotated[Path | None, typer.Option(help="Score on a .jsonl of photographs (images/ beside it).")] = None,
    coco: Annotated[Path | None, typer.Option(help="Score on a COCO captions JSON; give --images too.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the COCO images.")] = None,
    beams: Annotated[int, typer.Option(help="Width of the beam for photographs.")] = 3,
) -> None:
    """Words and captions right on fresh scenes; BLEU on photographs."""
    from captionfix.captioners.loading import load
    from captionfix.errors import DataError
    from captionfix.scoring import score_captions, score_scenes
    from captionfix.train_data import read_coco, read_lines

    if not (scenes or photos or coco):
        raise DataError("nothing to score on: give --scenes, --photos or --coco with --images")
    if coco and not images:
        raise DataError("--coco needs --images, the folder of its images")
    model = load(captioner)
    if scenes:
        typer.echo(str(score_scenes(model, scenes, split="held-out" if held_out else "test")))
    if photos:
        file = photos / "dev.jsonl" if photos.is_dir() else photos
        typer.echo(str(score_captions(model, read_lines(file, file.parent / "images"), beams)))
    if coco and images:
        typer.echo(str(score_captions(model, read_coco(coco, images), beams)))
