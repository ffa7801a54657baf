from __future__ import annotations

import numpy as np
import pytest
import torch
from conformance_metric import Case, MetricConformance

from bitatlas.analysis.measure import run_metric
from bitatlas.analysis.metrics.cka import Cka, canonical_mean, linear_cka
from bitatlas.analysis.prefix import decoder_blocks


class TestConformance(MetricConformance):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls, context):
        return Case(Cka, lambda seed: context("llama", seed=seed))


def naive(x, y):
    """(CKA, mean CCA) of (T, d) representations from centred data: Frobenius norms, orthonormal bases, singular values."""
    x, y = x - x.mean(0), y - y.mean(0)
    cka = np.square(y.T @ x).sum() / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)
    q, r = basis(x), basis(y)
    return cka, np.linalg.svd(q.T @ r, compute_uv=False).mean()


def basis(x):
    """Orthonormal columns that span x: a text of 15 different characters has an embedding of rank 14, where QR invents the rest."""
    u, values, _ = np.linalg.svd(x, full_matrices=False)
    return u[:, values > 1e-5 * values[0]]


def test_equals_bases_and_singular_values_of_the_streams(context, tmp_path):
    with context("mixtral", tokens=400) as ctx:
        rows = {(r.metric, r.unit): r for r in run_metric(Cka(), ctx, tmp_path)}
        streams = []
        blocks = decoder_blocks(ctx.loaded.model, 2)
        blocks[0].register_forward_pre_hook(lambda _, a: streams.append(a[0]))
        for block in blocks:
            block.register_forward_hook(
                lambda _, a, out: streams.append(out[0] if isinstance(out, tuple) else out)
            )
        with torch.no_grad():
            ctx.loaded.logits(torch.from_numpy(ctx.calibration.tokens))
        streams = [s.double().numpy().reshape(-1, s.shape[-1]) for s in streams]
        assert [len(s) for s in streams] == [400] * 3
        for u in ctx.index.units:
            if u.layer < 0:
                assert ("cka", u.key) not in rows
                continue
            cka, cca = naive(streams[u.layer], streams[u.layer + 1])
            assert rows["cka", u.key].value == pytest.approx(cka, rel=1e-6)
            assert rows["cca", u.key].value == pytest.approx(cca, rel=1e-6)
            _, last = naive(streams[u.layer + 1], streams[-1])
            assert rows["cca_output", u.key].value == pytest.approx(last, rel=1e-6)
            assert rows["cka", u.key].stderr > 0
            assert rows["cka", u.key].count == 400


def test_a_linear_map_is_no_change_to_cca_and_a_rotation_none_to_cka():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6)) * [5, 4, 3, 2, 1, 0.5]
    for y, cka_is_one in ((x @ np.linalg.qr(rng.standard_normal((6, 6)))[0], True), (x @ rng.standard_normal((6, 6)), False)):  # fmt: skip
        a, b = x - x.mean(0), y - y.mean(0)
        assert canonical_mean(a.T @ b, a.T @ a, b.T @ b) == pytest.approx(1)
        assert (linear_cka(a.T @ b, a.T @ a, b.T @ b) == pytest.approx(1)) == cka_is_one
    flat = np.zeros((6, 6))
    assert np.isnan(canonical_mean(flat, flat, flat))
    assert np.isnan(linear_cka(flat, flat, flat))


def test_wide_streams_are_looked_at_along_a_tenth_of_the_tokens(context, tmp_path):
    with context("llama", tokens=100) as ctx:
        rows = [r for r in run_metric(Cka(), ctx, tmp_path) if r.metric == "cca"]
        with np.load(next(tmp_path.iterdir())) as part:
            assert part["own"].shape[1:] == (10, 10)
        assert all(0 < r.value <= 1 for r in rows)
