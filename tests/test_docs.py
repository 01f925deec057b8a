"""The documents are true: code runs, commands and options exist and are all there, links lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer

import captionfix
from captionfix.cli import app
from captionfix.evaluate.measure import METRICS
from captionfix.evaluate.methods import NAMES
from captionfix.unravel import RULES
from captionfix.unravel.registry import find

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
BLOCK = re.compile(r"(<!-- run -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = typer.main.get_command(app)


def blocks(page: Path, *languages: str) -> list[tuple[bool, str]]:
    """Whether it is to be run, and the text, of each block of code."""
    return [
        (bool(run), text) for run, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind in languages
    ]


def name(page: Path) -> str:
    return page.name


@pytest.fixture(scope="module")
def load():
    return cache(captionfix.load)


@pytest.mark.parametrize("page", [p for p in PAGES if any(run for run, _ in blocks(p, "python"))], ids=name)
def test_code_runs(page, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(captionfix, "load", load)  # the real one, but each captioner once
    before = dict(RULES)
    from captionfix.legs import METHODS

    methods = dict(METHODS)
    names: dict[str, object] = {}
    try:
        for run, text in blocks(page, "python"):
            if run:
                exec(compile(text, page.name, "exec"), names)
    finally:
        for table, old in ((RULES, before), (METHODS, methods)):
            table.clear()
            table.update(old)  # type: ignore[arg-type]
        find.cache_clear()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_code_that_needs_more_than_is_here_names_what_exists(page):
    """Calls of captionfix's functions fit their signatures, also in blocks that are not run."""
    for _, text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if (
                not isinstance(node, ast.Attribute)
                or not isinstance(node.value, ast.Name)
                or node.value.id != "captionfix"
            ):
                continue
            assert hasattr(captionfix, node.attr), f"captionfix.{node.attr}"
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Attribute(value=ast.Name(id="captionfix"), attr=attr) if not attr[0].isupper():
                    given = {k.arg: None for k in call.keywords if k.arg}
                    inspect.signature(getattr(captionfix, attr)).bind(*call.args, **given)


def found(words: list[str]) -> tuple[typer.core.TyperCommand, list[str]]:
    """The command that words name, and its arguments."""
    command = COMMAND
    while isinstance(command, typer.core.TyperGroup) and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words  # type: ignore[return-value]


def lines() -> list[tuple[str, str]]:
    shown = []
    for page in PAGES:
        for _, text in blocks(page, "sh", "bash"):
            for line in text.splitlines():
                at = re.search(r"(?:^|--no-python |&& |bin/)(captionfix .*)", line)
                if at:
                    shown.append((page.name, at[1]))
    return shown


@pytest.mark.parametrize(("page", "line"), lines())
def test_a_command_line_is_understood(page, line):
    """Parsed by the command itself: the command, its arguments and its options exist, and their values are of the right
    kind.
    """
    words = shlex.split(line, comments=True)[1:]
    command, rest = found(words)
    if rest == ["--help"]:
        return
    assert not isinstance(command, typer.core.TyperGroup), f"{page}: no such command: {line}"
    command.make_context(command.name, rest)


SECTIONS = {
    "demo": "## demo", "explain": "## explain", "classify": "## classify", "ground": "## ground", "browse": "## browse",
    "evaluate": "## evaluate", "train scenes": "### train scenes", "train photos": "### train photos, train coco",
    "train coco": "### train photos, train coco", "train average": "### train average",
    "train score": "### train score",
}  # fmt: skip


def leaves(command: object, path: str = "") -> dict[str, typer.core.TyperCommand]:
    if isinstance(command, typer.core.TyperGroup):
        return {k: v for key, each in command.commands.items() for k, v in leaves(each, f"{path} {key}").items()}
    return {path.strip(): command}  # type: ignore[dict-item]


def test_every_command_has_a_section():
    assert set(leaves(COMMAND)) == set(SECTIONS)


@pytest.mark.parametrize("command", SECTIONS)
def test_every_option_is_described_and_no_other(command):
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    _, _, after = text.partition(f"\n{SECTIONS[command]}\n")
    section = re.split(r"^##", after, maxsplit=1, flags=re.MULTILINE)[0]
    rows = {
        row
        for line in section.splitlines()
        if line.startswith("| `--")
        for row in re.findall(r"--[\w-]+", line.split("|")[1])
        if f"`{command.split()[-1]}` alone" in line or "` alone)" not in line  # where a section has two commands
    }
    if command == "demo":  # two options, in a sentence
        rows = set(re.findall(r"`(--[\w-]+)`", section))
    parameters = [p for p in leaves(COMMAND)[command].params if p.param_type_name == "option" and p.name != "help"]
    assert rows == {max(p.opts, key=len) for p in parameters}


def test_every_metric_and_method_is_described():
    text = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
    _, _, text = text.partition("\n## Metrics\n")
    metrics, _, methods = text.partition("\n## Methods\n")
    assert set(re.findall(r"^\| `([\w-]+)` \|", metrics, re.MULTILINE)) == set(METRICS)
    assert set(NAMES) <= set(re.findall(r"`([\w-]+)`", methods))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_to_files_and_headings(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target}"
        assert file.is_relative_to(ROOT), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", head).strip().lower()) for head in heads}
            assert anchor in slugs, f"{page.name}: {target}"


def test_pictures_are_small():
    files = [*(ROOT / "docs").glob("*.jpg"), *(ROOT / "docs").glob("*.png")]
    assert files
    assert all(file.stat().st_size < 200_000 for file in files)
