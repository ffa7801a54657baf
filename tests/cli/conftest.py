"""Fixtures of the command-line tests: a data folder of its own, tiny checkpoints, a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from bitatlas.app.cli import app

WORDS = "the of and to in a is that it was for on are as with his they at be this from have or by one had not but what all were"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder; whatever worker was started for it is stopped at the end."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITATLAS_HOME", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder
    for worker in workers_of(folder):  # their engines end with them
        worker.terminate()
        worker.wait(10)


def workers_of(folder: Path) -> list[psutil.Process]:
    """The workers that run for a data folder."""
    lines = ((p, p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]))
    return [p for p, line in lines if "bitatlas.app.worker" in line and str(folder) in line]


@pytest.fixture
def workers(home: Path) -> Callable[[], list[psutil.Process]]:
    """``workers()`` -> those that run now for the data folder."""
    return lambda: workers_of(home)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Enough words for a few thousand tokens, different in every line."""
    words = WORDS.split()
    lines = [" ".join(words[(i * 7 + j * j * 3 + i * j) % len(words)] for j in range(40)) for i in range(400)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def cli(home: Path) -> Callable[..., Any]:
    """``cli("scan", path)`` -> the JSON document; ``cli(..., code=2)`` -> the error document."""

    def run(*words: object, code: int = 0) -> Any:
        result = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert result.exit_code == code, f"{words}: {result.output} {result.stderr} {result.exception!r}"
        document = json.loads(result.stdout)  # exactly one document
        if code:
            assert set(document) == {"error", "found", "fix"}
            assert document["error"]
        return document

    return run
