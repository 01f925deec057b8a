"""``captionfix classify`` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

import captionfix
from captionfix.classify_cli import load_classifier, read_state
from captionfix.cli import main
from captionfix.errors import CaptionerError


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["classify", *map(str, arguments)])
    printed = capsys.readouterr()
    code = end.value.code
    return (code if isinstance(code, int) else 0 if code is None else 1), printed.out, printed.err


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier of three classes, as a training loop would have saved it."""
    torch.manual_seed(2)
    state = torchvision.models.squeezenet1_1(num_classes=3).state_dict()
    folder = tmp_path_factory.mktemp("weights")
    torch.save(state, folder / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, folder / "wrapped.pth")
    save_file(state, folder / "plain.safetensors")
    (folder / "labels.txt").write_text("cat\ndog\nboat\n", encoding="utf-8")
    (folder / "labels.json").write_text(json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog"]}), encoding="utf-8")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(path)
    return path


def test_classify_writes_a_folder_for_each_picture(weights, picture, tmp_path, capsys):
    missing = tmp_path / "missing.png"
    code, out, err = run(
        capsys, picture, missing, "--cnn", "squeezenet1_1", "--weights", weights / "plain.pt", "--classes", "dog; 0",
        "--labels", weights / "labels.txt", "--policy", "sums=4,neurons=50", "--html", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    assert "missing.png: there is no such file" in err
    assert "dog, cat" in out
    assert {p.name for p in (tmp_path / "out" / "photo").iterdir()} >= {
        "figure.png", "page.html", "explanation.json", "arrays.npz"
    }  # fmt: skip
    result = captionfix.read(tmp_path / "out" / "photo")
    assert [(word.text, word.token) for word in result] == [("dog", 1), ("cat", 0)]
    assert result.captioner == "squeezenet1_1"
    assert result.policy["sums"] == 4
    assert result.grid == (224, 224)
    module, preprocess, _ = load_classifier("squeezenet1_1", str(weights / "plain.pt"))
    with torch.inference_mode():
        pixels = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.transforms()(Image.open(picture))
        torch.testing.assert_close(preprocess(Image.open(picture)), pixels)
        assert result[0].probability == pytest.approx(float(module(pixels[None]).softmax(1)[0, 1]), rel=1e-5)


def test_weights_come_in_several_forms(weights):
    plain = read_state(weights / "plain.pt")
    for form in ("wrapped.pth", "plain.safetensors"):
        found = read_state(weights / form)
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], value) for name, value in plain.items())


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_of_weights_is_executed(tmp_path, capsys):
    torch.save({"state_dict": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CaptionerError, match="can't be read as weights"):
        read_state(tmp_path / "evil.pt")
    assert "executed" not in capsys.readouterr().out


def test_mistakes_end_in_one_line(weights, picture, tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    torch.save([1, 2], tmp_path / "list.pt")
    plain = ("--weights", weights / "plain.pt")
    for arguments, text in (
        (("--cnn", "resnet19", *plain), "perhaps resnet"),
        (("--cnn", "squeezenet1_0", *plain), "not weights of squeezenet1_0"),
        (("--cnn", "squeezenet1_1", "--weights", "missing.pt"), "no such file of weights"),
        (("--cnn", "squeezenet1_1", "--weights", tmp_path / "broken.pt"), "can't be read as weights"),
        (("--cnn", "squeezenet1_1", "--weights", tmp_path / "list.pt"), "holds no state dict"),
        (
            ("--cnn", "squeezenet1_1", *plain, "--classes", "dog", "--labels", weights / "labels.png"),
            "names of classes",
        ),
        (("--cnn", "squeezenet1_1", *plain, "--classes", "boat", "--labels", weights / "labels.json"), "no class is"),
        (("--cnn", "squeezenet1_1", *plain, "--crops", "7"), "crops=7"),
        (("--cnn", "squeezenet1_1", *plain, "--device", "warp"), "can't compute on 'warp'"),
    ):
        code, _, err = run(capsys, picture, "--out", tmp_path / "none", *arguments)
        assert code == 2
        assert text in err
        assert len(err.strip().splitlines()) == 1
        assert not (tmp_path / "none").exists()
    # without a network torchvision's own weights can't be had
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    code, _, err = run(capsys, picture, "--cnn", "squeezenet1_1", "--out", tmp_path / "none")
    assert code == 2
    assert "squeezenet1_1" in err
    assert "download.pytorch.org" in err
