"""`captionfix evaluate`: methods beside each other on data with known regions."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Captions(str, Enum):
    """Whose captions are explained."""

    people = "people"
    model = "model"


FAST = (
    "default,removal,flow,attention,paper,attention-weights,gradcam,hirescam,layercam,guided-backprop,"
    "input-x-gradient,region-feeding,centre,random"
)


def evaluate(
    data: Annotated[
        str,
        typer.Argument(
            help="'scenes'; a .jsonl file in the lines format, or a folder with dev.jsonl; a folder of Flickr30k "
            "Entities or of COCO.",
            show_default=False,
        ),
    ],
    captioner: Annotated[
        str | None, typer.Option(help="A bundled captioner's name, a folder, or a hub id; by default the fitting one.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Names with commas, options behind colons (rise:masks=500); 'fast', or 'all'.")
    ] = "fast",
    metrics: Annotated[
        str, typer.Option(help="Names with commas; 'quick' (regions alone), or 'all' (they run the captioner often).")
    ] = "quick",
    limit: Annotated[int | None, typer.Option(min=1, help="Of pictures; scenes: 500.", show_default=False)] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for scores and results; a run that was cut off goes on there.")
    ] = Path("captionfix-evaluation"),
    captions: Annotated[Captions, typer.Option(help="The first one given by people, or the captioner's.")] = (
        Captions.people
    ),
    maps: Annotated[str, typer.Option(help="raw, specific, or both with a comma.")] = "raw,specific",
    split: Annotated[
        str | None,
        typer.Option(help="scenes: test, held-out; else which list or file (dev, val2017, ...).", show_default=False),
    ] = None,
    first: Annotated[int, typer.Option(help="scenes: seed of the first.")] = 100_000,
    images: Annotated[Path | None, typer.Option(help="Flickr30k Entities: where the photographs are.")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="Of the maps' Gaussian, a fraction of the CNN's input.", show_default=False)
    ] = None,
    beams: Annotated[int, typer.Option(min=1, help="Width of the search for the captioner's captions.")] = 3,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
) -> None:
    """Measure explanations: is the evidence in the right place, does the model use it, what does it cost.

    Prints a table and writes scores.jsonl, results.csv, results.json and plots/ into the folder. The same command
    again goes on from there; more methods or a higher limit add to it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from captionfix.cli import load_on
    from captionfix.evaluate import report
    from captionfix.evaluate.measure import METRICS, QUICK, Plan
    from captionfix.evaluate.methods import FIXATIONS, NAMES
    from captionfix.evaluate.published import open_data
    from captionfix.evaluate.run import fingerprint, run

    read = open_data(data, limit, first, split, images)
    place = data if data == "scenes" else str(Path(data).resolve())
    name = captioner or ("scenes" if data == "scenes" else "photos")
    every = ",".join(n for n in NAMES if n != FIXATIONS[1])  # the default is one of the legs
    chosen = tuple(dict.fromkeys({"fast": FAST, "all": every}.get(methods, methods).replace(" ", "").split(",")))
    wanted = {
        "quick": QUICK,
        "all": tuple(m for m in METRICS if m != "f1" or captions is Captions.model),
    }.get(metrics, tuple(dict.fromkeys(metrics.replace(" ", "").split(","))))
    model = load_on(name, device)
    plan = Plan(
        captioner=name,
        weights=fingerprint(model),
        data={"data": place, "split": split, **({"first": first} if data == "scenes" else {})},
        methods=chosen,
        metrics=wanted,
        captions=captions.value,
        maps=tuple(dict.fromkeys(maps.replace(" ", "").split(","))),
        limit=limit if limit is not None or data != "scenes" else 500,
        sigma=sigma,
        beams=beams,
        seed=seed,
    )
    shown = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=shown, disable=not shown.is_terminal) as progress:
        task = progress.add_task("", total=None if plan.limit is None else plan.limit * len(chosen))
        records, left_out = run(
            model, read, plan, out, lambda done, what: progress.update(task, completed=done, description=what)
        )
    lines = report.write(out, plan, records, left_out)
    console = Console()
    for table in report.tables(records, lines, console.width if console.is_terminal else 120):
        (console if console.is_terminal else Console(width=120)).print(table)
    for method, why in left_out.items():
        typer.echo(f"left out: {method}: {why}", err=True)
    typer.echo(f"\nresults: {out / 'results.csv'}, {out / 'results.json'}, {out / 'plots'}")
