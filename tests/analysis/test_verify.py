"""Verification against a naive double-precision recomputation, and its bookkeeping."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitatlas.analysis.divergence import token_kl, token_nll
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.verify import Verifier, verify_allocation, verify_many
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.reference import quantize_dequantize


@pytest.fixture(scope="module", params=["llama_tied", "qwen3_moe"])
def loaded(request, tiny_checkpoint):
    return LoadedModel.open(index_model(tiny_checkpoint(request.param)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(2).integers(0, 250, (7, 11))


def mixed(index):
    names = ["int2-g32", "int4-g32", "int8-g32-sym", "bf16"]
    return {key: names[i % 4] for i, key in enumerate(index.unit_keys())}


def naive(loaded, formats, tokens):
    ids = torch.from_numpy(tokens)
    p = torch.log_softmax(loaded.logits(ids).double(), -1)
    weights = {k: quantize_dequantize(loaded.handle(k).get(), parse_format(f)) for k, f in formats.items()}
    with loaded.swapped(weights):
        q = torch.log_softmax(loaded.logits(ids).double(), -1)
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    nll = [-x[:, :-1].gather(-1, ids[:, 1:, None]).mean().item() for x in (p, q)]
    return kl, float((p.argmax(-1) != q.argmax(-1)).double().mean()), np.exp(nll)


def test_result_equals_a_naive_recomputation(loaded, tokens):
    formats = mixed(loaded.index)
    kl, flips, ppl = naive(loaded, formats, tokens)
    got = verify_allocation(loaded, loaded.index, formats, tokens, batch_tokens=25, step_tokens=33)
    assert got.kl_mean == pytest.approx(kl.mean(), rel=1e-4)
    assert got.kl_p50 == pytest.approx(np.median(kl), rel=1e-3)
    assert got.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-3)
    assert got.kl_stderr == pytest.approx(kl.mean(1).std(ddof=1) / 7**0.5, rel=1e-3)
    assert got.kl_sequences == pytest.approx(tuple(kl.mean(1)), rel=1e-3)
    assert got.top1_flips == flips
    assert (got.ppl_before, got.ppl_after) == pytest.approx(tuple(ppl), rel=1e-5)
    assert (got.tokens, got.sequences) == (77, 7)
    assert 0 <= got.noise_floor < 1e-9
    json.dumps(got.to_dict(), allow_nan=False)


def test_many_at_once_equal_one_by_one_and_weights_come_back(loaded, tokens):
    before = {k: loaded.handle(k).get().clone() for k in loaded.index.unit_keys()}
    allocations = {
        "mixed": mixed(loaded.index),
        **{f: dict.fromkeys(loaded.index.unit_keys(), f) for f in ("int3-g32", "bf16")},
    }
    together = verify_many(loaded, loaded.index, allocations, tokens, weights_gib=0.0)
    for label, formats in allocations.items():
        assert together[label] == verify_allocation(loaded, loaded.index, formats, tokens)
    assert together["int3-g32"].kl_mean > together["bf16"].kl_mean > 0
    assert all(torch.equal(loaded.handle(k).get(), w) for k, w in before.items())


def test_steps_may_run_in_any_order(loaded, tokens):
    verifier = Verifier(
        loaded, loaded.index, tokens, {"a": mixed(loaded.index)}, batch_tokens=11, step_tokens=22
    )
    assert verifier.steps() == ["sequences 0-1", "sequences 2-3", "sequences 4-5", "sequences 6-6"]
    parts = {s: verifier.run(s) for s in reversed(verifier.steps())}
    again = verifier.results(dict(sorted(parts.items())))
    whole = verify_allocation(loaded, loaded.index, mixed(loaded.index), tokens, batch_tokens=11)
    # Which sequences the noise is taken from follows the steps; everything else is the same.
    assert replace(again["a"], noise_floor=0.0) == replace(whole, noise_floor=0.0)


def test_bad_input_is_named(loaded, tokens):
    formats = mixed(loaded.index)
    formats.pop(next(iter(formats)))
    with pytest.raises(UserError, match="another model"):
        verify_allocation(loaded, loaded.index, formats, tokens)
    with pytest.raises(UserError, match="no text"):
        verify_allocation(loaded, loaded.index, mixed(loaded.index), tokens[:0])


def test_token_kl_is_accurate_for_tiny_and_huge_changes():
    g = torch.Generator().manual_seed(0)
    ref = torch.randn(5, 1000, generator=g) * 3
    for scale in (1e-4, 1e-2, 1.0, 30.0):
        other = ref + scale * torch.randn(5, 1000, generator=g)
        p, q = torch.log_softmax(ref.double(), -1), torch.log_softmax(other.double(), -1)
        exact = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(token_kl(ref, other, chunk=2), exact, rtol=2e-3, atol=1e-12)
    masked = ref.clone()
    masked[:, :10] = -torch.inf
    assert torch.isfinite(token_kl(masked, masked)).all()
    assert float(token_kl(ref, ref).max()) == 0.0


def test_token_nll_shape_and_value():
    logits = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[0, 1, 2, 3], [8, 7, 6, 5]])
    got = token_nll(logits, ids, chunk=2)
    assert got.shape == (2, 3)
    assert float(got[1, 2]) == pytest.approx(
        -float(torch.log_softmax(logits[1, 2].double(), -1)[5]), rel=1e-6
    )
