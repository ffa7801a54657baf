"""Adding a metric takes one file and its entry in the table: done here to a copy of the package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from conformance_metric import Case, MetricConformance

from bitatlas.analysis import metrics
from bitatlas.analysis.metrics import METRICS

NEW_FILE = '''
"""Largest weight: a metric nobody needs."""

from bitatlas.analysis.metrics.base import Cost, Metric, StepResult, chunks_by_layer
from bitatlas.analysis.schema import NO_FORMAT, DamageRow


class LargestWeight(Metric):
    """max |w| of a unit."""

    NAME = "largest_weight"
    TITLE = "Largest weight"
    UNIT = "weight"
    SOURCE = "this test"
    NEEDS = "weights"
    ADDITIVE = False
    PER_FORMAT = False
    EMITS = ("largest_weight",)

    def plan(self, ctx):
        """One step per layer."""
        return list(chunks_by_layer(ctx.index.units))

    def step(self, ctx, key):
        """Reads each unit once."""
        units = chunks_by_layer(ctx.index.units)[key]
        return StepResult([
            DamageRow(self.NAME, u.key, NO_FORMAT, float(ctx.weight(u).abs().max()), count=u.params) for u in units
        ])

    def cost(self, ctx):
        """One read."""
        return Cost(len(self.plan(ctx)), bytes_read=4 * ctx.index.params)
'''


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The copied package's table with the new entry."""
    package = tmp_path_factory.mktemp("copy") / "metrics_with_one_more"
    package.mkdir()
    (package / "largest_weight.py").write_text(NEW_FILE)
    source = Path(metrics.__file__).read_text()
    entry = "from metrics_with_one_more.largest_weight import LargestWeight\n"
    source = source.replace("from bitatlas.kernels.errors", entry + "from bitatlas.kernels.errors", 1)
    head, _, tail = source.partition("= (\n")
    (package / "__init__.py").write_text(f"{head}= (\n    LargestWeight,\n{tail}")
    spec = importlib.util.spec_from_file_location(
        "metrics_with_one_more", package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["metrics_with_one_more"] = module
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.startswith("metrics_with_one_more")]:
        del sys.modules[name]


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, table, context):
        return Case(type(table.get_metric("largest_weight")), lambda seed: context("mixtral", seed=seed))


def test_the_others_are_still_there_and_in_order(table):
    assert list(table.METRICS) == ["largest_weight", *METRICS]


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_runs_the_conformance_suite(name):
    # A family of metrics may share a test file.
    case = f"Case({METRICS[name].__name__},"
    sources = [p.read_text() for p in Path(__file__).parent.glob("test_*.py")]
    assert any("(MetricConformance)" in source and case in source for source in sources)
    assert (Path(metrics.__file__).parent / f"{name}.py").exists()


def test_values_belong_to_one_metric():
    values = [value for kind in METRICS.values() for value in kind.EMITS]
    assert len(set(values)) == len(values)
