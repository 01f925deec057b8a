"""The public face: names resolve, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import subprocess
import sys

import pytest

import captionfix

HEAVY = ["torch", "torchvision", "transformers", "matplotlib", "nltk", "scipy", "numpy"]


def loaded_by(code: str) -> set[str]:
    program = f"import sys\n{code}\nprint(' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split()) if result.stdout.strip() else set()


def test_importing_loads_nothing_heavy() -> None:
    assert loaded_by("import captionfix; dir(captionfix); captionfix.CaptionfixError") == set()


def test_help_loads_nothing_heavy() -> None:
    code = "import captionfix.cli as c\ntry: c.main(['--help'])\nexcept SystemExit as end: assert not end.code"
    assert loaded_by(code) == set()


def test_reading_results_needs_no_torch() -> None:
    assert loaded_by("import captionfix; captionfix.read, captionfix.Explanation") == {"numpy"}


@pytest.mark.parametrize("name", captionfix.__all__)
def test_public_names_resolve(name: str) -> None:
    assert getattr(captionfix, name) is not None
    assert name in dir(captionfix)


def test_the_verb_stays_a_function_though_a_module_has_its_name() -> None:
    from captionfix.explain import explain

    assert captionfix.explain is explain


def test_other_names_are_an_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'explian'"):
        captionfix.explian  # noqa: B018
