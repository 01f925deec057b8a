"""The command line: ``captionfix demo``, ``captionfix explain``, ``captionfix classify``, ``captionfix train``."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import captionfix
from captionfix.browse_cli import browse
from captionfix.classify_cli import classify
from captionfix.errors import CaptionerError, CaptionError, CaptionfixError, ImageError, OutputError, PolicyError
from captionfix.evaluate_cli import evaluate
from captionfix.ground_cli import ground
from captionfix.train_cli import app as train_app

if TYPE_CHECKING:
    from PIL import Image

    from captionfix.captioners.captioner import Captioner
    from captionfix.explanation import Explanation

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Shows where each word of an image caption comes from.",
)
app.add_typer(train_app, name="train")
app.command("evaluate")(evaluate)
app.command("ground")(ground)
app.command("browse")(browse)

FAILED = 2
_SCENE = 6  # a seed whose things lie well apart
_OWN_TROUBLE = (ImageError, CaptionError, OutputError)  # of one image: the others are still done


class Unknown(str, Enum):
    """What to do about words of --caption that the captioner does not know."""

    error = "error"
    map = "map"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. What a user can mend ends in one line on stderr and exit status 2, without a traceback."""
    try:
        app(arguments)
    except CaptionfixError as error:
        _complain(error)
        raise SystemExit(FAILED) from None


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"captionfix {captionfix.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and end.")
    ] = False,
) -> None:
    pass


Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", help="Folder for the results; by default a new one here.", show_default=False),
]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps, ...")]


@app.command()
def demo(out: Out = None, device: Device = "cpu") -> None:
    """Explain a generated scene and a sample portrait with the bundled captioners; needs no network."""
    from captionfix.explain import explain as explain_image
    from captionfix.files import check_free, free_name

    folder = free_name("captionfix-demo") if out is None else out
    for name, captioner_name, image in _samples():
        check_free(folder / name)
        typer.echo(f"{name}: explaining with captioner {captioner_name!r} ...")
        result = explain_image(load_on(captioner_name, device), image)
        place = _write(result, folder / name, {"boxes": True}, html=True)
        typer.echo(f"\n{result}\n\nfigure: {place / 'figure.png'}\npage: {place / 'page.html'}\n")
    typer.echo(f"Pictures and saved explanations are in {folder.resolve()}")


@app.command("explain")
def explain_command(
    images: Annotated[list[Path], typer.Argument(help="Pictures, in any usual format.", show_default=False)],
    captioner: Annotated[str, typer.Option(help="A bundled captioner's name, a folder, or a hub id.")] = "photos",
    caption: Annotated[
        str | None, typer.Option(help="Explain this caption instead of the captioner's own.", show_default=False)
    ] = None,
    contrast: Annotated[
        list[str] | None,
        typer.Option(metavar="WORD=OTHER", help="Why WORD and not OTHER; may be repeated.", show_default=False),
    ] = None,
    method: Annotated[str, typer.Option(help="How words depend on the CNN's feature map.")] = "default",
    policy: Annotated[
        str,
        typer.Option(help="How much evidence is followed: default, fast, thorough, paper, or sums=16,neurons=300,..."),
    ] = "default",
    beams: Annotated[int, typer.Option(min=1, help="Width of the search for a caption; 1 is greedy.")] = 3,
    unknown: Annotated[Unknown, typer.Option(help="Words that the captioner does not know.")] = Unknown.error,
    boxes: Annotated[bool, typer.Option("--boxes", help="Draw each word's box.")] = False,
    fixations: Annotated[bool, typer.Option("--fixations", help="Draw each word's fixations.")] = False,
    raw: Annotated[bool, typer.Option("--raw", help="Whole maps, without taking off the words' mean.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Also a page to explore each explanation.")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="Also one picture of all: contact-sheet.png.")] = False,
    out: Out = None,
    device: Device = "cpu",
) -> None:
    """Explain the caption of each picture, word by word; a folder for each, with a figure and the saved explanation.

    A picture that can't be explained is reported and the others are still done; the exit status is then 2.
    """
    from captionfix.files import check_free, free_name
    from captionfix.images import read_image

    against = dict(_pair(text) for text in contrast or ())
    followed = _policy(policy)
    folder = free_name("captionfix-out") if out is None else out
    model: Captioner | None = None
    failed = False
    strips: list[Image.Image] = []
    for path, place in _shown(list(zip(images, _places(images, folder), strict=True))):
        try:
            check_free(place)
            image = read_image(path)
            if model is None:
                model = load_on(captioner, device)
            from captionfix.explain import explain as explain_image

            result = explain_image(
                model,
                image,
                caption,
                contrast=against,
                method=method,
                policy=followed,
                beams=beams,
                unknown=unknown.value,
            )
            _write(result, place, {"boxes": boxes, "fixations": fixations, "specific": not raw}, html)
            if sheet:
                from captionfix.render.contact import strip

                strips.append(strip(result, path.name, specific=not raw, boxes=boxes))
        except _OWN_TROUBLE as error:
            _complain(error if isinstance(error, (ImageError, OutputError)) else f"{path}: {error}")
            failed = True
        else:
            typer.echo(
                f"{path}: {result}\n\nfigure: {place / 'figure.png'}\n" + f"page: {place / 'page.html'}\n" * html
                if len(images) == 1
                else _line(path, result, place)
            )
    if strips:
        typer.echo(f"contact sheet: {_sheet(strips, folder / 'contact-sheet.png')}")
    if failed:
        raise typer.Exit(FAILED)


app.command()(classify)


def _samples() -> Iterator[tuple[str, str, Image.Image]]:
    """Folder, captioner and picture: one generated, one that matplotlib ships (a public-domain portrait)."""
    from matplotlib.cbook import get_sample_data
    from PIL import Image

    from captionfix.images import read_image
    from captionfix.scenes import scene

    yield "scene", "scenes", Image.fromarray(scene(_SCENE, split="test").image)
    yield "portrait", "photos", read_image(get_sample_data("grace_hopper.jpg", asfileobj=False))


def load_on(name: str, device: str) -> Captioner:
    from captionfix.captioners.loading import load

    check_device(device)
    return load(name, device)


def check_device(device: str) -> None:
    """Raises CaptionerError where torch can't compute on it."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaptionerError(f"can't compute on {device!r}: {reason}; --device cpu always works") from error


def _write(result: Explanation, place: Path, options: dict[str, Any], html: bool = False) -> Path:
    from captionfix.files import atomic_folder, atomic_write
    from captionfix.render.figure import png

    with atomic_folder(place) as folder:
        result.save(folder)
        atomic_write(folder / "figure.png", png(result, dpi=200, **options))
        if html:
            result.to_html(folder / "page.html")
    return place


def _sheet(strips: Sequence[Image.Image], path: Path) -> Path:
    import io

    from captionfix.files import atomic_write
    from captionfix.render.contact import stacked

    buffer = io.BytesIO()
    stacked(strips).save(buffer, "png")
    atomic_write(path, buffer.getvalue())
    return path


def _places(images: Sequence[Path], folder: Path) -> Iterator[Path]:
    """A folder for each picture, named after it; equal names are counted."""
    taken: set[str] = set()
    for path in images:
        name, number = path.stem or "image", 1
        while name in taken:
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name)
        yield folder / name


def _shown(items: list[tuple[Path, Path]]) -> Iterable[tuple[Path, Path]]:
    """The items, with a progress bar on a terminal's stderr where there are several."""
    if len(items) == 1 or not sys.stderr.isatty():
        return items
    from rich.console import Console
    from rich.progress import track

    return track(items, "explaining", console=Console(stderr=True))


def _line(path: Path, result: Explanation, place: Path) -> str:
    return f'{path}: "{result.caption}" -> {place / "figure.png"}'


def _pair(text: str) -> tuple[str, str]:
    word, sign, other = (part.strip() for part in text.partition("="))
    if not (word and sign and other):
        raise CaptionError(f"--contrast {text!r}: give WORD=OTHER, for example --contrast dog=cat")
    return word, other


def _policy(text: str) -> str | dict[str, Any]:
    """A policy's name, or its fields from ``name=value,name=value``."""
    if "=" not in text:
        return text
    fields: dict[str, Any] = {}
    for part in text.split(","):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not (name and sign and value):
            raise PolicyError(f"--policy {text!r}: give a name, or NAME=VALUE,NAME=VALUE")
        plain: dict[str, Any] = {"none": None, "true": True, "false": False}
        fields[name] = int(value) if value.isdecimal() else plain.get(value.lower(), value)
    return fields


def _complain(error: object) -> None:
    typer.echo(f"captionfix: {' '.join(str(error).split())}", err=True)
