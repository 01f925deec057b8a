"""The notebooks run from beginning to end, and what a reader should see comes out."""

from __future__ import annotations

import base64
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 700_000
"""Bytes of a notebook with its pictures."""
# what is said (a pattern in the text of all outputs) and shown (pictures, pages or contact sheets), by notebook
SAYS = {
    "1_first_look": r"black +0\.\d\d +\d{2,3}%.*masses sum to 1\.0.*explanation\.json.*True$",
    "2_wrap_your_own_captioner": r"colour right in (9\d|100), shape right in (9\d|100).*a yellow circle.*"
    r"20 words, but the vocabulary has 19.*preprocess is random.*two equal calls give different logits",
    "3_why_this_word": r"nothing +3[6-9]\.\d to 1 the word's place +(1[6-9]|2[01])\.\d to 1.*"
    r"(true: .* red star.*said: .* pink star.*){3}never seen.*: red star,",
    "4_compare_methods": r"\(40, \{\}\).*default +specific +0\.\d\d \[.*centre +raw.*flow +\d+\.\d\d s",
}
SHOWS = {
    "1_first_look": (3, 1),
    "2_wrap_your_own_captioner": (1, 1),
    "3_why_this_word": (4, 1),
    "4_compare_methods": (2, 0),
}


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def said(notebook: Any) -> str:
    """The text of all outputs, on one line."""
    texts = [output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs(notebook)]
    return " ".join("\n".join(texts).split())


def shown(notebook: Any) -> tuple[list[Image.Image], list[str]]:
    data = [output.get("data", {}) for output in outputs(notebook)]
    pictures = [Image.open(io.BytesIO(base64.b64decode(each["image/jpeg"]))) for each in data if "image/jpeg" in each]
    return pictures, [each["text/html"] for each in data if "text/html" in each]


def check(notebook: Any, name: str) -> None:
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    assert re.search(SAYS[name], said(notebook)), said(notebook)
    pictures, pages = shown(notebook)
    assert (len(pictures), len(pages)) == SHOWS[name]
    for picture in pictures:
        pixels = np.asarray(picture.convert("RGB"), dtype=np.float32)
        assert pixels.shape[1] >= 400
        assert pixels.std() > 15  # not blank
    for page in pages:
        assert "data:image/jpeg;base64," in page


@pytest.fixture(scope="module")
def nbformat() -> Any:
    return pytest.importorskip("nbformat", reason="the package nbformat is not installed")


def test_all_notebooks_are_known() -> None:
    if not NOTEBOOKS:
        pytest.skip("the folder notebooks is not here")
    assert [path.stem for path in NOTEBOOKS] == sorted(SAYS) == sorted(SHOWS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_with_their_outputs(path: Path, nbformat: Any) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    check(notebook, path.stem)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert not re.search(r"/(home|tmp|root|work|Users)/", path.read_text(encoding="utf-8"))
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path: Path, nbformat: Any, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the package nbclient is not installed")
    pytest.importorskip("ipykernel", reason="the package ipykernel is not installed")
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    work = tmp_path / "work"
    work.mkdir()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "IPYTHONDIR": str(tmp_path / "ipython"),  # nobody's own settings
        "HF_HUB_OFFLINE": "1",
    }
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(work)}}
    )
    client.execute(env=surroundings)
    check(notebook, path.stem)
    assert not [*work.iterdir()]
