"""The README names every command, and its chooser tables are what the tables in the code say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from bitatlas.app.choosers import choosers
from bitatlas.app.cli import app
from bitatlas.app.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme():
    names = [c.name or c.callback.__name__ for c in app.registered_commands] + ["jobs"]
    missing = [n for n in names if not re.search(rf"\b{n}\b", README)]
    assert missing == []


def test_the_commands_of_the_readme_are_taken():
    """Every option that a block of the README uses exists, and every value of a fixed list is in it."""
    known = typer.main.get_command(app).commands
    lines = [line for block in re.findall(r"```\n(.*?)```", README, re.S) for line in block.splitlines()]
    calls = [words for line in lines for words in _calls(line)]
    assert len(calls) > 15
    for name, *words in calls:
        options = {o: p for p in known[name].params for o in p.opts}
        for i, word in enumerate(words):
            if word.startswith("-"):
                assert word in options, f"{name} has no {word}"
                if "--target" in options[word].opts:
                    assert words[i + 1] in TARGETS


def _calls(line: str) -> list[list[str]]:
    parts = line.partition(" #")[0].split("&&")
    return [shlex.split(p)[1:] for p in parts if p.strip().startswith("bitatlas ")]


def test_choosers_are_current():
    written = re.search(r"<!-- generated: choosers -->\n(.*?)<!-- /generated -->", README, re.S)
    assert written, "the README lost its chooser tables"
    assert written[1] == choosers(), "run `python -m bitatlas.app.choosers`"


def test_every_decision_is_short():
    for paragraph in (ROOT / "docs" / "decisions.md").read_text().split("\n\n")[1:]:
        assert len(paragraph.split()) < 160
