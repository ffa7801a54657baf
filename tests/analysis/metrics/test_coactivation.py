from __future__ import annotations

import pytest
from conformance_metric import Case, MetricConformance

from bitatlas.analysis import sequences
from bitatlas.analysis.metrics.coactivation import Coactivation


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    monkeypatch.setattr(sequences, "STEP_TOKENS", 60)


class TestConformance(MetricConformance):
    """The values are compared with a loop in test_expert_scores.py."""

    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Coactivation, lambda seed: context("mixtral", "int4-g32", seed))
