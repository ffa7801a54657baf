"""Verification, allocation files and generation with K/V formats."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation, KvLayout, UserError, parse_pair
from bitatlas.analysis.verify import verify_many
from bitatlas.kernels.kv.cache import PackedKvCache

LAYOUT = KvLayout(4, 2)


def test_verify_reads_the_cache_as_decoding_does(tiny_checkpoint):
    index = index_model(tiny_checkpoint("llama"))
    loaded = LoadedModel.open(index)
    tokens = np.random.default_rng(2).integers(1, 250, (3, 19))
    plan = {0: parse_pair("kv2-channel/kv2-token"), 1: parse_pair("kv4-token/kv16")}
    same = dict.fromkeys(index.unit_keys(), "bf16")
    got = verify_many(
        loaded, index, {"a": same, "b": same}, tokens, kv={"b": (plan, LAYOUT), "a": ({}, LAYOUT)}
    )
    ids = torch.from_numpy(tokens)
    p = torch.log_softmax(loaded.logits(ids).double(), -1)
    from bitatlas.kernels.formats import FORMATS
    from bitatlas.kernels.reference import quantize_dequantize

    weights = {k: quantize_dequantize(loaded.handle(k).get(), FORMATS["bf16"]) for k in index.unit_keys()}
    cache = PackedKvCache(loaded.model.config, plan, LAYOUT)
    with loaded.swapped(weights), torch.no_grad():
        steps = [
            loaded.model(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(19)
        ]
    q = torch.log_softmax(torch.cat(steps, 1).double(), -1)
    kl = (p.exp() * (p - q)).sum(-1)
    assert got["b"].kl_mean == pytest.approx(float(kl.mean()), rel=1e-2)
    assert got["b"].kl_mean > 2 * got["a"].kl_mean
    with pytest.raises(UserError, match="too short"):
        verify_many(loaded, index, {"b": same}, tokens[:, :6], kv={"b": (plan, LAYOUT)})


def test_the_file_keeps_formats_and_window_and_refuses_others(tiny_checkpoint):
    index = index_model(tiny_checkpoint("llama"))
    base = Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), "int4-g32"), 1, 1, 4.0)
    assert "kv_block" not in json.loads(base.to_json())
    assert Allocation.from_json(base.to_json()).kv_layout == KvLayout()
    mixed = Allocation(index.digest, index.name, base.formats, 1, 1, 4.0, kv={1: ("kv8-channel", "kv4-token")},
                       kv_block=4, kv_residual=2)  # fmt: skip
    again = Allocation.from_json(mixed.to_json())
    assert again.kv_plan == {1: parse_pair("kv8-channel/kv4-token")}
    assert again.kv_layout == LAYOUT
    mixed.check_model(index)
    bad = json.loads(mixed.to_json()) | {"kv": {"1": ["int4-g32", "kv4-token"]}}
    with pytest.raises(UserError, match="no KV format"):
        Allocation.from_json(json.dumps(bad))
    bad["kv"] = {"7": ["kv4-token", "kv4-token"]}
    with pytest.raises(UserError, match="layer 7"):
        Allocation.from_json(json.dumps(bad)).check_model(index)
