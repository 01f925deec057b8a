"""The error browser: which words come first, and what the page shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from captionfix.browse import browse, collect, miss, suspicious
from captionfix.cli import main
from captionfix.errors import OutputError
from captionfix.explanation import Explanation
from captionfix.ground_rows import line, rows


def with_numbers(made: Explanation, **numbers: list[float]) -> Explanation:
    words = [replace(word, **{name: values[word.index] for name, values in numbers.items()}) for word in made.words]
    return replace(made, words=tuple(words))


@pytest.fixture
def folder(tmp_path: Path, invent: Callable[..., Explanation]) -> Path:
    """Two saved explanations, one with a page, and a third image of which there are rows alone."""
    place = tmp_path / "results"
    first = with_numbers(
        invent("a dog beside the ball"), image_share=[0.9, 0.8, 0.1, 0.9, 0.2], probability=[0.9, 0.1, 0.9, 0.9, 0.5]
    )
    second = with_numbers(invent("a ball"), image_share=[0.9, 0.6], image_effect=[0.0, -2.0])
    first.save(place / "one")
    first.to_html(place / "one" / "page.html")
    second.save(place / "deep" / "two")
    third = with_numbers(invent("a </script> dog"), image_share=[0.9, 0.05, float("nan")])
    third.image.save(tmp_path / "three.png")
    (place / "words.jsonl").write_text("".join(map(line, rows(third, "three.png", tmp_path / "three.png"))))
    return place


def cards(page: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text("utf-8"), re.S)
    assert found is not None
    return json.loads(found[1])["cards"]


def test_all_words_are_found(folder: Path) -> None:
    entries = collect(folder)
    assert [(entry.row["image"], len(entry.words)) for entry in entries if entry.row["place"] == 0] == [
        ("three.png", 3), ("deep/two", 2), ("one", 5),
    ]  # fmt: skip
    assert [entry.row["word"] for entry in entries if entry.row["image"] == "one"] == [
        "a",
        "dog",
        "beside",
        "the",
        "ball",
    ]
    shown = [(card["image"], card["words"][card["place"]]) for card in cards(browse(folder))]
    assert shown == [
        ("three.png", "</script>"),
        ("three.png", "dog"),
        ("deep/two", "ball"),
        ("one", "dog"),
        ("one", "beside"),
        ("one", "ball"),
    ]
    assert len(cards(browse(folder, function_words=True))) == 10


def test_the_first_of_each_order_are_kept(folder: Path) -> None:
    entries = [entry for entry in collect(folder) if entry.row["word"] in ("dog", "ball", "</script>")]
    kept = suspicious(entries, 1)
    # lowest share, probability and effect in turn; the NaN share is no low share
    assert [(entry.row["image"], entry.row["word"]) for entry in kept] == [
        ("three.png", "</script>"), ("deep/two", "ball"), ("one", "dog"),
    ]  # fmt: skip


def test_rows_of_a_saved_explanation_count_once(tmp_path: Path, explanation: Explanation) -> None:
    explanation.save(tmp_path / "images" / "a")
    found = rows(explanation, "a.jpg", "/nowhere/a.jpg", "images/a")
    (tmp_path / "words.jsonl").write_text("".join(map(line, found)))
    entries = collect(tmp_path)
    assert [entry.row["image"] for entry in entries] == ["a.jpg"] * 5
    assert entries[0].folder == tmp_path / "images" / "a"
    x0, y0, x1, y1 = explanation["dog"].box() or (0, 0, 0, 0)
    assert entries[1].row["box"] == pytest.approx([x0, y0, x1, y1], abs=0.01)
    assert all(card["picture"] for card in cards(browse(tmp_path)))


def test_a_miss_is_the_distance_to_the_nearest_region() -> None:
    boxes = [(0.0, 0.0, 0.1, 0.1), (0.5, 0.5, 1.0, 1.0)]
    assert miss((60, 60), boxes, (100, 100)) == 0
    assert miss((30, 50), boxes, (100, 100)) == pytest.approx(20 / np.hypot(100, 100))
    assert miss((13, 14), boxes, (100, 100)) == pytest.approx(5 / np.hypot(100, 100))


def test_pointing_failures(tmp_path: Path, explanation: Explanation) -> None:
    explanation.save(tmp_path / "out" / "photo")
    # dog at (0.25, 0.5) as it says; ball is at (0.75, 0.25) but said to be at the lower left
    phrases = [
        {"span": [0, 2], "entity": "1", "types": ["animals"], "boxes": [[0.1, 0.3, 0.4, 0.7]]},
        {"span": [3, 5], "entity": "2", "types": ["other"], "boxes": [[0.0, 0.8, 0.1, 1.0]]},
    ]
    record = {
        "photo": "photo.jpg",
        "captions": [{"words": ["two", "dogs", "beside", "the", "balls"], "phrases": phrases}],
    }
    (tmp_path / "regions.jsonl").write_text(json.dumps(record))
    found = {card["words"][card["place"]]: card["pointing"] for card in cards(
        browse(tmp_path / "out", tmp_path / "page.html", sort="pointing", regions=tmp_path / "regions.jsonl")
    )}  # fmt: skip
    assert found["dog"] == 0
    x, y = explanation["ball"].point() or (0, 0)
    assert found["ball"] == pytest.approx(np.hypot(x - 32, 192 - y) / np.hypot(320, 240), abs=1e-4)


def test_what_is_wrong_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(OutputError, match="there is no such folder"):
        browse(tmp_path / "none")
    with pytest.raises(OutputError, match="no saved explanations"):
        browse(tmp_path)
    (tmp_path / "words.jsonl").write_text("{}\n{")
    with pytest.raises(OutputError, match="line 1: not a row"):
        browse(tmp_path)
    (tmp_path / "words.jsonl").write_text("{")
    with pytest.raises(OutputError, match="line 1: not JSON"):
        browse(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["browse", str(tmp_path / "none")])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("captionfix: ")


def test_the_page_in_a_browser(browser: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["browse", str(folder)])
    assert end.value.code == 0
    assert str(folder / "browse.html") in capsys.readouterr().out
    shown = browser.new_page(viewport={"width": 1000, "height": 800}, offline=True)
    shown.set_default_timeout(120_000)
    trouble: list[str] = []
    shown.on("pageerror", lambda error: trouble.append(str(error)))
    shown.on("console", lambda message: trouble.append(message.text))
    shown.goto((folder / "browse.html").as_uri())
    words = shown.locator("#cards h2 bdi")
    assert words.all_inner_texts() == ["</script>", "beside", "ball", "ball", "dog"]
    assert shown.locator("#cards h2 small").all_inner_texts() == [f"image {n} %" for n in (5, 10, 20, 60, 80)]
    assert all(shown.locator("#cards img").evaluate_all("all => all.map(e => e.naturalWidth > 100)"))
    shown.locator("[name=sort][value=probability]").check()
    assert words.first.inner_text() == "dog"
    shown.locator("[name=sort][value=effect]").check()
    assert shown.locator("#cards h2 small").first.inner_text() == "−2.00 nats"
    assert shown.locator("[name=sort][value=pointing]").is_disabled()
    shown.locator("[name=text]").fill("DO")
    assert words.all_inner_texts() == ["dog", "dog"]
    shown.locator("[name=sort][value=probability]").check()
    shown.locator("a.shot").first.click()
    assert shown.url.endswith("/one/page.html#word-1")
    assert shown.locator("#detail h2").inner_text() == "dognot cat"
    assert trouble == []
    shown.close()


def test_photographs_that_have_moved(tmp_path: Path, explanation: Explanation) -> None:
    Image.new("RGB", (320, 240)).save(tmp_path / "here.png")
    text = "".join(line(row) for name in ("here", "gone") for row in rows(explanation, name, tmp_path / f"{name}.png"))
    (tmp_path / "words.jsonl").write_text(text)
    found = {card["image"]: card["picture"] is not None for card in cards(browse(tmp_path))}
    assert found == {"here": True, "gone": False}
