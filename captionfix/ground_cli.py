"""`captionfix ground`: a folder of images explained, a row a word."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Engine(str, Enum):
    """What runs it."""

    local = "local"
    ray = "ray"


class Form(str, Enum):
    """Of the rows."""

    jsonl = "jsonl"
    parquet = "parquet"


def ground(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|LIST",
            help='A folder of images, a text file with a path a line, or a .jsonl file with {"image": path, '
            '"caption": text} a line.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the rows; a run that was cut off goes on there.")
    ],
    captioner: Annotated[str, typer.Option(help="A bundled captioner's name, a folder, or a hub id.")] = "photos",
    method: Annotated[str, typer.Option(help="How words depend on the CNN's feature map.")] = "default",
    policy: Annotated[str, typer.Option(help="How much evidence is followed.")] = "default",
    beams: Annotated[int, typer.Option(min=1, help="Width of the search for a caption; 1 is greedy.")] = 3,
    unknown: Annotated[str, typer.Option(help="Words that the captioner does not know: error or map.")] = "error",
    pictures: Annotated[bool, typer.Option("--pictures", help="Save each explanation too, with its page.")] = False,
    form: Annotated[Form, typer.Option("--format", help="Of the rows; Parquet needs pyarrow.")] = Form.jsonl,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Images at once; by default what fits into memory.", show_default=False)
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read ahead; with Ray, that explain.")] = 2,
    engine: Annotated[Engine, typer.Option(help="This machine, or a cluster of Ray's.")] = Engine.local,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:
    """Explain all images of a folder or a list: a row a word, and a page of the most suspicious words.

    The same command again goes on where it was cut off. Images that can't be explained are reported and passed over;
    the exit status is then 2.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from captionfix import cli
    from captionfix.browse import browse
    from captionfix.errors import CaptionfixError
    from captionfix.ground import Options, Progress
    from captionfix.ground import ground as run
    from captionfix.ground_parquet import write_parquet

    options = Options(captioner, method, cli._policy(policy), beams, unknown, pictures)
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    said = 0
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, rate="")

        def report(progress: Progress) -> None:
            nonlocal said
            for record in progress.failed[said:]:
                cli._complain(f"{record['image']}: {record['error']}")
            said = len(progress.failed)
            speed = bar.tasks[0].speed
            rate = "" if speed is None else f"{speed:.1f} images/s"
            bar.update(task, total=progress.total, completed=progress.done, rate=rate)

        progress = run(
            source, out, options, device=device, workers=workers, batch=batch, engine=engine.value, report=report
        )
    typer.echo(f"{progress.here} images explained now, {progress.done} in all: {out / 'words.jsonl'}")
    if form is Form.parquet:
        typer.echo(f"Parquet: {write_parquet(out)}")
    try:
        typer.echo(f"page: {browse(out, out / 'index.html')}")
    except CaptionfixError as error:  # not one image could be explained
        cli._complain(error)
    if progress.failed:
        typer.echo(f"{len(progress.failed)} images were passed over: {out / 'failed.jsonl'}", err=True)
        raise typer.Exit(cli.FAILED)
