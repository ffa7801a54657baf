"""Probes against brute force: the exact Fisher of a model with a tiny vocabulary, by enumerating every label."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.divergence import token_kl
from bitatlas.analysis.fisher.deltas import DeltaStore, make_stack
from bitatlas.analysis.fisher.probes import SCORES, ProbePass, score_gradient
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize

FORMATS = ("int2-g32", "int4-g32-sym")
VOCAB = 11


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    """A Llama of vocabulary 11 with a tied head."""
    return LoadedModel.open(index_model(tiny_checkpoint("llama_tied", vocab_size=VOCAB)))


def store_for(loaded, limit=1 << 30, dtype=torch.float16):
    def candidate(key, f):
        return quantize_dequantize(loaded.handle(key).get(), parse_format(FORMATS[f]))

    return DeltaStore(
        lambda key: loaded.handle(key).get(), candidate, len(FORMATS), limit_bytes=limit, dtype=dtype
    )


def ids(n=7):
    return torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(3))


def brute_force(loaded, tokens):
    """Exact sum_t E_y <grad log p(y_t), d_u> <grad log p(y_t), d_v>: (F, U, U), one backward per (t, y)."""
    keys = loaded.index.unit_keys()
    deltas = [
        [
            quantize_dequantize(loaded.handle(k).get(), parse_format(f)) - loaded.handle(k).get()
            for f in FORMATS
        ]
        for k in keys
    ]
    out = np.zeros((len(FORMATS), len(keys), len(keys)))
    with loaded.requires_grad(keys) as params, torch.enable_grad():
        logp = torch.log_softmax(loaded.logits(tokens[None])[0].double(), -1)
        for t in range(len(tokens)):
            for y in range(VOCAB):
                grads = torch.autograd.grad(logp[t, y], params, retain_graph=True)
                of = {id(p): g for p, g in zip(params, grads)}
                dots = np.array(
                    [
                        [
                            float((loaded.handle(k).view(of[id(loaded.handle(k).param)]) * d).sum())
                            for d in row
                        ]
                        for k, row in zip(keys, deltas)
                    ]
                )  # (U, F)
                out += float(logp[t, y].detach().exp()) * np.einsum("uf,vf->fuv", dots, dots)
    return out


@pytest.mark.parametrize("score", SCORES)
def test_projection_equals_the_exact_fisher(loaded, score):
    tokens, draws = ids(), 600
    exact = brute_force(loaded, tokens)
    probes = ProbePass(loaded, loaded.index.unit_keys(), store_for(loaded), score)
    a = probes.run(tokens, range(draws)).a.astype(np.float64)  # (P, U, F)
    for f in range(len(FORMATS)):
        products = np.einsum("pu,pv->puv", a[:, :, f], a[:, :, f])
        error = products.std(0, ddof=1) / np.sqrt(draws)
        # 225 correlated entries at 5 standard errors: a chance below 1e-3 for a right estimator.
        assert np.all(np.abs(products.mean(0) - exact[f]) <= 5 * error + 1e-12)
        whole = a[:, :, f].sum(1) ** 2
        assert abs(whole.mean() - exact[f].sum()) <= 5 * whole.std(ddof=1) / np.sqrt(draws)
        # The statistical bound is tight enough to notice a missing factor of 2.
        assert whole.std(ddof=1) / np.sqrt(draws) < 0.1 * exact[f].sum()


def test_exact_fisher_predicts_the_kl_of_small_changes(loaded):
    """Ties the scale to nats per token: 1/2 d^T F d against the measured KL for a change 100 times smaller than int2's."""
    tokens = ids()
    exact = brute_force(loaded, tokens)[0].sum() / 2 / len(tokens)
    step = 0.01
    changed = {}
    for key in loaded.index.unit_keys():
        w = loaded.handle(key).get().clone()
        changed[key] = w + step * (quantize_dequantize(w, parse_format(FORMATS[0])) - w)
    before = loaded.logits(tokens[None])
    with loaded.swapped(changed):
        after = loaded.logits(tokens[None])
    assert float(token_kl(before, after).mean()) == pytest.approx(exact * step**2, rel=0.03)


@pytest.mark.parametrize("score", SCORES)
def test_score_gradient_has_the_fisher_covariance(score):
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, -3.0], [1.0, 1.0, -2.0, 0.5, 0.1]])
    generator = torch.Generator().manual_seed(0)
    n = 8000
    draws = torch.stack([score_gradient(logits, score, generator, chunk=1) for _ in range(n)]).double()
    for t in range(2):
        p = torch.softmax(logits[t].double(), -1)
        cov = torch.diag(p) - torch.outer(p, p)
        v = draws[:, t]
        assert torch.all(v.mean(0).abs() <= 5 * v.std(0) / n**0.5 + 1e-9)
        products = v[:, :, None] * v[:, None, :]
        assert torch.all((products.mean(0) - cov).abs() <= 5 * products.std(0) / n**0.5 + 1e-7)


def test_one_gradient_for_a_tied_unit_and_the_norms(loaded):
    tokens = ids()
    keys = loaded.index.unit_keys()
    chunk = ProbePass(loaded, keys, store_for(loaded, dtype=torch.float32), "signs").run(tokens, [5])
    with loaded.requires_grad(keys) as params, torch.enable_grad():
        logits = loaded.logits(tokens[None])[0]
        v = score_gradient(logits, "signs", torch.Generator().manual_seed(5))
        grads = dict(zip(map(id, params), torch.autograd.grad(logits, params, v)))
    for i, key in enumerate(keys):
        handle = loaded.handle(key)
        g = handle.view(grads[id(handle.param)])
        w = handle.get()
        dots = [float((g * (quantize_dequantize(w, parse_format(f)) - w)).sum()) for f in FORMATS]
        np.testing.assert_allclose(chunk.a[0, i], dots, rtol=1e-4, atol=1e-6)
        assert chunk.gsq[0, i] == pytest.approx(float(g.square().sum()), rel=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in loaded.model.parameters())


def test_a_small_memory_limit_changes_nothing(loaded):
    keys = loaded.index.unit_keys()
    whole = ProbePass(loaded, keys, store_for(loaded), "labels").run(ids(), [1, 2])
    tight_store = store_for(loaded, limit=3000)
    tight = ProbePass(loaded, keys, tight_store, "labels").run(ids(), [1, 2])
    assert 0 < tight_store.kept_bytes <= 3000
    np.testing.assert_array_equal(whole.a, tight.a)


def test_experts_get_their_slice_and_their_token_count(tiny_checkpoint):
    moe = LoadedModel.open(index_model(tiny_checkpoint("qwen3_moe")))
    keys = moe.index.unit_keys()
    tokens = torch.arange(9) * 20
    chunk = ProbePass(moe, keys, store_for(moe, dtype=torch.float32), "signs").run(tokens, [0])
    routed: dict[str, int] = {}
    with moe.capture(lambda key, x, token, weight: routed.update({key: len(token)})):
        moe.logits(tokens[None])
    experts = [i for i, u in enumerate(moe.index.units) if u.expert >= 0]
    assert experts
    for i in experts:
        assert chunk.reached[i] == routed.get(keys[i], 0)
        assert (chunk.gsq[0, i] > 0) == (chunk.reached[i] > 0)
    per_layer = sum(int(chunk.reached[i]) for i in experts if keys[i].endswith("gate_proj"))
    layers = len({moe.index.units[i].layer for i in experts})
    assert per_layer == layers * len(tokens) * moe.index.top_k


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_dot_survives_any_scale(dtype, scale):
    g = torch.Generator().manual_seed(1)
    w = torch.randn(37, 53, generator=g)
    candidates = [w, w + 1e-4 * torch.randn(37, 53, generator=g), w + torch.randn(37, 53, generator=g)]
    grad = torch.randn(37, 53, generator=g) * scale
    stack = make_stack(w, candidates, dtype, "cpu")
    dots, gsq = stack.dot(grad)
    assert gsq == pytest.approx(float(grad.double().square().sum()), rel=1e-5)
    for f, c in enumerate(candidates):
        exact = float((grad.double() * (c - w).double()).sum())
        bound = float(grad.double().norm() * (c - w).double().norm())
        assert abs(float(dots[f]) - exact) <= 2e-3 * bound + 0.0
    assert float(dots[0]) == 0.0
    assert stack.dot(torch.zeros(37, 53))[1] == 0.0
