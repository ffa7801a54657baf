"""Power iteration against the exact Hessian of a tiny model, diagonalised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.measure import MeasureContext, run_metric
from bitatlas.analysis.metrics.hawq_eigenvalue import HawqEigenvalue
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import expand_formats


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        settings = {"eigen_iterations": 5, "eigen_tokens": 40}
        return Case(HawqEigenvalue, lambda seed: context("qwen3_moe", seed=seed, settings=settings))


def make(folder, **settings):
    tokens = np.random.default_rng(0).integers(0, 7, (2, 6))
    options = {"eigen_tol": 1e-4, "eigen_iterations": 400, "eigen_tokens": 12, **settings}
    return MeasureContext(
        index_model(folder), expand_formats("int2-g32"), settings=options,
        calibration=CalibrationSet.of(tokens),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_checkpoint):
    return tiny_checkpoint(
        "llama", vocab_size=7, hidden_size=8, head_dim=4, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=6, num_hidden_layers=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def exact(folder):
    """Eigenvalues of the last layer's block and of each of its units' blocks, one Hessian row per weight."""
    ctx = make(folder)
    loaded = ctx.loaded
    units = [u for u in ctx.index.units if u.layer == 1]
    ids = torch.from_numpy(ctx.calibration.tokens)
    with sdpa_kernel(SDPBackend.MATH), loaded.requires_grad([u.key for u in units]) as params:
        logits = loaded.logits(ids)[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        flat = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, create_graph=True)])
        rows = [torch.autograd.grad(x, params, retain_graph=True) for x in flat]
    hessian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    hessian = 0.5 * (hessian + hessian.T)
    out, start = {"layer": torch.linalg.eigvalsh(hessian).numpy()}, 0
    position = {id(p): i for i, p in enumerate(params)}
    starts = np.cumsum([0, *[p.numel() for p in params]])
    for u in units:
        start = int(starts[position[id(loaded.handle(u.key).param)]])
        block = hessian[start : start + u.params, start : start + u.params]
        out[u.key] = torch.linalg.eigvalsh(block).numpy()
    return out


@pytest.mark.parametrize("group", ["layer", "unit"])
def test_largest_eigenvalue_equals_the_exact_hessians(folder, exact, tmp_path, group):
    ctx = make(folder, eigen_group=group)
    rows = {(r.metric, r.unit): r for r in run_metric(HawqEigenvalue(), ctx, tmp_path)}
    negative = 0
    for unit in ctx.index.units:
        if unit.layer != 1:
            continue
        spectrum = exact[unit.key if group == "unit" else "layer"]
        negative += -spectrum[0] > spectrum[-1]
        found = rows["hessian_eigenvalue", unit.key]
        assert found.value == pytest.approx(spectrum[-1], rel=0.02, abs=0.02 * abs(spectrum).max())
        error = float((ctx.candidate(unit, ctx.formats[0]) - ctx.weight(unit)).double().square().sum())
        expect = 0.5 * max(found.value, 0) * error
        assert rows["hawq_eigenvalue", unit.key].value == pytest.approx(expect, rel=1e-5)
    if group == "unit":
        # The model is untrained: some blocks must take the way over the shift, or it stays untested.
        assert negative >= 1


def test_mean_and_spread_over_batches(folder, tmp_path):
    one = {"eigen_tokens": 6, "hessian_batches": 2, "eigen_iterations": 12}
    plain = run_metric(HawqEigenvalue(), make(folder, **one), tmp_path / "plain")
    wide = run_metric(HawqEigenvalue(), make(folder, hessian_spread=1.0, **one), tmp_path / "wide")
    eigen = {r.unit: r for r in plain if r.metric == "hessian_eigenvalue"}
    for a, b in zip(plain, wide):
        if a.metric == "hawq_eigenvalue" and a.value > 0:
            e = eigen[a.unit]
            assert e.stderr > 0
            assert b.value / a.value == pytest.approx(1 + e.stderr * 2**0.5 / e.value, rel=1e-6)


def test_an_unknown_block_is_refused(folder):
    with pytest.raises(UserError, match="block"):
        HawqEigenvalue().plan(make(folder, eigen_group=3))
