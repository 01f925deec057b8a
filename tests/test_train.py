"""Training: data in, the same weights after an interruption, the command line."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, ResNetConfig
from typer.testing import CliRunner

from captionfix.captioners.loading import load
from captionfix.errors import CaptionerError, DataError, OutputError
from captionfix.scoring import score_captions, score_scenes
from captionfix.train import train_coco, train_photos, train_scenes
from captionfix.train_average import average
from captionfix.train_cli import app
from captionfix.train_data import (
    Captioned,
    View,
    cut,
    encode_boxes,
    encode_captions,
    read_coco,
    read_lines,
    read_square,
    regions,
)

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
TINY = {"size": 32, "hidden": 16, "epochs": 2, "tune_epochs": 2, "batch": 2, "at_least": 1, "save_every": 2}


@pytest.fixture
def cnn(tmp_path):
    torch.manual_seed(0)
    # at least 16 channels: with 8 in channels-last order torch 2.14.1 corrupts memory in the backward pass
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    AutoModel.from_config(config).save_pretrained(tmp_path / "cnn")
    return tmp_path / "cnn"


@pytest.fixture
def data(tmp_path):
    """Six plain pictures in the lines format, and the same as COCO."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    lines, images, annotations = [], [], []
    for i in range(6):
        name = list(COLOURS)[i % 2]
        noise = np.random.default_rng(i).integers(-20, 20, (40, 50, 3))
        picture = Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))
        picture.save(folder / "images" / f"{i}.jpg")
        captions = [f"A {name} wall.", f"The wall is {name}, all {name}."][: 1 + i % 2]
        words = [{"words": caption.replace(".", " .").split()} for caption in captions]
        lines.append(json.dumps({"photo": f"{i}.jpg", "width": 50, "height": 40, "captions": words}))
        images.append({"id": 10 + i, "file_name": f"{i}.jpg"})
        annotations += [{"image_id": 10 + i, "caption": caption} for caption in captions]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "dev.jsonl").write_text("\n".join(lines[:2]))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def weights(folder):
    return load(folder).model.state_dict()


class Interrupted(Exception):
    """Stands for the process's end."""


@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_training_ends_at_the_same_weights(data, cnn, tmp_path, monkeypatch, stage):
    from captionfix.train_fit import Run

    whole = train_photos(data, tmp_path / "whole", cnn=cnn, half=False, **TINY)
    export, calls = Run.export, []

    def interrupted(run):
        export(run)
        calls.append(1)
        if len(calls) == {1: 2, 2: 6}[stage]:  # at 2, 4, 6 steps of a stage, and at its end
            raise Interrupted

    monkeypatch.setattr(Run, "export", interrupted)
    with pytest.raises(Interrupted):
        train_photos(data, tmp_path / "again", cnn=cnn, half=False, **TINY)
    assert load(tmp_path / "again.work" / "latest").max_words == 20  # usable while training runs
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(Run, "export", export)
    again = train_photos(data, tmp_path / "again", cnn=cnn, half=False, **TINY)
    a, b = weights(whole), weights(again)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_every_weight_of_the_cnn_is_trained_on(data, cnn, tmp_path):
    out = train_coco(
        data / "captions.json", data / "images", tmp_path / "out", cnn=cnn, cnn_rate=1e-2, half=False, **TINY
    )
    before = AutoModel.from_pretrained(cnn).state_dict()
    after = load(out).model.encoder.cnn.state_dict()
    trained = [key for key in before if key.endswith(("weight", "bias"))]
    assert len(trained) > 10
    assert all(not torch.equal(before[key], after[key].to(before[key])) for key in trained)
    assert all(torch.equal(before[key], after[key]) for key in before if "running" in key)  # frozen norms


def test_training_learns(data, cnn, tmp_path):
    """Two colours are told apart after two hundred steps, by both families."""
    for family in ("show-attend-tell", "show-tell"):
        out = train_photos(
            data,
            tmp_path / family,
            cnn=cnn,
            family=family,
            **{**TINY, "epochs": 60, "tune_epochs": 1, "rate": 1e-2, "dropout": 0.0, "save_every": 1000},
        )
        captioner = load(out)
        examples = read_lines(data / "train.jsonl", data / "images")
        for entry in examples:
            pixels = captioner.prepare(Image.open(entry.image)).pixels[None]
            said = captioner.text(captioner.generate(pixels, beams=1)[0])
            assert next(name for name in COLOURS if name in entry.captions[0]) in said.split()
        assert score_captions(captioner, examples).bleu[0] > 0.9


def test_scenes(tmp_path):
    out = train_scenes(tmp_path / "scenes", scenes=16, batch=8, hidden=16, max_steps=2, save_every=2)
    captioner = load(out)
    score = score_scenes(captioner, 6)
    assert 0 <= score.words <= 1
    assert set(score.kinds) == {"size", "surface", "colour", "shape", "relation", "other"}
    assert score_scenes(captioner, 6) == score
    second = train_scenes(
        tmp_path / "tell", family="show-tell", start=out, scenes=16, batch=8, hidden=16, max_steps=1, save_every=1
    )
    assert captioner.vocabulary == load(second).vocabulary


def test_scores_are_right_for_a_captioner_that_knows(tmp_path):
    """A captioner that says the truth scores 1, one that says one fixed caption what counting by hand gives."""
    from captionfix.scenes import scene

    captioner = load(train_scenes(tmp_path / "s", scenes=64, batch=8, hidden=16, max_steps=1, save_every=9))
    captions = [scene(i, split="test").caption for i in range(4)]

    class Fixed:
        def __init__(self, truths):
            self.truths = [captioner.tokenize(caption) for caption in truths]

        def __getattr__(self, name):
            return getattr(captioner, name)

        def decode(self, features, tokens):
            logits = torch.zeros(*tokens.shape, len(captioner.vocabulary))
            for i, ids in enumerate(self.truths):
                for t, word in enumerate(ids[: tokens.shape[1]]):
                    logits[i, t, word] = 1
            return logits

        def generate(self, pixels, beams=3):
            return self.truths

    perfect = score_scenes(Fixed(captions), 4)
    assert (perfect.words, perfect.captions) == (1, 1)
    same = score_scenes(Fixed([captions[0]] * 4), 4)
    pairs = [(a, b) for c in captions for a, b in zip(c.split(), captions[0].split(), strict=False)]
    total = sum(len(c.split()) for c in captions)
    assert same.words == pytest.approx(sum(a == b for a, b in pairs) / total)
    assert same.captions == 0.25


def test_long_captions_are_cut_and_empty_ones_left_out():
    from captionfix.captioners.words import SPECIAL, word_tokenizer

    tokenizer = word_tokenizer([*SPECIAL, "a", "b"])
    assert encode_captions(tokenizer, [["a b a b", " . "], ["x"]], 3) == [[[1, 4, 5, 4, 2]], [[1, 3, 2]]]


def test_words_keep_their_boxes(data):
    from captionfix.captioners.words import SPECIAL, word_tokenizer

    dog, snow = [[0.1, 0.2, 0.5, 0.6], [0.5, 0.5, 0.9, 0.8]], [[0, 0.5, 1, 1]]
    caption = {
        "words": ["A", "black/white", "dog", ",", "in", "snow", "."],
        "phrases": [{"span": [0, 3], "boxes": dog}, {"span": [4, 5]}, {"span": [5, 6], "boxes": snow}],
    }
    (data / "one.jsonl").write_text(json.dumps({"photo": "0.jpg", "captions": [caption, {"words": ["."]}]}))
    (entry,) = read_lines(data / "one.jsonl", data / "images")
    tokenizer = word_tokenizer([*SPECIAL, "a", "black", "dog", "in", "snow"])
    for longest in (20, 4):
        ((ids,),), ((boxes,),) = (
            encode_captions(tokenizer, [entry.captions], longest),
            encode_boxes(tokenizer, [entry], longest),
        )
        words = tokenizer.convert_ids_to_tokens(ids)
        of = [("<start>", []), ("a", []), ("black", dog), ("<unk>", dog), ("dog", dog), ("in", []), ("snow", snow)]
        assert [(word, [list(b) for b in own]) for word, own in zip(words, boxes, strict=True)] == [
            *of[: longest + 1],
            ("<end>", []),
        ]
    plain = Captioned(entry.image, ("a dog",))
    assert encode_boxes(tokenizer, [plain], 20) == [[[(), (), (), ()]]]


def test_regions_are_what_is_seen_of_the_boxes():
    """Against boxes drawn as pixels, which are cut out, mirrored and averaged over each cell."""
    rng = np.random.default_rng(0)
    for mirrored in (False, True):
        for _ in range(20):
            (x0, x1), (y0, y1) = (np.sort(rng.choice(101, 2, replace=False)) for _ in range(2))
            left, right = [(0, 100), (20, 80), (40, 100)][rng.integers(3)]
            picture = np.zeros((100, 100))
            picture[y0:y1, x0:x1] = 1
            seen = np.kron(picture[:, left:right], np.ones((1, 20)))[:, :: -1 if mirrored else 1]
            expected = seen.reshape(5, 20, 4, -1).mean((1, 3))
            view = View((left / 100, 0, right / 100, 1), mirrored)
            (found,) = regions([((x0 / 100, y0 / 100, x1 / 100, y1 / 100),)], view, (5, 4))
            np.testing.assert_allclose(found, expected / (expected.max() or 1), atol=1e-5)
    two = regions([((0, 0, 0.5, 1), (0.25, 0, 1, 0.5)), ()], View(), (2, 4))
    np.testing.assert_allclose(two, [[[1, 1, 1, 1], [1, 1, 0, 0]], np.zeros((2, 4))])


@pytest.mark.parametrize(("family", "weight"), [("show-attend-tell", 1.0), ("show-tell", 3.0)])
def test_what_words_look_at_is_learned_from_boxes(cnn, tmp_path, family, weight):
    """Half of each picture is a red or blue wall. Boxes say the other half: only they can have led there."""
    folder = tmp_path / "halves"
    options = {**TINY, "size": 64, "epochs": 60, "tune_epochs": 0, "rate": 1e-2, "save_every": 500, "family": family}
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(8):
        name = list(COLOURS)[i % 2]
        picture = np.full((64, 64, 3), 128, np.uint8)
        left = 32 * (i // 2 % 2)
        picture[:, left : left + 32] = COLOURS[name]
        Image.fromarray(picture).save(folder / "images" / f"{i}.png")
        box = [0.5 - left / 64, 0, 1 - left / 64, 1]
        caption = {"words": ["a", name, "wall"], "phrases": [{"span": [0, 3], "boxes": [box]}]}
        lines.append(json.dumps({"photo": f"{i}.png", "captions": [caption]}))
    (folder / "train.jsonl").write_text("\n".join(lines))
    inside = []
    for held in (0.0, weight):
        captioner = load(train_photos(folder, tmp_path / f"{held}", cnn=cnn, region_loss=held, **options))
        shares = []
        for i in range(8):
            features = captioner.encode(captioner.prepare(Image.open(folder / "images" / f"{i}.png")).pixels[None])
            ids = captioner.tokenize(f"a {list(COLOURS)[i % 2]} wall")
            tokens = torch.tensor([[captioner.vocabulary.start, *ids]])
            looked = _looked_at(captioner, features.detach(), tokens)[1:]  # an article is not held to boxes
            half = looked.shape[2] // 2
            shares.append((looked[:, :, :half] if i // 2 % 2 else looked[:, :, half:]).sum((1, 2)))
        inside.append(float(torch.stack(shares).mean().detach()))
    assert inside[0] < 0.5
    assert inside[1] > 0.9


def _looked_at(captioner, features, tokens):
    """(words, h, w), each word's summing to 1: attention, or what a cell raises the word by when it comes in addition
    to the mean of all."""
    attention = captioner.attention(features, tokens[:, :-1])
    if attention is not None:
        return attention[0]
    h, w = features.shape[2:]
    cells = features.flatten(2)[0].T  # (N, F)
    mean = cells.mean(0).expand_as(cells)

    def said(maps):
        table = captioner.decode(maps[:, :, None, None], tokens[:, :-1].expand(len(maps), -1)).log_softmax(2)
        return table.gather(2, tokens[:, 1:, None].expand(len(maps), -1, -1))[..., 0]

    raised = (said(mean + (cells - mean) / len(cells)) - said(mean)).clamp(min=0).T
    return (raised / raised.sum(1, True).clamp(min=1e-12)).unflatten(1, (h, w))


def test_words_can_be_held_to_boxes_only_where_there_are_some(data, cnn, tmp_path):
    with pytest.raises(DataError, match="no caption has phrases with boxes"):
        train_photos(data, tmp_path / "out", cnn=cnn, region_loss=1.0, **TINY)
    assert not (tmp_path / "out").exists()


def test_readers_agree(data):
    lines = read_lines(data / "train.jsonl", data / "images")
    coco = read_coco(data / "captions.json", data / "images")
    assert [entry.image for entry in lines] == [entry.image for entry in coco]
    assert [len(entry.captions) for entry in lines] == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1"),
        ('{"photo": "0.jpg", "captions": [{"words": ["a"], "phrases": [{"span": [0, 2], "boxes": []}]}]}', "line 1"),
        ('{"photo": "0.jpg", "captions": [{"words": ["a"], "phrases": [{"span": [0, 1], "boxes": [[0]]}]}]}', "line 1"),
        ('{"photo": "0.jpg"}', "captions"),
        ("", "no captioned image"),
        ("[]", "line 1"),
    ],
)
def test_bad_lines(data, content, message):
    (data / "bad.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        read_lines(data / "bad.jsonl", data / "images")


@pytest.mark.parametrize("content", ["{", "[]", '{"images": []}', '{"images": [], "annotations": []}'])
def test_bad_coco(data, content):
    (data / "bad.json").write_text(content)
    with pytest.raises(DataError):
        read_coco(data / "bad.json", data / "images")


def test_missing_data(data, cnn, tmp_path):
    with pytest.raises(DataError, match=r"train\.jsonl"):
        train_photos(tmp_path, tmp_path / "out", cnn=cnn)
    (data / "images" / "3.jpg").unlink()
    with pytest.raises(DataError, match=r"3\.jpg"):
        train_photos(data, tmp_path / "out", cnn=cnn)


def test_bad_cnn_and_output(data, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        train_photos(data, tmp_path / "full", cnn=tmp_path)
    with pytest.raises(CaptionerError, match="CNN"):
        train_photos(data, tmp_path / "out", cnn=tmp_path / "none")


def test_command_line(data, cnn, tmp_path):
    out = tmp_path / "out"
    run = CliRunner().invoke(
        app,
        [*f"photos {data} --out {out} --cnn {cnn} --max-steps 1 --at-least 1 --hidden 16 --batch 2".split()],
    )
    assert run.exit_code == 0, run.output
    assert f"wrote {out}" in run.output.replace("\n", "")
    run = CliRunner().invoke(app, ["score", str(out), "--photos", str(data)])
    assert "2 images, beam 3: BLEU-1" in run.output
    assert isinstance(CliRunner().invoke(app, ["score", str(out)]).exception, DataError)


@pytest.mark.slow
def test_two_processes_train_one_captioner(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("from captionfix.train_cli import app\napp()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--scenes", "32", "--batch", "4", "--hidden", "16", "--max-steps", "2", "--save-every", "2"]
    subprocess.run(
        [*torchrun, str(script), "scenes", "--out", str(tmp_path / "out"), *options], check=True, timeout=300
    )
    state = json.loads((tmp_path / "out.work" / "fit" / "trainer_log.json").read_text())
    assert state["global_step"] == 2
    assert state["epoch"] == pytest.approx(0.5)  # 2 steps x 2 processes x 4 scenes of 32
    words = len(load(tmp_path / "out").vocabulary)
    assert words > 10
    assert state["log_history"][-1]["train_loss"] < 1.2 * math.log(words)  # of one process, not of both together


def test_a_captioner_goes_on_learning_on_larger_images(data, cnn, tmp_path):
    first = train_photos(data, tmp_path / "first", cnn=cnn, half=False, **TINY)
    options = {**TINY, "size": 64, "epochs": 2, "tune_epochs": 0, "hidden": 99, "at_least": 99}  # said by the start
    second = train_photos(data, tmp_path / "second", start=first, half=False, **options)
    before, after = load(first), load(second)
    assert after.vocabulary == before.vocabulary
    assert [tuple(c.prepare(Image.new("RGB", (50, 40))).pixels.shape) for c in (before, after)] == [
        (3, 32, 32),
        (3, 64, 64),
    ]
    for name, weight in before.model.state_dict().items():
        same = torch.equal(weight, after.model.state_dict()[name])
        assert same == (name.startswith("encoder.") or not weight.is_floating_point()), name


def test_what_is_dropped_can_change_on_the_way(data, cnn, tmp_path):
    options = {**TINY, "epochs": 1, "tune_epochs": 0, "half": False}
    first = train_photos(data, tmp_path / "first", cnn=cnn, **options)
    models = []
    for number, dropout in enumerate((None, 0.5, 0.0)):
        model = load(train_photos(data, tmp_path / str(number), start=first, dropout=dropout, **options)).model
        assert model.config.dropout == (0.0 if dropout == 0 else 0.5)
        models.append(model.state_dict())
    kept, same, none = models
    assert all(torch.equal(weight, same[name]) for name, weight in kept.items())
    assert any(not torch.equal(weight, none[name]) for name, weight in kept.items())


def test_a_captioner_that_learned_where_cells_lie_keeps_its_size(data, tmp_path):
    with pytest.raises(CaptionerError, match="learned where cells lie"):
        train_photos(data, tmp_path / "out", start="scenes", size=64)


def test_a_cut_is_what_the_image_holds_there(tmp_path):
    """Of a picture whose red and green are the column and the row, a cut holds the columns and rows of its box."""
    columns, rows = np.meshgrid(np.arange(200), np.arange(100))
    file = tmp_path / "ramp.png"
    Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)).save(file)
    for seed in range(20):
        left, top, right, bottom = box = cut(0.5, random.Random(seed))
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        assert right - left >= 0.5
        assert bottom - top >= 0.5
        assert right - left != bottom - top  # sides are drawn apart
        red, green, _ = read_square(file, 40, box)
        for values, low, high in ((red[20], left * 200, right * 200), (green[:, 20], top * 100, bottom * 100)):
            step = (high - low) / 40
            expected = low + step * (np.arange(40) + 0.5) - 0.5
            np.testing.assert_allclose(values[2:-2], expected[2:-2], atol=1)
    assert cut(1, random.Random(0)) is None
    assert np.array_equal(read_square(file, 40, (0, 0, 1, 1)), read_square(file, 40))


def test_what_is_no_part_of_a_whole_is_refused(data, cnn, tmp_path):
    for option in ({"crop": 0.0}, {"crop": -1.0}, {"crop": 1.5}, {"dropout": -0.1}, {"dropout": 2.0}):
        with pytest.raises(DataError, match=next(iter(option))):
            train_photos(data, tmp_path / "out", cnn=cnn, **option, **TINY)
    assert not (tmp_path / "out.work").exists()


def test_a_stage_of_no_epochs_is_left_out(data, cnn, tmp_path):
    first = train_photos(data, tmp_path / "first", cnn=cnn, half=False, **TINY)
    options = {**TINY, "epochs": 0, "tune_epochs": 1, "crop": 0.6}
    second = train_photos(data, tmp_path / "second", start=first, half=False, **options)
    assert {entry.name for entry in (tmp_path / "second.work").iterdir()} == {"latest", "tune"}
    before, after = load(first).model.state_dict(), load(second).model.state_dict()
    assert not torch.equal(before["decoder.embedding.weight"], after["decoder.embedding.weight"])


def test_photographs_read_by_other_processes_are_the_same(data, cnn, tmp_path):
    first = train_photos(data, tmp_path / "first", cnn=cnn, half=False, **TINY)
    options = {**TINY, "epochs": 0, "start": first, "crop": 0.6, "half": False}
    alone = train_photos(data, tmp_path / "alone", **options)
    helped = train_photos(data, tmp_path / "helped", workers=2, **options)
    one, other = weights(alone), weights(helped)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_average_lies_in_the_middle(data, cnn, tmp_path):
    first = train_photos(data, tmp_path / "first", cnn=cnn, half=False, **TINY)
    options = {**TINY, "epochs": 0, "start": first, "half": False}
    folders = [train_photos(data, tmp_path / f"{seed}", seed=seed, **options) for seed in (1, 2, 3)]
    mean = load(average(folders, tmp_path / "mean", half=False))
    tables = [load(folder).model.state_dict() for folder in folders]
    for name, value in mean.model.state_dict().items():
        expected = np.mean([table[name].numpy() for table in tables], axis=0)
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert mean.vocabulary == load(first).vocabulary


def test_captioners_that_are_not_alike_have_no_average(data, cnn, tmp_path):
    first = train_photos(data, tmp_path / "first", cnn=cnn, half=False, **TINY)
    other = train_photos(data, tmp_path / "other", cnn=cnn, half=False, **{**TINY, "hidden": 8})
    with pytest.raises(CaptionerError, match="another shape"):
        average([first, other], tmp_path / "mean")
    with pytest.raises(CaptionerError, match="two captioners"):
        average([first], tmp_path / "mean")
    with pytest.raises(OutputError, match="not empty"):
        average([first, first], other)
    assert not (tmp_path / "mean").exists()
