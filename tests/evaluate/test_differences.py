"""The benchmark that compares methods picture by picture, on scores made by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from captionfix.evaluate.measure import Record

FILE = Path(__file__).parents[2] / "benchmarks" / "differences.py"


def test_differences_are_those_of_the_same_phrases(tmp_path, monkeypatch, capsys):
    """Picture 2 has one method's scores alone and one phrase is undefined for one: both are left out."""
    spec = importlib.util.spec_from_file_location("differences", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    values = {
        "default": {0: [0.9, 0.5], 1: [0.4], 2: [1.0]},
        "gradcam": {1: [0.6], 0: [0.1, float("nan")]},  # written in another order
    }
    records = [
        Record(image, "a.png", method, 1.0, 1.0, [("raw", "people", "mass", value) for value in scores])
        for method, pictures in values.items()
        for image, scores in pictures.items()
    ]
    (tmp_path / "scores.jsonl").write_text("".join(record.line() + "\n" for record in records))
    monkeypatch.setattr(sys, "argv", ["differences.py", str(tmp_path), "--metrics", "mass"])
    module.main()
    said = capsys.readouterr().out.split()
    assert said[:3] == ["raw", "mass", "gradcam"]
    assert float(said[3]) == pytest.approx(((0.9 - 0.1) + (0.4 - 0.6)) / 2)
    assert [float(edge.strip("[],")) for edge in said[4:6]] == pytest.approx([-0.2, 0.8])
    assert said[6] == "n=2"
    assert len(said) == 7
    monkeypatch.setattr(sys, "argv", ["differences.py", str(tmp_path), "--metrics", "deletion"])
    with pytest.raises(SystemExit):
        module.main()
    assert "it has mass" in capsys.readouterr().err
