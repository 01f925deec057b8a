"""`captionfix classify ...`: the command line of explained classifiers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from captionfix.errors import CaptionerError, CaptionError

if TYPE_CHECKING:
    from torch import Tensor, nn

DEFAULT = "default"


def classify(
    images: Annotated[list[Path], typer.Argument(help="Pictures, in any usual format.", show_default=False)],
    cnn: Annotated[str, typer.Option(help="A classifier of torchvision's by name, such as resnet50.")],
    weights: Annotated[
        str,
        typer.Option(
            metavar="FILE|default", help="A state dict (.pt, .pth, .safetensors), or torchvision's own (network)."
        ),
    ] = DEFAULT,
    classes: Annotated[
        str | None,
        typer.Option(help="Names or ids to explain, separated by semicolons; else the likeliest.", show_default=False),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="How many of the likeliest classes to explain.")] = 1,
    policy: Annotated[
        str,
        typer.Option(
            help="How much evidence is followed: thorough, default, fast, paper, released, marginal, or sums=16,..."
        ),
    ] = "thorough",
    crops: Annotated[int, typer.Option(help="1, or 10 as the paper evaluates.")] = 1,
    labels: Annotated[
        Path | None, typer.Option(help="Names of the classes: one a line, or JSON.", show_default=False)
    ] = None,
    boxes: Annotated[bool, typer.Option("--boxes", help="Draw each class's box.")] = False,
    fixations: Annotated[bool, typer.Option("--fixations", help="Draw each class's fixations.")] = False,
    html: Annotated[bool, typer.Option("--html", help="Also a page to explore each explanation.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the results; by default a new one here.", show_default=False),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps, ...")] = "cpu",
) -> None:
    """Explain what a plain image classifier sees in each picture; a folder for each, with a figure.

    A picture that can't be explained is reported and the others are still done; the exit status is then 2.
    """
    from captionfix import cli
    from captionfix.files import check_free, free_name
    from captionfix.images import read_image

    followed = cli._policy(policy)
    asked = None if classes is None else [_class(part) for part in classes.split(";") if part.strip()]
    folder = free_name("captionfix-out") if out is None else out
    names = None if labels is None else read_labels(labels)
    model: tuple[nn.Module, Callable[[Any], Any], Any] | None = None
    failed = False
    for path, place in cli._shown(list(zip(images, cli._places(images, folder), strict=True))):
        try:
            check_free(place)
            picture = read_image(path)
            if model is None:
                model = load_classifier(cnn, weights, device)
            from captionfix.classify import explain_classes

            module, preprocess, known = model
            result = explain_classes(
                module, picture, asked, top=top, preprocess=preprocess, labels=names or known, policy=followed,
                crops=crops, name=cnn,  # type: ignore[arg-type]
            )  # fmt: skip
            several = len(result) > 1
            cli._write(result, place, {"boxes": boxes, "fixations": fixations, "specific": several}, html)
        except cli._OWN_TROUBLE as error:
            if isinstance(error, CaptionError):  # the classes: the same for every picture
                raise
            cli._complain(error)
            failed = True
        else:
            typer.echo(
                f"{path}: {result}\n\nfigure: {place / 'figure.png'}\n" + f"page: {place / 'page.html'}\n" * html
                if len(images) == 1
                else cli._line(path, result, place)
            )
    if failed:
        raise typer.Exit(cli.FAILED)


def load_classifier(name: str, weights: str, device: str = "cpu") -> tuple[nn.Module, Callable[[Any], Any], Any]:
    """A classifier of torchvision's, the preprocessing of its evaluation, and its classes' names where known.

    Raises:
        CaptionerError: there is no such classifier, or its weights can't be had, read or do not fit.
    """
    import torch
    import torchvision

    from captionfix.cli import check_device

    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        import difflib

        near = difflib.get_close_matches(name, known, n=4) or known[:3]
        raise CaptionerError(f"torchvision has no classifier {name!r}; perhaps {', '.join(near)}")
    check_device(device)
    published = torchvision.models.get_model_weights(name).DEFAULT
    if weights == DEFAULT:
        try:
            model = torchvision.models.get_model(name, weights=published, progress=False)
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CaptionerError(
                f"torchvision's weights for {name} can't be had ({reason}); they are at {published.url}: download them "
                "where there is a network, and give the file with --weights"
            ) from error
        names: Any = published.meta["categories"]
    else:
        state = read_state(Path(weights))
        model = _built(name, state, weights)
        names = None
    return model.eval().to(torch.device(device)), published.transforms(), names


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict, also one that lies under ``state_dict`` or ``model`` in a checkpoint or has ``module.`` before its
    names. Nothing in the file is executed.

    Raises:
        CaptionerError: the file is missing, damaged, or something else.
    """
    import torch

    if not path.is_file():
        raise CaptionerError(f"{path}: there is no such file of weights (or give --weights {DEFAULT})")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # files come from strangers, and readers raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CaptionerError(
            f"{path}: can't be read as weights ({reason}); save model.state_dict() with torch.save, or as safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CaptionerError(f"{path}: holds no state dict (names and tensors)")
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def read_labels(path: Path) -> Any:
    """Names of classes: a JSON list, a JSON mapping of ids (also ImageNet's ``{"0": ["n01440764", "tench"]}``), or one
    a line.

    Raises:
        CaptionError: the file can't be read or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        names = json.loads(text)
        pairs = names.items() if isinstance(names, dict) else enumerate(names)
        return {int(number): str(name[-1] if isinstance(name, list) else name) for number, name in pairs}
    except (OSError, ValueError, TypeError, IndexError) as error:
        raise CaptionError(f"{path}: can't be read as names of classes ({error})") from error


def _built(name: str, state: dict[str, Tensor], path: str) -> nn.Module:
    import torchvision

    last = list(state.values())[-1]  # torchvision's classifiers end in their classifying layer
    options: dict[str, Any] = {"num_classes": int(last.shape[0]) if last.dim() else 1}
    if name in ("googlenet", "inception_v3"):
        auxiliary = any(key.startswith(("aux", "AuxLogits")) for key in state)
        # the published weights expect the input as TensorFlow's was; torchvision sets this with its own weights
        published = options["num_classes"] == 1000
        options.update(aux_logits=auxiliary, init_weights=False, transform_input=published)
    try:
        model = torchvision.models.get_model(name, weights=None, **options)
        model.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CaptionerError(f"{path}: these are not weights of {name} ({' '.join(lines)[:300]})") from error
    return model


def _class(text: str) -> str | int:
    return int(text) if text.strip().isdecimal() else text.strip()
