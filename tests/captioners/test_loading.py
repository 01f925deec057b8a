"""Folders: the round trip, and every way in which a folder can be bad."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from captionfix.captioners.loading import FILES, bundled, load
from captionfix.errors import CaptionerError

TOKENS = torch.tensor([[1, 4, 5, 6, 7]] * 4)


@pytest.fixture
def folder(captioner, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    captioner.save(place)
    return place


@torch.no_grad()
def test_round_trip(captioner, folder, pixels):
    again = load(folder)
    assert sorted(p.name for p in folder.iterdir()) == sorted(FILES)
    assert torch.equal(again.logits(pixels, TOKENS), captioner.logits(pixels, TOKENS))
    assert again.vocabulary == captioner.vocabulary
    assert again.max_words == captioner.max_words
    assert again.name == "model"
    assert not again.model.training
    assert again.generate(pixels) == captioner.generate(pixels)
    picture = Image.radial_gradient("L").convert("RGB").resize((50, 31))
    assert torch.equal(again.prepare(picture).pixels, captioner.prepare(picture).pixels)
    assert again.tokenize("A red dog's t-shirt", unknown="map") == captioner.tokenize(
        "A red dog's t-shirt", unknown="map"
    )


def test_a_captioner_that_was_read_is_written_as_it_was(folder, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    load(folder).save(again)
    for name in FILES:
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name


@torch.no_grad()
def test_half_precision_is_stored_but_not_computed(captioner, tmp_path, pixels):
    captioner.save(tmp_path, half=True)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values() if t.is_floating_point()} == {torch.float16}
    again = load(tmp_path)
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    torch.testing.assert_close(again.logits(pixels, TOKENS), captioner.logits(pixels, TOKENS), rtol=0.02, atol=0.02)


def test_from_pretrained_is_enough(captioner, folder, pixels):
    again = type(captioner.model).from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=pixels, input_ids=TOKENS).logits, captioner.logits(pixels, TOKENS))


def test_explain_defaults_come_along(captioner, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "explain": {"method": "removal"}}))
    assert load(folder).defaults == {"method": "removal"}


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    with pytest.raises(CaptionerError, match=file):
        load(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff not a file", b"[1, 2]"])
def test_a_damaged_file_is_a_clear_error(folder, file, content):
    (folder / file).write_bytes(content)
    with pytest.raises(CaptionerError):
        load(folder)


def test_truncated_weights(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(CaptionerError, match="can't be read"):
        load(folder)


def test_another_kind_of_model(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(CaptionerError, match="'bert'"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["decoder.embedding.weight"][2, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptionerError, match=r"decoder\.embedding\.weight"):
        load(folder)


def test_weights_that_do_not_fit(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.embedding.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptionerError, match=r"decoder\.embedding\.weight"):
        load(folder)


def test_weights_of_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["decoder.embedding.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CaptionerError):
        load(folder)


def test_a_tokeniser_of_another_training(captioner, folder, tmp_path):
    from captionfix.captioners.words import SPECIAL, word_tokenizer

    word_tokenizer([*SPECIAL, "cat"]).save_pretrained(folder)
    with pytest.raises(CaptionerError, match="5 words"):
        load(folder)


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CaptionerError, match="safetensors"):
        load(folder)


def test_no_such_captioner(tmp_path):
    with pytest.raises(CaptionerError, match="neither a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(CaptionerError, match="neither a folder"):
        load("no-such-name")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CaptionerError, match="is a file"):
        load(tmp_path / "file")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CaptionerError, match="hub does not give it"):
        load("nobody/nothing-of-this-name")


def test_wheel_layout(captioner, folder, tmp_path, monkeypatch):
    """Installed, the models lie inside the package."""
    from captionfix.captioners import loading

    package = tmp_path / "site" / "captionfix"
    (package / "captioners").mkdir(parents=True)
    shutil.copytree(folder, package / "models" / "inside")
    monkeypatch.setattr(loading, "__file__", str(package / "captioners" / "loading.py"))
    assert bundled() == {"inside": package / "models" / "inside"}
    assert load("inside").name == "inside"
