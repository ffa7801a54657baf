from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics import weight_error
from bitatlas.analysis.metrics.weight_error import WeightError, squared_error
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import dequantize, quantize


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(WeightError, lambda seed: context("mixtral", "int2-g32,int4-channel-sym,bf16", seed))


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_equals_a_double_precision_loop(context, tmp_path, family):
    with context(family, "int3-g32,int4-g64-sym") as ctx:
        rows = run_metric(WeightError(), ctx, tmp_path)
        for unit in ctx.index.units:
            w = ctx.reader.get(unit)
            for fmt in ctx.formats:
                d = dequantize(quantize(w, fmt)).double().numpy() - w.double().numpy()
                got = {r.metric: r.value for r in rows if (r.unit, r.format) == (unit.key, fmt.name)}
                assert got["weight_error"] == pytest.approx(float((d * d).sum()), rel=1e-5)
                assert got["weight_error_rel"] == pytest.approx(
                    float((d * d).sum() / np.square(w.double().numpy()).sum()), rel=1e-5
                )


def test_blocks_do_not_change_the_sum(monkeypatch):
    torch.manual_seed(0)
    w = torch.randn(37, 50)
    whole = squared_error(w, parse_format("int3-g32"))
    monkeypatch.setattr(weight_error, "_BLOCK", 120)
    assert squared_error(w, parse_format("int3-g32")) == pytest.approx(whole, rel=1e-12)


def test_zero_weight_has_no_error_and_bf16_of_bf16_is_exact():
    fmt = parse_format("int2-g32")
    assert squared_error(torch.zeros(3, 70), fmt) == 0
    w = torch.randn(5, 9).bfloat16().float()
    assert squared_error(w, parse_format("bf16")) == 0


def test_more_bits_and_smaller_groups_hurt_less(context, tmp_path):
    with context("llama", "int2-channel,int2-g32,int4-g32,int8-g32") as ctx:
        rows = run_metric(WeightError(), ctx, tmp_path)
    worst = {f: sum(r.value for r in rows if r.format == f and r.metric == "weight_error")
             for f in ("int2-channel", "int4-g32", "int8-g32")}  # fmt: skip
    assert worst["int2-channel"] > 5 * worst["int4-g32"] > 25 * worst["int8-g32"]
