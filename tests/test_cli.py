"""The command line from the outside: what it writes, prints and returns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import captionfix
from captionfix.captioners.loading import bundled
from captionfix.captioners.models import ShowAttendTellConfig, ShowAttendTellModel
from captionfix.captioners.pretrained import PretrainedCaptioner
from captionfix.captioners.words import SPECIAL, square_processor, word_tokenizer
from captionfix.cli import main


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a very small captioner of random weights."""
    torch.manual_seed(3)
    words = [*SPECIAL, "a", "red", "dog", "cat", "runs"]
    cnn = {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [8, 12],
        "depths": [1, 1],
        "layer_type": "basic",
    }
    config = ShowAttendTellConfig(
        cnn=cnn, image_size=32, feature_size=12, vocab_size=len(words), word_size=16, hidden_size=16, max_words=8,
        value_size=14, attention_size=10, positions=(4, 4), tie_words=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("captioners") / "tiny"
    PretrainedCaptioner(ShowAttendTellModel(config), word_tokenizer(words), square_processor(32), "tiny").save(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "dog.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    code = end.value.code
    return (code if isinstance(code, int) else 0 if code is None else 1), printed.out, printed.err


def test_explain_writes_a_folder_for_the_picture(
    captioner: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (
        "--captioner",
        captioner,
        "--caption",
        "a red dog runs",
        "--contrast",
        "dog=cat",
        "--boxes",
        "--fixations",
        "--html",
    )
    status, out, err = run(capsys, "explain", picture, *arguments, "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    folder = tmp_path / "out" / "dog"
    names = {"explanation.json", "arrays.npz", "image.png", "figure.png", "page.html"}
    assert {path.name for path in folder.iterdir()} == names
    assert "a red dog runs" in (folder / "page.html").read_text(encoding="utf-8")
    assert str(folder / "page.html") in out
    result = captionfix.read(folder)
    assert result.caption == "a red dog runs"
    assert result["dog"].contrast == "cat"
    assert result.image.size == (60, 40)
    assert str(result) in out
    assert str(folder / "figure.png") in out
    assert Image.open(folder / "figure.png").width > 1000


def test_several_pictures_and_bad_ones_among_them(
    captioner: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    (tmp_path / "again").mkdir()
    second = tmp_path / "again" / "dog.jpg"
    Image.open(picture).save(second)
    images = (tmp_path / "bad.jpg", picture, tmp_path / "missing.png", second)
    arguments = (
        "--captioner",
        captioner,
        "--beams",
        1,
        "--policy",
        "sums=4,convolutions=1,neurons=none",
        "--method",
        "flow",
    )
    status, out, err = run(capsys, "explain", *images, *arguments, "--caption", "a dog", "--out", tmp_path / "out")
    assert status == 2
    assert [line.split(": ")[1].split("/")[-1] for line in err.splitlines()] == ["bad.jpg", "missing.png"]
    assert "not an image" in err
    assert "there is no such file" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dog", "dog-2"]
    assert len(out.splitlines()) == 2
    result = captionfix.read(tmp_path / "out" / "dog-2")
    assert result.method == "flow"
    assert (result.policy["sums"], result.policy["neurons"]) == (4, None)


def test_a_rotated_photograph_is_explained_as_a_person_sees_it(
    captioner: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upright = Image.fromarray(np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.save(tmp_path / "straight.png")
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    images = (tmp_path / "straight.png", tmp_path / "turned.png")
    arguments = ("--captioner", captioner, "--caption", "a dog", "--method", "flow", "--out", tmp_path / "out")
    assert run(capsys, "explain", *images, *arguments)[0] == 0
    straight, turned = (captionfix.read(tmp_path / "out" / name) for name in ("straight", "turned"))
    assert turned.image.size == (50, 30)
    np.testing.assert_array_equal(straight["dog"].fixations, turned["dog"].fixations)
    assert len(turned["dog"].fixations) > 0
    assert (turned["dog"].fixations[:, :2] <= (50, 30)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--caption", "a zebra and a gnu"), "zebra"),
        (("--caption", "  "), "has no words"),
        (("--caption", "a dog " * 40), "dog.png"),
        (("--caption", "a dog", "--contrast", "cat=dog"), "its words are: a, dog"),
        (("--contrast", "dog"), "give WORD=OTHER"),
        (("--policy", "best"), "best"),
        (("--policy", "sums=0"), "sums"),
        (("--policy", "sums="), "NAME=VALUE"),
        (("--method", "magic"), "no method is named 'magic'"),
        (("--captioner", "nowhere"), "no captioner nowhere"),
        (("--device", "abacus"), "can't compute on 'abacus'"),
    ],
)
def test_errors_are_one_line_and_status_2(
    captioner: str,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    status, out, err = run(capsys, "explain", picture, "--captioner", captioner, "--out", tmp_path / "out", *arguments)
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("captionfix: ")
    assert message in err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_unknown_words_may_be_mapped(
    captioner: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--captioner", captioner, "--caption", "a zebra", "--unknown", "map", "--out", tmp_path / "out")
    assert run(capsys, "explain", picture, *arguments)[0] == 0
    assert len(captionfix.read(tmp_path / "out" / "dog")) == 2


def test_results_are_never_written_over(
    captioner: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out" / "dog").mkdir(parents=True)
    (tmp_path / "out" / "dog" / "mine").touch()
    arguments = ("explain", picture, "--captioner", captioner, "--caption", "a dog")
    status, _, err = run(capsys, *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert "not empty; choose another" in err
    assert [path.name for path in (tmp_path / "out" / "dog").iterdir()] == ["mine"]
    status, _, err = run(capsys, *arguments, "--out", picture)
    assert status == 2
    assert err.count("\n") == 1
    monkeypatch.chdir(tmp_path)
    assert run(capsys, *arguments)[0] == run(capsys, *arguments)[0] == 0
    assert (tmp_path / "captionfix-out" / "dog").is_dir()
    assert (tmp_path / "captionfix-out-2" / "dog").is_dir()


def test_a_shell_sees_no_traceback() -> None:
    program = "from captionfix.cli import main; main()"
    command = [sys.executable, "-c", program, "explain", "nowhere.jpg"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "captionfix: nowhere.jpg: there is no such file\n"
    assert result.stdout == ""


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"captionfix {captionfix.__version__}\n", "")
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(name in out for name in ("demo", "explain", "train"))


@pytest.mark.slow
@pytest.mark.skipif(not {"scenes", "photos"} <= set(bundled()), reason="the bundled captioners are not here")
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, "demo")
    assert (status, err) == (0, "")
    folder = tmp_path / "captionfix-demo"
    assert str(folder) in out
    for name in ("scene", "portrait"):
        assert (folder / name / "figure.png").is_file()
        assert len(captionfix.read(folder / name)) >= 3
    from captionfix.scenes import scene

    assert captionfix.read(folder / "scene").caption == scene(6, split="test").caption
