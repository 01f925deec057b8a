"""The page to explore an explanation, as a file."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionfix.errors import OutputError
from captionfix.explanation import Explanation, Word
from captionfix.render import figure
from captionfix.render.page import credits, page, small_maps, where

MOST = 1_500_000


class Elements(HTMLParser):
    """All start tags of a document."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def data(document: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', document, re.S)
    assert found is not None
    result: dict[str, Any] = json.loads(found[1])
    return result


def test_one_file_that_needs_nothing_beside_it(explanation: Explanation, tmp_path: Path) -> None:
    path = explanation.to_html(tmp_path / "new" / "page.html")
    document = path.read_text(encoding="utf-8")
    assert path == tmp_path / "new" / "page.html"
    assert "://" not in document
    for tag, attributes in Elements(document).found:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        assert tag not in ("link", "iframe", "object")
        if "src" in attributes:
            assert str(attributes["src"]).startswith("data:image/")
    with pytest.raises(OutputError, match="can't write"):
        explanation.to_html(tmp_path)


def test_a_photograph_and_twelve_words_stay_small(invent: Callable[..., Explanation]) -> None:
    made = invent("a dog beside the ball and a dog beside the red ball", size=(640, 480))
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)  # nothing compresses worse
    big = replace(made, image=Image.fromarray(noise), grid=(384, 384))
    assert len(big) == 12
    assert len(page(big).encode()) < MOST


def test_a_large_photograph_is_embedded_smaller(invent: Callable[..., Explanation]) -> None:
    document = page(invent(size=(3000, 2000)))
    (source,) = (a["src"] for tag, a in Elements(document).found if tag == "img")
    photo = Image.open(io.BytesIO(base64.b64decode(str(source).partition(",")[2])))
    assert photo.size == (1280, 853)
    assert data(document)["size"] == [3000, 2000]


def test_numbers_of_the_words(explanation: Explanation) -> None:
    document = page(explanation)
    held = data(document)
    dog = held["words"][1]
    assert (dog["text"], dog["p"], dog["share"], dog["contrast"]) == ("dog", 0.55, 0.7, "cat")
    assert held["words"][2]["share"] is None
    assert dog["alternatives"] == [["dog", 0.55], ["cat", 0.2], ["<end>", 0.1]]
    assert dog["credits"] == [0.05]
    x0, y0, x1, y1 = explanation["dog"].box() or (0, 0, 0, 0)
    assert dog["box"] == pytest.approx([x0 / 320, y0 / 240, x1 / 320, y1 / 240], abs=1e-4)
    points = np.array(dog["points"]).reshape(-1, 3)
    assert np.allclose(points[:, :2] / 1e4 * (320, 240), explanation["dog"].fixations[:, :2], atol=0.05)
    assert held["partial"] is False
    columns, rows = held["maps"]["grid"]
    raw = np.frombuffer(base64.b64decode(held["maps"]["raw"]), np.uint8).reshape(5, rows, columns)
    scale = figure.scale(explanation, False)
    assert np.abs(raw / 255 - scale(figure.densities(explanation, False))).max() < 0.003


def test_words_without_evidence_and_captions_without_words(invent: Callable[..., Explanation]) -> None:
    made = invent("a dog")
    bare = replace(made, words=tuple(replace(word, fixations=np.zeros((0, 3), np.float32)) for word in made.words))
    held = data(page(bare))
    assert held["words"][0]["box"] is None
    assert held["words"][0]["where"]["raw"] == "no evidence"
    assert data(page(replace(made, words=(), caption="")))["words"] == []


def test_what_the_page_says_fits_any_image(explanation: Explanation) -> None:
    assert "photograph" not in page(explanation).lower()  # a drawn scene is none


def test_credits_go_by_place() -> None:
    none = np.zeros((0, 3), np.float32)
    word = Word("b", 3, 0, 1.0, none, none, language=(("<start>", 0.5), ("a", 0.2), ("b", float("nan")), ("a", 0.1)))
    assert credits(word) == [0.2, 0.0, 0.1]
    assert credits(replace(word, language=())) == []


def test_small_maps_are_means() -> None:
    values = np.random.default_rng(0).random((2, 64, 96)).astype(np.float32)
    small = small_maps(values, 48)
    assert small.shape == (2, 32, 48)
    blocks = values.reshape(2, 32, 2, 48, 2).mean(axis=(2, 4))
    # the triangle reaches over the block's edges, so a cell is near its block's mean and the whole's mean is kept
    assert abs(small.mean() / 255 - values.mean()) < 0.01
    assert np.corrcoef(small.ravel(), blocks.ravel())[0, 1] > 0.85


def test_a_map_in_words() -> None:
    assert where((0, 0, 10, 10), (5, 5), (100, 100)) == "strongest at the upper left; its box covers 1 % of the image"
    assert where((0, 0, 100, 50), (50, 50), (100, 100)).startswith("strongest at the centre; its box covers 50 %")
    assert where(None, None, (100, 100)) == "no evidence"


def test_drawing_needs_no_torch(explanation: Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "saved")
    code = (
        "import sys, captionfix; captionfix.read(sys.argv[1]).to_html(sys.argv[2]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "saved", tmp_path / "page.html"], check=True)
    assert (tmp_path / "page.html").stat().st_size > 10_000
