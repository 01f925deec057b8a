"""Folders of images: rows, bad images among them, runs that are killed and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import captionfix
from captionfix.captioners.models import ShowAttendTellConfig, ShowAttendTellModel
from captionfix.captioners.pretrained import PretrainedCaptioner
from captionfix.captioners.words import SPECIAL, square_processor, word_tokenizer
from captionfix.cli import main
from captionfix.errors import DataError, OutputError
from captionfix.ground import Item, Options, Progress, ground, items
from captionfix.ground_parquet import write_parquet

COUNT = 7


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a very small captioner of random weights."""
    torch.manual_seed(3)
    words = [*SPECIAL, "a", "red", "dog", "cat", "runs"]
    cnn = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    config = ShowAttendTellConfig(
        cnn=cnn, image_size=32, feature_size=8, vocab_size=len(words), word_size=16, hidden_size=16, max_words=6,
        value_size=14, attention_size=10, positions=(8, 8), tie_words=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("captioners") / "tiny"
    PretrainedCaptioner(ShowAttendTellModel(config), word_tokenizer(words), square_processor(32), "tiny").save(folder)
    return str(folder)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    random = np.random.default_rng(0)
    for k in range(COUNT):
        place = folder / ("sub" if k % 3 == 0 else ".") / f"{k}.png"
        Image.fromarray(random.integers(0, 256, (24 + k, 40, 3), dtype=np.uint8)).save(place)
    (folder / "bad.jpg").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not an image")
    return folder


def options(captioner: str, **more: Any) -> Options:
    return Options(captioner, policy={"sums": 4, "convolutions": 2, "neurons": None}, beams=1, **more)


def read(path: Path) -> list[Any]:
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def test_rows_are_those_of_single_calls(captioner: str, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    chosen = options(captioner)
    progress = ground(photos, out, chosen, workers=2, batch=3)
    assert (progress.total, progress.done, progress.here) == (COUNT + 1,) * 3
    assert [record["image"] for record in progress.failed] == ["bad.jpg"]
    rows = read(out / "words.jsonl")
    names = list(dict.fromkeys(row["image"] for row in rows))
    assert names == sorted(names)  # in the folder's order, whichever batch they were in
    assert len(names) == COUNT
    model = captionfix.load(captioner)
    for name in ("1.png", "sub/3.png"):
        mine = [row for row in rows if row["image"] == name]
        whole = captionfix.explain(model, photos / name, policy=chosen.policy, beams=1)
        assert [row["word"] for row in mine] == [word.text for word in whole]
        assert mine[0]["caption"] == whole.caption
        assert mine[0]["file"] == str(photos / name)
        for row, word in zip(mine, whole, strict=True):
            assert row["probability"] == pytest.approx(word.probability, rel=1e-4)
            assert row["image_share"] == pytest.approx(word.image_share, abs=1e-4)
            assert np.array(row["feature_map"]) == pytest.approx(word.feature_map, abs=1e-4)
            masses = [mass for _, _, mass in row["fixations"]]
            assert masses == sorted(masses, reverse=True)
            assert masses[0] == pytest.approx(float(word.fixations[:, 2].max()), rel=1e-3)
    (failure,) = read(out / "failed.jsonl")
    assert failure["image"] == "bad.jpg"
    assert "not an image" in failure["error"]


# Kills itself before the rename of the third part or right after it.
KILLED = """
import os, signal, sys
rename, seen = os.replace, []
def replace(source, target):
    part = os.path.basename(os.path.dirname(target)) == "parts"
    seen.extend([target] * part)
    last = part and len(seen) == 3
    if last and sys.argv[1] == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
    if last:
        os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
from captionfix.ground import Options, ground
import json
ground(sys.argv[2], sys.argv[3], Options(**json.loads(sys.argv[4])), workers=int(sys.argv[5]), batch=2)
"""


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_and_gone_on_with(captioner: str, photos: Path, tmp_path: Path, moment: str) -> None:
    chosen = options(captioner, pictures=True)
    fields = json.dumps(vars(chosen))
    out = tmp_path / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, moment, photos, out, fields, "0"], check=False)
    assert ended.returncode == -9
    before = {path.name: path.read_bytes() for path in (out / "parts").glob("*.jsonl") if path.stem.isdigit()}
    assert len(before) == (2 if moment == "before" else 3)
    assert not (out / "words.jsonl").exists()
    progress = ground(photos, out, chosen, workers=0, batch=3)
    assert progress.here == COUNT + 1 - 2 * len(before)  # what was done is not done again
    assert progress.done == COUNT + 1
    after = {path.name: path.read_bytes() for path in (out / "parts").glob("*.jsonl")}
    assert before.items() <= after.items()
    assert not [path for path in (out / "parts").iterdir() if path.name.startswith(".")]
    records = [json.loads(text) for part in after.values() for text in part.decode().splitlines()]
    assert sorted(record["image"] for record in records) == sorted(item.name for item in items(photos))
    # the same rows as of a run that was left alone
    ground(photos, tmp_path / "whole", chosen, workers=0, batch=3)
    rows, whole = read(out / "words.jsonl"), read(tmp_path / "whole" / "words.jsonl")
    assert [(row["image"], row["place"], row["word"]) for row in rows] == [
        (row["image"], row["place"], row["word"]) for row in whole
    ]
    assert [row["image_share"] for row in rows] == pytest.approx([row["image_share"] for row in whole], abs=1e-4)
    for row in rows:
        assert captionfix.read(out / row["folder"]).words[row["place"]].text == row["word"]


def test_those_that_read_ahead_do_not_keep_a_killed_run(captioner: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for k in range(12):  # larger than a pipe holds: whoever reads ahead waits for somebody to take them
        Image.new("RGB", (300, 300), (20 * k, 0, 0)).save(tmp_path / "photos" / f"{k:02d}.png")
    chosen = options(captioner)
    command = [
        sys.executable,
        "-c",
        KILLED,
        "after",
        tmp_path / "photos",
        tmp_path / "out",
        json.dumps(vars(chosen)),
        "2",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as run:
        assert run.wait(timeout=120) == -9
        # at once, before its readers have noticed
        progress = ground(tmp_path / "photos", tmp_path / "out", chosen, workers=2, batch=4)
        assert (progress.here, progress.done) == (6, 12)
        run.communicate(timeout=60)  # ends when nobody holds the other end any more, so the readers have ended too
    assert len({row["image"] for row in read(tmp_path / "out" / "words.jsonl")}) == 12


def test_again_does_nothing_and_new_images_are_added(captioner: str, photos: Path, tmp_path: Path) -> None:
    chosen = options(captioner)
    ground(photos, tmp_path / "out", chosen, workers=0)
    first = (tmp_path / "out" / "words.jsonl").read_bytes()
    assert ground(photos, tmp_path / "out", chosen, workers=0).here == 0
    assert (tmp_path / "out" / "words.jsonl").read_bytes() == first
    Image.new("RGB", (30, 30), "red").save(photos / "0-new.png")
    assert ground(photos, tmp_path / "out", chosen, workers=0).here == 1
    rows = read(tmp_path / "out" / "words.jsonl")
    assert rows[0]["image"] == "0-new.png"
    with pytest.raises(OutputError, match="beams 1, not 2"):
        ground(photos, tmp_path / "out", Options(**{**vars(chosen), "beams": 2}), workers=0)


def test_lists_with_captions(captioner: str, photos: Path, tmp_path: Path) -> None:
    records = [
        {"image": "photos/1.png", "caption": "a red dog"},
        {"image": "photos/2.png", "caption": "a purple dog"},  # a word that the captioner does not know
        {"image": "photos/1.png", "caption": "a red dog"},
        {"image": str(photos / "4.png")},
        {"image": "photos/none.png"},
    ]
    path = tmp_path / "list.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    assert len(items(path)) == 4
    progress = ground(path, tmp_path / "out", options(captioner), workers=0, batch=4)
    failed = {record["image"]: record["error"] for record in progress.failed}
    assert failed.keys() == {"photos/2.png", "photos/none.png"}
    assert "purple" in failed["photos/2.png"]
    words = [row["word"] for row in read(tmp_path / "out" / "words.jsonl") if row["image"] == "photos/1.png"]
    assert words == ["a", "red", "dog"]
    plain = tmp_path / "list.txt"
    plain.write_text("photos/1.png\n\n  photos/2.png  \n")
    assert [item.name for item in items(plain)] == ["photos/1.png", "photos/2.png"]
    assert items(plain)[0] == Item("photos/1.png", str(tmp_path / "photos" / "1.png"))


def test_what_is_wrong_is_said(captioner: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such folder or list"):
        items(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image"):
        items(tmp_path / "empty")
    (tmp_path / "bad.jsonl").write_text('{"picture": 1}')
    with pytest.raises(DataError, match="line 1: not of the form"):
        items(tmp_path / "bad.jsonl")
    with pytest.raises(OutputError, match="holds something else"):
        ground(photos, photos, options(captioner))


def test_one_run_at_a_time(captioner: str, photos: Path, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="this system has no such locks")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run is at work"):
            ground(photos, tmp_path / "out", options(captioner))


def test_the_command(captioner: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["ground", photos, "--out", out, "--captioner", captioner, "--beams", 1, "--workers", 0, "--pictures",
                 "--policy", "sums=4,convolutions=2"]  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert end.value.code == 2  # bad.jpg
    assert printed.err.splitlines()[0].startswith("captionfix: bad.jpg: ")
    assert f"{COUNT + 1} images explained now" in printed.out
    assert "page.html#word-" in (out / "index.html").read_text(encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 0
    assert f"0 images explained now, {COUNT + 1} in all" in capsys.readouterr().out


def test_parquet_has_the_same_rows(captioner: str, photos: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    ground(photos, tmp_path / "out", options(captioner), workers=0)
    table = parquet.read_table(write_parquet(tmp_path / "out")).to_pylist()
    rows = read(tmp_path / "out" / "words.jsonl")
    assert [(row["image"], row["word"], row["probability"]) for row in table] == [
        (row["image"], row["word"], row["probability"]) for row in rows
    ]
    assert table[1]["alternatives"][0] == dict(zip(("word", "share"), rows[1]["alternatives"][0], strict=True))
    assert table[1]["feature_map"] == rows[1]["feature_map"]


@pytest.mark.slow
def test_ray_with_a_worker_killed_on_the_way(captioner: str, photos: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    psutil = pytest.importorskip("psutil", reason="psutil is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    killed = []

    def report(progress: Progress) -> None:
        if progress.here == 1:  # one worker at least is at its next image
            workers = [p for p in psutil.Process().children(recursive=True) if "MapWorker" in " ".join(p.cmdline())]
            workers[0].kill()
            killed.append(workers[0].pid)

    try:
        chosen = options(captioner)
        progress = ground(photos, tmp_path / "out", chosen, engine="ray", workers=2, batch=1, report=report)
    finally:
        ray.shutdown()
    assert len(killed) == 1
    assert (progress.done, [record["image"] for record in progress.failed]) == (COUNT + 1, ["bad.jpg"])
    ground(photos, tmp_path / "local", chosen, workers=0, batch=1)
    assert read(tmp_path / "out" / "words.jsonl") == read(tmp_path / "local" / "words.jsonl")
