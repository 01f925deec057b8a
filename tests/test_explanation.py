from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captionfix import maps
from captionfix.errors import CaptionError, OutputError
from captionfix.explanation import Explanation
from captionfix.saved import VERSION, read


def test_words_by_place_text_and_slice(explanation: Explanation) -> None:
    assert [word.text for word in explanation] == ["a", "dog", "beside", "the", "ball"]
    assert len(explanation) == 5
    assert explanation["dog"] is explanation[1] is explanation[-4]
    assert explanation["dog"].explanation is explanation
    assert [word.text for word in explanation[1:3]] == ["dog", "beside"]
    with pytest.raises(CaptionError, match="no word 'cat'; its words are: a, dog, beside, the, ball"):
        explanation["cat"]
    with pytest.raises(IndexError):
        explanation[5]


def test_the_first_of_equal_words(invent: Callable[..., Explanation]) -> None:
    assert invent("a dog and a dog")["dog"].index == 1


def test_results_are_frozen(explanation: Explanation) -> None:
    with pytest.raises(FrozenInstanceError):
        explanation.caption = "other"  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        explanation["dog"].probability = 1.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="read-only"):
        explanation.maps()[:] = 0


def test_a_word_knows_one_explanation(explanation: Explanation) -> None:
    loose = replace(explanation["dog"])
    with pytest.raises(CaptionError, match="belongs to no explanation"):
        loose.heatmap()
    other = Explanation(**{**_fields(explanation), "words": (replace(loose, index=0),)})
    assert other[0].explanation is other
    assert explanation["dog"].explanation is explanation
    with pytest.raises(ValueError, match="says index 1 but is at 0"):
        Explanation(**{**_fields(explanation), "words": (loose,)})


def _fields(explanation: Explanation) -> dict[str, object]:
    names = ("image", "words", "caption", "captioner", "method", "policy", "window", "grid", "version")
    return {name: getattr(explanation, name) for name in names}


@pytest.mark.parametrize("specific", [True, False])
def test_heatmap_has_the_images_size_and_the_words_place(explanation: Explanation, specific: bool) -> None:
    for text, place in {"dog": (0.25, 0.5), "ball": (0.75, 0.25)}.items():
        heatmap = explanation[text].heatmap(specific)
        assert heatmap.shape == (240, 320)
        assert heatmap.dtype == np.float32
        assert heatmap.max() == 1
        row, column = np.unravel_index(heatmap.argmax(), heatmap.shape)
        assert (column / 320, row / 240) == pytest.approx(place, abs=0.06)
        assert explanation[text].point(specific) == pytest.approx((place[0] * 320, place[1] * 240), abs=20)


def test_specific_takes_off_the_mean(explanation: Explanation) -> None:
    each = np.stack([maps.density(w.fixations, (320, 240), (0, 0, 320, 240), (64, 64)) for w in explanation])
    own = maps.resize(np.maximum(each[1] - each.mean(0), 0), (320, 240), (0, 0, 320, 240))
    np.testing.assert_allclose(explanation["dog"].heatmap(), own / own.max(), atol=1e-4)


def test_a_stray_fixation_stays_in_the_map_by_its_mass_but_not_where_all_weigh_the_same(
    explanation: Explanation,
) -> None:
    """The published set drops outliers before it smooths; where fixations have masses, the map holds all of them."""
    stray = np.array([[310, 230, 0.01]], dtype=np.float32)  # far from the dog
    word = replace(
        explanation["dog"], index=0, fixations=np.concatenate([explanation["dog"].fixations * [1, 1, 0.99], stray])
    )
    fields = {**_fields(explanation), "words": (word,)}
    for policy, held in (({"mass": "share"}, 0.01), ({"mass": "set"}, 0.0)):
        whole = Explanation(**{**fields, "policy": policy}).maps(False)[0]
        corner = whole[52:, 52:]  # of 64 x 64
        assert corner.sum() == pytest.approx(held, abs=1e-6)
        assert whole.sum() == pytest.approx(1, abs=1e-4)


def published(explanation: Explanation) -> Explanation:
    """The same as if its fixations were sets."""
    return replace(explanation, policy={"mass": "set"})


def test_box_is_around_the_words_place(explanation: Explanation) -> None:
    points = explanation["dog"].fixations
    low, high = points[:, :2].min(0), points[:, :2].max(0)
    # half a pixel of the input, 64 x 64 in an image of 320 x 240, and where the map is drawn what its Gaussian adds
    for whole, reach in ((published(explanation), (2.5, 1.9)), (explanation, (10, 7.5))):
        x0, y0, x1, y1 = whole["dog"].box() or (0, 0, 0, 0)
        assert low[0] - reach[0] <= x0 < 80 < x1 <= high[0] + reach[0]
        assert low[1] - reach[1] <= y0 < 120 < y1 <= high[1] + reach[1]
    x0, y0, x1, y1 = explanation["dog"].box(share=0.9) or (0, 0, 0, 0)
    assert (x1 - x0) < 80
    assert (y1 - y0) < 60


def test_box_is_where_all_evidence_stands_out_and_published_around_the_points(explanation: Explanation) -> None:
    for word in explanation:
        for specific, whole in ((False, explanation), (True, explanation), (True, published(explanation))):
            raw = whole.maps(False)
            own = np.maximum(raw[word.index] - (1 if specific else 0.25) * raw.mean(0), 0)
            expected = maps.box(own, (320, 240), explanation.window)
            assert whole[word.index].box(specific) == pytest.approx(expected)
        assert word.box() == word.box(False)
        for share in (0.9, 1.0):
            around = maps.around(word.evidence, (320, 240), explanation.window, explanation.grid, share)
            assert word.box(share=share) == around == published(explanation)[word.index].box(share=share)
        assert published(explanation)[word.index].box() == word.box(share=1.0)
        with pytest.raises(ValueError, match="leave specific or share out"):
            word.box(specific=True, share=0.9)


def test_the_window_shifts_everything(invent: Callable[..., Explanation]) -> None:
    shifted = invent(window=(40.0, 0.0, 280.0, 240.0))
    assert shifted["dog"].point() == pytest.approx((40 + 0.25 * 240, 120), abs=15)
    heatmap = shifted["a"].heatmap(specific=False)
    assert not heatmap[:, :40].any()
    assert not heatmap[:, 280:].any()
    assert heatmap[:, 40].any()
    assert heatmap[:, 279].any()


def test_a_word_without_evidence(explanation: Explanation) -> None:
    none = np.zeros((0, 3), dtype=np.float32)
    words = tuple(replace(word, fixations=none) if word.text == "the" else word for word in explanation)
    changed = Explanation(**{**_fields(explanation), "words": words})  # type: ignore[arg-type]
    assert not changed["the"].heatmap().any()
    assert changed["the"].box() is None
    assert changed["the"].point() is None
    changed.figure(boxes=True, fixations=True)


def test_tiny_and_large_images(invent: Callable[..., Explanation]) -> None:
    for size in [(1, 1), (1, 70), (2500, 1500)]:
        heatmap = invent(size=size)["dog"].heatmap()
        assert heatmap.shape == size[::-1]
        assert heatmap.max() == 1


@pytest.mark.parametrize(("size", "photo"), [((320, 240), "image.png"), ((1600, 1300), "image.jpg")])
def test_save_and_read(invent: Callable[..., Explanation], tmp_path: Path, size: tuple[int, int], photo: str) -> None:
    before = invent(size=size)
    folder = before.save(tmp_path / "result")
    assert {path.name for path in folder.iterdir()} == {"explanation.json", "arrays.npz", photo}
    assert [*tmp_path.iterdir()] == [folder]
    after = read(folder)
    for name in ("caption", "captioner", "method", "policy", "window", "grid", "version"):
        assert getattr(after, name) == getattr(before, name)
    difference = np.asarray(after.image).astype(int) - np.asarray(before.image)
    assert np.abs(difference).max() <= (0 if photo.endswith("png") else 8)
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old.fixations, new.fixations)
        np.testing.assert_array_equal(old.feature_map, new.feature_map)
        for name in ("text", "index", "token", "language", "other", "image_effect", "alternatives", "contrast"):
            assert getattr(old, name) == getattr(new, name)
        assert new.image_share == pytest.approx(old.image_share, nan_ok=True)
    np.testing.assert_array_equal(after["dog"].heatmap(), before["dog"].heatmap())


def partly_even(explanation: Explanation, part: float) -> Explanation:
    """The same, but that "dog" has this part of its evidence evenly on the right half's four corners."""
    corners = np.array([[x, y, part / 4] for x in (170.5, 310.5) for y in (10.5, 230.5)], dtype=np.float32)
    return replace(explanation, words=tuple(replace(w, even=corners) if w.text == "dog" else w for w in explanation))


def test_what_lies_evenly_is_part_of_the_map_and_no_fixation(explanation: Explanation) -> None:
    mixed = partly_even(explanation, 0.4)
    plain, own = explanation["dog"], mixed["dog"]
    assert own.evidence[:, 2].sum() == pytest.approx(1, abs=1e-5)
    alone = partly_even(explanation, 1.0).maps(False)[own.index]
    expected = 0.6 * explanation.maps(False)[own.index] + 0.4 * alone
    np.testing.assert_allclose(mixed.maps(False)[own.index], expected, atol=1e-7)
    # 0.6 of the mass is around x = 80, 0.2 on the left corners and 0.2 on the right ones; pixels are 5 wide
    for share, right in ((0.8, 310.5 + 2.5), (0.5, 170.5 + 2.5)):
        box = mixed["dog"].box(share=share)
        assert box is not None
        assert box[2] == pytest.approx(right)
    np.testing.assert_array_equal(own.fixations, plain.fixations)


def test_what_lies_evenly_is_saved_and_older_forms_are_read(explanation: Explanation, tmp_path: Path) -> None:
    mixed = partly_even(explanation, 0.4)
    again = read(mixed.save(tmp_path / "mixed"))
    for old, new in zip(mixed, again, strict=True):
        np.testing.assert_array_equal(old.even, new.even)
    np.testing.assert_array_equal(mixed.maps(), again.maps())
    older = explanation.save(tmp_path / "older")
    record = json.loads((older / "explanation.json").read_text())
    record["version"] = 1
    (older / "explanation.json").write_text(json.dumps(record))
    assert all(word.even.shape == (0, 3) for word in read(older))


def test_reading_and_drawing_needs_no_torch(explanation: Explanation, tmp_path: Path) -> None:
    folder = explanation.save(tmp_path / "result")
    program = (
        "import sys, captionfix\n"
        f"result = captionfix.read({str(folder)!r})\n"
        "result['dog'].heatmap(), result['dog'].overlay(), result.figure(), str(result), result._repr_html_()\n"
        "print([name for name in ('torch', 'transformers', 'torchvision', 'matplotlib.pyplot') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_save_refuses_what_is_there(explanation: Explanation, tmp_path: Path) -> None:
    explanation.save(tmp_path / "result")
    with pytest.raises(OutputError, match="not empty"):
        explanation.save(tmp_path / "result")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="not a folder"):
        explanation.save(tmp_path / "file")
    with pytest.raises(OutputError, match="can't"):
        explanation.save(tmp_path / "file" / "below")


@pytest.fixture
def saved(explanation: Explanation, tmp_path: Path) -> Path:
    return explanation.save(tmp_path / "saved")


def test_read_of_nothing(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(OutputError, match="there is no such folder"):
        read(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"no explanation\.json in it"):
        read(tmp_path)
    (saved / "explanation.json").write_text('{"format": "something else"}')
    with pytest.raises(OutputError, match="not a saved explanation"):
        read(saved)


@pytest.mark.parametrize("name", ["explanation.json", "arrays.npz", "image.png"])
@pytest.mark.parametrize("damage", ["missing", "cut", "empty", "garbage"])
def test_read_of_damaged_files(saved: Path, name: str, damage: str) -> None:
    path = saved / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "garbage": b"\x80garbage"}[damage])
    with pytest.raises(OutputError):
        read(saved)


def test_read_refuses_newer_forms(saved: Path) -> None:
    record = json.loads((saved / "explanation.json").read_text())
    record["version"], record["captionfix"] = VERSION + 1, "9.1"
    (saved / "explanation.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match=rf"saved in form {VERSION + 1} by captionfix 9\.1.*install a newer one"):
        read(saved)


def test_read_refuses_what_does_not_fit(saved: Path) -> None:
    record = json.loads((saved / "explanation.json").read_text())
    for change in ({"size": [1, 1]}, {"words": [*record["words"], record["words"][0]]}, {"words": [{}]}, {"words": 7}):
        (saved / "explanation.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(OutputError, match="damaged or incomplete"):
            read(saved)


def test_read_never_unpickles(saved: Path) -> None:
    with np.load(saved / "arrays.npz") as arrays:
        changed = {name: arrays[name] for name in arrays.files}
    changed["fixations_0"] = np.array([print], dtype=object)
    np.savez(saved / "arrays.npz", **changed)
    with pytest.raises(OutputError, match="damaged"):
        read(saved)


def test_json_holds_no_nan(invent: Callable[..., Explanation], tmp_path: Path) -> None:
    folder = invent().save(tmp_path / "result")

    def refuse(text: str) -> None:
        raise AssertionError(text)

    json.loads((folder / "explanation.json").read_text(), parse_constant=refuse)


def test_prints_as_a_table(explanation: Explanation) -> None:
    text = str(explanation)
    assert repr(explanation) == text
    assert text.splitlines()[0] == '"a dog beside the ball"  (invented, removal)'
    assert "dog (not cat)" in text
    assert repr(explanation["dog"]) == "Word('dog', index=1, p=0.55, fixations=200)"


def test_empty_caption_has_no_words() -> None:
    empty = Explanation(Image.new("RGB", (8, 8)), (), "", "x", "flow", {}, (0, 0, 8, 8), (4, 4))
    assert empty.maps().shape == (0, 4, 4)
    empty.figure()
    assert '""' in str(empty)
