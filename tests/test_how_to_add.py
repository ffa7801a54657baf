"""Tries what CONTRIBUTING says: a new metric, solver, format, exporter and page are one new file and one table line each."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

METRIC = '''
from __future__ import annotations
from typing import ClassVar
from bitatlas.analysis.metrics.base import Cost, Metric, StepResult
from bitatlas.analysis.schema import DamageRow


class Largest(Metric):
    """The largest weight of a unit."""
    NAME: ClassVar = "largest"
    TITLE, UNIT, SOURCE = "Largest weight", "weight", "a test"
    NEEDS, ADDITIVE, PER_FORMAT, EMITS = "weights", False, False, ("largest",)

    def plan(self, ctx):
        return ["all"]

    def step(self, ctx, key):
        return StepResult([DamageRow("largest", u.key, "-", float(ctx.weight(u).abs().max())) for u in ctx.index.units])

    def cost(self, ctx):
        return Cost(1)
'''
SOLVER = '''
from __future__ import annotations
import numpy as np
from typing import ClassVar
from bitatlas.solvers.base import Found, Solver


class Cheapest(Solver):
    """The smallest allowed format everywhere."""
    NAME: ClassVar = "cheapest"
    TITLE, SOURCE = "Smallest", "a test"

    def _solve(self, problem, seed, deadline):
        size = np.where(problem.allowed, problem.bytes, np.iinfo(np.int64).max)
        return Found(size.argmin(axis=1))
'''
TARGET = '''
from __future__ import annotations
from bitatlas.app.targets.base import Target


class Sheet(Target):
    """A spreadsheet."""
    NAME, TITLE, SERVES = "sheet", "A spreadsheet", "people"

    def loads(self, fmt):
        return True

    def render(self, allocation, index):
        return {"formats.csv": "\\n".join(f"{u},{f}" for u, f in allocation.formats.items())}

    def command(self, allocation, index):
        return "open formats.csv"
'''
SCREEN = """
from __future__ import annotations
import streamlit as st


def page() -> None:
    st.markdown("a new page")
"""


def add_line(path: Path, before: str, line: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, f"{before!r} in {path.name}"
    path.write_text(text.replace(before, before + line))


def lazily(module: str, name: str) -> str:
    """The class as one expression, so that the table line is the only line added."""
    return f'__import__("bitatlas.{module}", fromlist=["{name}"]).{name}'


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the five folders with one of each added."""
    top = tmp_path_factory.mktemp("tree")
    for folder in ("app", "analysis", "solvers", "kernels", "cache"):
        shutil.copytree(
            ROOT / folder, top / "bitatlas" / folder, ignore=shutil.ignore_patterns("__pycache__", "demo")
        )
    b = top / "bitatlas"
    (b / "analysis/metrics/largest.py").write_text(METRIC)
    add_line(
        b / "analysis/metrics/__init__.py",
        "_TABLE: tuple[type[Metric], ...] = (\n",
        f"    {lazily('analysis.metrics.largest', 'Largest')},\n",
    )
    (b / "solvers/cheapest.py").write_text(SOLVER)
    add_line(
        b / "solvers/__init__.py",
        "SOLVERS: dict[str, type[Solver]] = {\n",
        f'    "cheapest": {lazily("solvers.cheapest", "Cheapest")},\n',
    )
    (b / "app/targets/sheet.py").write_text(TARGET)
    add_line(
        b / "app/targets/__init__.py",
        "    for t in (Bitatlas(), ",
        f"{lazily('app.targets.sheet', 'Sheet')}(), ",
    )
    (b / "app/screens/extra.py").write_text(SCREEN)
    add_line(
        b / "app/screens/__init__.py",
        "SCREENS: tuple[Screen, ...] = (\n",
        '    Screen("extra", "Measure", "Extra", ":material/add:", "extra"),\n',
    )
    add_line(
        b / "kernels/formats.py",
        "for g in GROUP_SIZES for b in INT_BITS),\n",
        "        _int_format(4, 96, False),\n",
    )
    return top


@pytest.fixture
def run(tree: Path, tmp_path: Path) -> Callable[..., Any]:
    env = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "BITATLAS_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }

    def call(code: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return call


def test_a_metric(run: Callable[..., Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path):
    rows = run(f"""
import json
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.model_index import index_model
from bitatlas.app import tasks
assert any(m["name"] == "largest" for m in tasks.metrics())
with MeasureContext(index_model({str(tiny_checkpoint("llama"))!r})) as ctx:
    print(json.dumps([r.value for r in run_metric(get_metric("largest"), ctx, {str(tmp_path / "parts")!r})]))
""")
    assert rows
    assert all(v > 0 for v in rows)


def test_a_solver(run: Callable[..., Any]):
    choice = run("""
import json, numpy as np
from bitatlas.app import tasks
from bitatlas.solvers import Problem, get_solver
assert any(s["name"] == "cheapest" for s in tasks.solvers())
problem = Problem.of(np.array([[2.0, 1.0], [3.0, 1.0]]), np.array([[4, 8], [8, 4]]), 8)
print(json.dumps(get_solver("cheapest").solve(problem).choice.tolist()))
""")
    assert choice == [0, 1]


def test_a_page(run: Callable[..., Any], tree: Path):
    shown = run(f"""
import json
from streamlit.testing.v1 import AppTest
at = AppTest.from_string(open({str(tree / "bitatlas/app/screens/extra.py")!r}).read() + "\\npage()").run()
from bitatlas.app.screens import SCREENS
assert SCREENS[0].name == "extra"
print(json.dumps([m.value for m in at.markdown]))
""")
    assert shown == ["a new page"]


def test_an_exporter(run: Callable[..., Any]):
    names = run("""
import json
from bitatlas.app import tasks
print(json.dumps([t["name"] for t in tasks.targets()]))
""")
    assert "sheet" in names


def test_a_format(run: Callable[..., Any]):
    error, size = run("""
import json, torch
from bitatlas.app import tasks
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.packed.matrix import pack_quantized
from bitatlas.kernels.reference import quantize, quantize_dequantize
assert any(f["name"] == "int4-g96" for f in tasks.formats())
w, fmt = torch.randn(7, 200, generator=torch.Generator().manual_seed(0)), parse_format("int4-g96")
stored = sum(t.numel() * t.element_size() for t in pack_quantized(quantize(w, fmt)).values())
print(json.dumps([float((quantize_dequantize(w, fmt) - w).pow(2).mean()), stored - fmt.payload_bytes(7, 200)]))
""")
    assert 0 < error < 0.02
    assert size == 0
