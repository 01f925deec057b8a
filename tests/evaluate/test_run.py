"""`captionfix evaluate` from the outside, and a run that is cut off at any moment."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from captionfix.cli import main
from captionfix.errors import OutputError, PolicyError
from captionfix.evaluate import boxes, metrics, published, report
from captionfix.evaluate.measure import METRICS, Plan, Record
from captionfix.evaluate.run import fingerprint, run

METHODS = ("default", "gradcam", "random")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures in the lines format, with words that the tiny captioners know."""
    folder = tmp_path_factory.mktemp("photographs")
    (folder / "images").mkdir()
    rng = np.random.default_rng(1)
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(folder / "images" / name)
    phrases = [
        {"span": [0, 3], "entity": 1, "types": ["animals"], "boxes": [[0, 0, 0.4, 0.5]]},
        {"span": [4, 6], "entity": 2, "types": ["other"], "boxes": [[0.6, 0.5, 1, 1]]},
    ]
    caption = {"words": ["A", "red", "dog", "left-of", "a", "ball"], "phrases": phrases}
    lines = [{"photo": name, "captions": [caption]} for name in ("one.png", "two.png")]
    (folder / "dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def captioner(captioners):
    """One family is enough for what is the same for both."""
    return captioners["show-attend-tell"]


def plan(captioner, **changes) -> Plan:
    settings = {"methods": METHODS, "metrics": ("pointing", "mass", "discrimination"), "limit": 2, **changes}
    return Plan(captioner.name, fingerprint(captioner), {"data": "photographs"}, **settings)


def timeless(records: list[Record]) -> list[str]:
    lines = [json.loads(record.line()) for record in records]
    return [json.dumps({k: v for k, v in line.items() if k not in ("seconds", "plain")}) for line in lines]


def test_a_run_that_is_killed_anywhere_goes_on(captioner, photographs, tmp_path):
    read = published.open_data(str(photographs), limit=2)
    whole, _ = run(captioner, read, plan(captioner), tmp_path / "whole")
    assert [(r.method, r.image) for r in whole] == [(m, i) for m in METHODS for i in (0, 1)]
    written = (tmp_path / "whole" / "scores.jsonl").read_bytes()
    first = written.index(b"\n") + 1
    for cut in (0, 5, first - 1, first, first + 1, len(written) - 1):
        out = tmp_path / f"cut at {cut}"
        out.mkdir()
        (out / "plan.json").write_bytes((tmp_path / "whole" / "plan.json").read_bytes())
        (out / "scores.jsonl").write_bytes(written[:cut])
        again, _ = run(captioner, read, plan(captioner), out)
        assert timeless(again) == timeless(whole)
        lines = (out / "scores.jsonl").read_text().splitlines()
        assert len(lines) == 6
        assert len({(json.loads(line)["image"], json.loads(line)["method"]) for line in lines}) == 6


def test_more_methods_and_pictures_may_be_added(captioner, photographs, tmp_path):
    for methods, limit in ((("gradcam",), 1), (("gradcam", "random"), 1), (("random", "gradcam"), 2)):
        read = published.open_data(str(photographs), limit=limit)
        records, _ = run(captioner, read, plan(captioner, methods=methods, limit=limit), tmp_path)
        assert [(r.method, r.image) for r in records] == [(m, i) for m in methods for i in range(limit)]
    assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("change", [{"seed": 1}, {"metrics": ("mass",)}, {"sigma": 0.1}, {"captions": "model"}])
def test_another_kind_of_run_is_refused(captioner, photographs, tmp_path, change):
    read = published.open_data(str(photographs), limit=1)
    run(captioner, read, plan(captioner, methods=("random",), limit=1), tmp_path)
    with pytest.raises(OutputError, match=next(iter(change))):
        run(captioner, read, plan(captioner, methods=("random",), limit=1, **change), tmp_path)


def test_a_folder_with_something_else_is_refused(captioner, photographs, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="no evaluation"):
        run(captioner, published.open_data(str(photographs)), plan(captioner), tmp_path)
    (tmp_path / "there").mkdir()
    run(captioner, published.open_data(str(photographs)), plan(captioner, methods=("random",)), tmp_path / "there")
    (tmp_path / "there" / "scores.jsonl").write_text("not json\n")
    with pytest.raises(OutputError, match="can't go on"):
        run(captioner, published.open_data(str(photographs)), plan(captioner, methods=("random",)), tmp_path / "there")


def test_chance_depends_on_the_seed_and_the_picture(captioner, photographs, tmp_path):
    read = published.open_data(str(photographs), limit=2)
    found = {
        seed: [
            r.scores for r in run(captioner, read, plan(captioner, methods=("random",), seed=seed), tmp_path / name)[0]
        ]
        for name, seed in (("a", 0), ("b", 1))
    }
    values = [[s[3] for s in scores if s[2] == "mass"] for each in found.values() for scores in each]
    assert len({tuple(v) for v in values}) == 4


def test_every_picture_draws_random_weights_of_its_own(captioner, photographs, tmp_path):
    pytest.importorskip("scipy")
    (item,) = published.open_data(str(photographs), limit=1)()
    wanted = plan(captioner, methods=("default",), metrics=("mass", "randomisation"), maps=("raw",))
    records, _ = run(captioner, lambda: iter([item, item]), wanted, tmp_path)
    mass = [[s[3] for s in r.scores if s[2] == "mass"] for r in records]
    changed = [[s[3] for s in r.scores if s[2] == "randomisation"] for r in records]
    assert mass[0] == mass[1]
    assert changed[0] != changed[1]


@pytest.mark.parametrize("family", ["show-attend-tell", "show-tell"])
def test_every_metric_is_written(captioners, family, photographs, tmp_path):
    pytest.importorskip("scipy")
    captioner = captioners[family]
    read = published.open_data(str(photographs), limit=1)
    wanted = tuple(name for name in METRICS if name != "f1")
    (record,), _ = run(
        captioner, read, plan(captioner, methods=("default",), limit=1, metrics=wanted), tmp_path / "people"
    )
    assert {score[2] for score in record.scores} == set(wanted)
    assert {score[0] for score in record.scores} == {"raw", "specific"}
    stages = {score[1] for score in record.scores if score[2] == "randomisation"}
    assert {"decoder", "everything", "CNN alone"} <= stages
    assert record.seconds > 0 < record.plain


def test_what_the_model_says_is_grounded(captioner, photographs, tmp_path):
    pytest.importorskip("scipy")
    read = published.open_data(str(photographs), limit=2)
    records, _ = run(
        captioner,
        read,
        plan(captioner, methods=("default",), metrics=("mass", "f1"), captions="model", maps=("raw",)),
        tmp_path,
    )
    recall = [(name, located) for r in records for _, side, name, _, located in r.events if side == "recall"]
    assert sorted({name for name, _ in recall}) == ["ball", "dog"]
    assert len(recall) == 4  # two boxed words in the one reference of each picture
    lines = {(line.metric, line.kind): line.mean for line in report.summarise(records)}
    events = [boxes.Event(r.image, *event[1:]) for r in records for event in r.events]
    assert lines["f1-all", "all"].value == boxes.f1(events).value


def test_a_method_that_the_captioner_cannot_follow_is_left_out(captioners, photographs, tmp_path):
    captioner = captioners["show-tell"]
    read = published.open_data(str(photographs), limit=1)
    records, left_out = run(
        captioner, read, plan(captioner, methods=("attention-weights", "centre"), limit=1), tmp_path / "a"
    )
    assert [r.method for r in records] == ["centre"]
    assert "no attention" in left_out["attention-weights"]
    with pytest.raises(PolicyError, match="no attention"):
        run(captioner, read, plan(captioner, methods=("attention",), limit=1), tmp_path / "b")


def test_summary_is_the_mean_with_its_interval():
    rows = [
        ("raw", "animals", "mass", 0.25),
        ("raw", "other", "mass", 0.75),
        ("raw", "pair", "discrimination", math.nan),
    ]
    records = [Record(k, str(k), "default", 2.0 + k, 0.5, rows) for k in range(3)]
    lines = {(line.metric, line.kind): line.mean for line in report.summarise(records)}
    assert lines["mass", "all"] == metrics.mean([0.25, 0.75] * 3, [0, 0, 1, 1, 2, 2])
    assert lines["mass", "animals"].value == 0.25
    assert (lines["discrimination", "all"].count, lines["discrimination", "all"].undefined) == (0, 3)
    assert ("discrimination", "pair") not in lines  # it is all there is
    assert report.seconds(records) == {"default": (3.0, 6.0)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"metrics": ("hits",)}, "no metric is named 'hits'.*pointing"),
        ({"maps": ("odd",)}, "kind of map"),
        ({"metrics": ("f1",)}, "needs the model's captions"),
    ],
)
def test_plans_that_make_no_sense(captioner, change, says):
    with pytest.raises(PolicyError, match=says):
        plan(captioner, **change)


def test_weights_have_a_fingerprint(captioners):
    one, other = (fingerprint(captioner) for captioner in captioners.values())
    assert one == fingerprint(captioners["show-attend-tell"]) != other


def test_command_line(captioner, photographs, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "captioner"
    folder.mkdir()
    captioner.save(folder)
    options = ["evaluate", str(photographs), "--captioner", str(folder), "--methods", "default,centre", "--limit", "2"]
    options += ["--metrics", "pointing,mass"]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as end:
        main([*options, "--out", str(out)])
    assert not end.value.code
    printed = capsys.readouterr().out
    assert "default" in printed
    assert "pointing ↑" in printed
    rows = list(csv.DictReader((out / "results.csv").open()))
    mass = next(
        r for r in rows if (r["method"], r["maps"], r["metric"], r["kind"]) == ("default", "raw", "mass", "all")
    )
    assert int(mass["count"]) == 4
    assert float(mass["low"]) <= float(mass["value"]) <= float(mass["high"])
    assert f"{float(mass['value']):.3f}" in printed
    result = json.loads((out / "results.json").read_text())
    assert result["configuration"]["methods"] == ["default", "centre"]
    assert result["configuration"]["weights"] == fingerprint(captioner)
    assert result["results"] == [
        {
            k: (json.loads(v) if k in ("value", "low", "high", "count", "undefined") and v else v or None)
            for k, v in r.items()
        }
        for r in rows
    ]
    assert set(result["seconds"]) == {"default", "centre"}
    for name in ("mass.png", "mass-seconds.png"):
        pixels = np.asarray(Image.open(out / "plots" / name).convert("RGB"))
        assert (pixels == (0, 114, 178)).all(2).sum() > 20  # the raw maps' colour
    scores = (out / "scores.jsonl").read_bytes()
    with pytest.raises(SystemExit):
        main([*options, "--out", str(out)])
    assert (out / "scores.jsonl").read_bytes() == scores  # nothing is done twice
    monkeypatch.chdir(photographs.parent)
    with pytest.raises(SystemExit) as end:
        main(["evaluate", photographs.name, *options[2:], "--out", str(out)])
    assert not end.value.code  # by whatever path, they are the same data
    assert (out / "scores.jsonl").read_bytes() == scores


def test_command_line_says_what_is_wrong(tmp_path, capsys):
    for data, method, says in (("nowhere", "default", "no such file or folder"), ("scenes", "magic", "no method")):
        with pytest.raises(SystemExit) as end:
            main(["evaluate", data, "--methods", method, "--limit", "1", "--out", str(tmp_path / "out")])
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("captionfix: ")
        assert says in error
        assert error.count("\n") == 1


def test_help_needs_no_torch():
    code = "import sys; from captionfix.cli import main\ntry: main(['evaluate', '--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("False")
    assert "--metrics" in done.stdout
