"""The README names every command, and its chooser tables are what the tables in the code say."""

from __future__ import annotations

import re
from pathlib import Path

from bitatlas.app.choosers import choosers
from bitatlas.app.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_every_command_is_in_the_readme():
    names = [c.name or c.callback.__name__ for c in app.registered_commands] + ["jobs"]
    missing = [n for n in names if not re.search(rf"\b{n}\b", README)]
    assert missing == []


def test_choosers_are_current():
    written = re.search(r"<!-- generated: choosers -->\n(.*?)<!-- /generated -->", README, re.S)
    assert written, "the README lost its chooser tables"
    assert written[1] == choosers(), "run `python -m bitatlas.app.choosers`"


def test_every_decision_is_short():
    for paragraph in (ROOT / "docs" / "decisions.md").read_text().split("\n\n")[1:]:
        assert len(paragraph.split()) < 160
