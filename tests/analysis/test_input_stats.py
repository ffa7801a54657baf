from __future__ import annotations

import numpy as np
import pytest
import torch

from bitatlas.analysis.input_stats import InputSource, collect_inputs, input_key
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "phi3"])
def test_every_unit_gets_the_moments_of_its_own_inputs(family: str, tiny_checkpoint) -> None:
    index = index_model(tiny_checkpoint(family))
    loaded = LoadedModel.open(index)
    tokens = np.random.default_rng(0).integers(1, 250, (5, 12))
    naive: dict[str, list[torch.Tensor]] = {u.key: [] for u in index.units}
    with torch.no_grad(), loaded.capture(lambda unit, x, token, weight: naive[unit].append(x.clone())):
        loaded.logits(torch.from_numpy(tokens))
    got = collect_inputs(loaded, tokens, index.units, batch_tokens=24)
    assert set(got) == {u.key for u in index.units if u.role != "embed"}
    for key, stats in got.items():
        x = torch.cat(naive[key]).double() if naive[key] else torch.zeros(0, stats.hessian.shape[0]).double()
        assert stats.tokens == len(x)
        torch.testing.assert_close(stats.hessian.double(), x.T @ x, rtol=1e-4, atol=1e-5)


def test_the_model_runs_no_further_than_the_units_go(tiny_checkpoint) -> None:
    index = index_model(tiny_checkpoint("llama"))
    loaded, tokens = LoadedModel.open(index), np.ones((3, 4), np.int64)
    whole = collect_inputs(loaded, tokens, index.units, batch_tokens=4)
    reached: list[int] = []
    for i, block in enumerate(loaded.model.model.layers):
        block.mlp.register_forward_pre_hook(lambda *_, i=i: reached.append(i))
    got = collect_inputs(loaded, tokens, [u for u in index.units if u.layer == 0], batch_tokens=4)
    assert reached == [0, 0, 0]
    assert all(torch.equal(got[u].hessian, whole[u].hessian) and got[u].tokens == 12 for u in got)


def test_units_with_one_input_share_one_matrix(tiny_checkpoint) -> None:
    index = index_model(tiny_checkpoint("llama"))
    got = collect_inputs(LoadedModel.open(index), np.ones((1, 4), np.int64), index.units)
    at = "model.layers.1."
    assert got[at + "self_attn.q_proj"].hessian is got[at + "self_attn.v_proj"].hessian
    assert got[at + "mlp.gate_proj"].hessian is got[at + "mlp.up_proj"].hessian
    assert got[at + "self_attn.o_proj"].hessian is not got[at + "self_attn.q_proj"].hessian


def test_batches_stay_within_the_limit_and_change_nothing(tiny_checkpoint) -> None:
    index = index_model(tiny_checkpoint("qwen3_moe"))
    loaded = LoadedModel.open(index)
    tokens = np.random.default_rng(1).integers(1, 250, (2, 9))
    limit = 3 * 24 * 24 * 4
    source = InputSource(loaded, tokens, index.units, limit)
    whole = collect_inputs(loaded, tokens, index.units)
    for unit in index.units:
        stats = source.get(unit.key)
        if unit.role == "embed":
            assert stats is None
            continue
        assert torch.equal(stats.hessian, whole[unit.key].hessian)
        held = {input_key(u): u.cols for u in index.units if u.key in source._held}
        assert sum(c * c * 4 for c in held.values()) <= limit
    assert source.passes > 3
