"""On a GPU as on the CPU: skipped where there is none."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import captionfix
from captionfix.cli import app
from captionfix.scenes import scene
from captionfix.train import train_scenes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def exact():
    """Convolutions in 32 bits on both: TF32 is the default on a GPU."""
    was = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = was


@pytest.fixture(scope="module")
def pictures():
    return [scene(seed).image for seed in (1, 2, 3)]


def alike(one, other):
    """The rank of nearly tied contributions may differ between devices, and with it single fixations."""
    assert one.caption == other.caption
    for a, b in zip(one.words, other.words, strict=True):
        np.testing.assert_allclose(a.feature_map, b.feature_map, atol=1e-3)
        assert a.probability == pytest.approx(b.probability, abs=1e-4)
        assert a.image_effect == pytest.approx(b.image_effect, abs=1e-3)
        if not np.isnan(a.image_share):
            assert a.image_share == pytest.approx(b.image_share, abs=1e-3)
        maps = [word.heatmap(specific=False).ravel() for word in (a, b)]
        if maps[0].std() > 0 and maps[1].std() > 0:
            assert np.corrcoef(*maps)[0, 1] > 0.98, a.text


@pytest.mark.parametrize(
    "method", ["default", "joined", "removal", "flow", "attention", "fast", "thorough", "paper", "marginal"]
)
def test_explanations_are_the_same_as_on_the_cpu(pictures, method):
    here = captionfix.explain(captionfix.load("scenes"), pictures, method=method)
    there = captionfix.explain(captionfix.load("scenes", device="cuda"), pictures, method=method)
    for one, other in zip(here, there, strict=True):
        alike(one, other)


@pytest.mark.parametrize("name", ["photos", "photos-show-and-tell"])
def test_photographs_are_explained_the_same_as_on_the_cpu(name):
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    one, other = (
        captionfix.explain(captionfix.load(name, device=device), picture, beams=1) for device in ("cpu", "cuda")
    )
    alike(one, other)


@pytest.mark.parametrize(
    "method",
    ["attention-weights", "gradcam", "guided-backprop", "occlusion", "rise:masks=20", "region-feeding", "centre"],
)
def test_methods_of_other_tools_run_there(pictures, method):
    pytest.importorskip("captum")
    one, other = (
        captionfix.explain(captionfix.load("scenes", device=d), pictures[0], method=method) for d in ("cpu", "cuda")
    )
    for a, b in zip(one.words, other.words, strict=True):
        np.testing.assert_allclose(a.feature_map, b.feature_map, atol=2e-3)


def test_evaluation_runs_there(tmp_path):
    command = ["evaluate", "scenes", "--limit", "2", "--methods", "default,random", "--out", str(tmp_path / "out")]
    metrics = ["--metrics", "pointing,mass"]
    run = CliRunner().invoke(app, [*command, *metrics, "--device", "cuda"])
    assert run.exit_code == 0, run.output
    assert json.loads((tmp_path / "out" / "results.json").read_text())


def test_training_runs_there_and_its_captioner_is_read_on_the_cpu(tmp_path):
    pytest.importorskip("accelerate")
    out = train_scenes(tmp_path / "out", scenes=64, batch=16, epochs=1, hidden=16, precision="bf16")
    captioner = captionfix.load(out)
    assert captioner.device.type == "cpu"
    explained = captionfix.explain(captioner, scene(0).image, scene(0).caption, unknown="map")
    assert all(np.isfinite(word.fixations).all() for word in explained.words)
