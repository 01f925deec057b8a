"""`captionfix browse`: a folder's words, the most suspicious first."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Sort(str, Enum):
    """The order that the page opens with."""

    share = "share"
    probability = "probability"
    effect = "effect"
    pointing = "pointing"


def browse(
    folder: Annotated[
        Path, typer.Argument(help="Saved explanations, or what captionfix ground wrote.", show_default=False)
    ],
    sort: Annotated[Sort, typer.Option(help="By what the page is sorted when it opens.")] = Sort.share,
    regions: Annotated[
        Path | None,
        typer.Option(help="Known regions (lines format), for pointing failures.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Words shown of each order.")] = 150,
    function_words: Annotated[bool, typer.Option("--function-words", help="Also a, the, of, and the like.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page; by default browse.html in the folder.")
    ] = None,
) -> None:
    """Write a page of a folder's words, hallucinated ones first: those that the image said little of."""
    from captionfix.browse import browse as write

    page = write(folder, out, sort=sort.value, regions=regions, limit=limit, function_words=function_words)
    typer.echo(f"page: {page}")
