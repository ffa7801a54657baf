"""K/V plans in the engines' words: exact where they can be, and honest where not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bitatlas.analysis.schema import KvGeometry
from bitatlas.app.targets import TARGETS
from bitatlas.app.targets.kv import kv_setting


@pytest.fixture
def plan(make_index, allocate):
    index = replace(make_index("llama", layers=4), kv=KvGeometry((2,) * 4, 32, (0,) * 4))

    def make(*pairs: tuple[str, str]):
        kv = {i: pair for i, pair in enumerate(pairs) if pair[0]}
        return replace(allocate(index, "int4-g64-sym"), kv=kv), index

    return make


K8, K4, K2 = ("kv8-channel", "kv8-token"), ("kv4-channel", "kv4-token"), ("kv2-channel", "kv2-token")


def test_one_pair_for_all_is_exact(plan):
    for engine, flags in (("vllm", "--kv-cache-dtype fp8"), ("llama.cpp", "--cache-type-k q8_0 --cache-type-v q8_0 -fa on"),
                          ("mlx", "--kv-bits 8 --kv-group-size 64")):  # fmt: skip
        setting = kv_setting(engine, *plan(K8, K8, K8, K8))
        assert (setting.flags, setting.exact) == (flags, True)
    split = kv_setting("llama.cpp", *plan(*[("kv8-channel", "kv4-token")] * 4))
    assert split.flags == "--cache-type-k q8_0 --cache-type-v q4_0 -fa on"
    assert kv_setting("vllm", *plan(*[("kv8-channel", "kv4-token")] * 4)).flags.endswith("turboquant_k8v4")


def test_vllm_leaves_16_bit_layers_out_by_name(plan):
    setting = kv_setting("vllm", *plan(("", ""), K8, K8, ("", "")))
    assert setting.flags == "--kv-cache-dtype fp8 --kv-cache-dtype-skip-layers 0 3"
    assert setting.exact


def test_a_mix_is_rounded_up_on_average_and_said(plan):
    setting = kv_setting("llama.cpp", *plan(K8, K4, K4, K4))
    assert setting.bits == (8, 8)
    assert not setting.exact
    assert "0 layers get fewer bits than planned, 3 get more" in setting.notes[0]
    setting = kv_setting("llama.cpp", *plan(K8, K2, K2, K2))
    assert setting.bits == (4, 4)
    assert "1 layers get fewer bits than planned, 3 get more" in setting.notes[0]
    wide = kv_setting("mlx", *plan(("", ""), ("", ""), ("", ""), K8))
    assert (wide.flags, wide.exact) == ("", False)
    assert "stays at 16 bits" in wide.notes[0]


def test_no_plan_changes_nothing_and_a_plan_reaches_commands_and_verdicts(plan):
    none, index = plan(("", ""), ("", ""), ("", ""), ("", ""))
    mixed, _ = plan(K8, K4, K4, K4)
    for target in TARGETS.values():
        assert target.kv(none, index).flags == ""
        assert target.kv(none, index).notes == ()
        assert any("KV" in n for n in target.check(mixed, index).notes), target.NAME
    assert "--kv-cache-dtype fp8" in TARGETS["vllm"].command(mixed, index)
    assert "--cache-type-k q8_0" in TARGETS["llama.cpp"].command(mixed, index)
    assert "cache-type" not in TARGETS["llama.cpp"].command(none, index)


def test_transformers_gets_a_cache_layer_by_layer(plan):
    setting = kv_setting("transformers", *plan(K8, K4, ("", ""), K2))
    assert (setting.flags, setting.exact) == ("", True)
    assert "BITS = {0: 8, 1: 4, 3: 2}" in setting.files["kv_cache.py"]
    assert (
        "q_group_size=32" in setting.files["kv_cache.py"]
    )  # as wide as a head: no group goes over two tokens
    split, index = plan(("kv8-channel", "kv4-token"), K4, K4, ("kv4-channel", "kv2-token"))
    setting = kv_setting("transformers", split, index)
    assert "BITS = {0: 8, 1: 4, 2: 4, 3: 4}" in setting.files["kv_cache.py"]
    assert not setting.exact
    assert any("2 layers get the nearest" in n for n in setting.notes)
    for name, target in TARGETS.items():
        assert ("kv_cache.py" in target.render(split, index)) == (
            name in ("auto-round", "gptqmodel", "torchao")
        )


def test_transformers_cannot_pack_a_window_that_slides(plan):
    mixed, index = plan(K8, K8, K8, K8)
    kv = KvGeometry((2,) * 4, 32, (16, 0, 16, 0))
    setting = kv_setting("transformers", mixed, replace(index, kv=kv))
    assert "BITS = {1: 8, 3: 8}" in setting.files["kv_cache.py"]
    assert any("2 layers with a sliding KV window stay at 16 bits" in n for n in setting.notes)
    setting = kv_setting("transformers", mixed, replace(index, kv=replace(kv, windows=(16,) * 4)))
    assert setting.files == {}
    assert "stays at 16 bits" in setting.notes[0]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_script_is_a_cache_that_generates(
    family: str, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, allocate
) -> None:
    """With a layer of transformers' own kind in the place of HQQ's, which does not install here."""
    from transformers import AutoModelForCausalLM, cache_utils

    from bitatlas.analysis.model_index import index_model

    class Layer(cache_utils.QuantizedLayer):
        def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
            scale = tensor.abs().amax().clamp_min(1e-9) / (2 ** (self.nbits - 1) - 1)
            return (tensor / scale).round() * scale

        def _dequantize(self, tensor: Any) -> Any:
            return tensor

    monkeypatch.setattr(cache_utils, "HQQQuantizedLayer", Layer)
    changes = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    folder = tiny_checkpoint(family, **changes)
    index = index_model(folder)
    pairs = dict.fromkeys(index.kv.layers, ("kv4-channel", "kv4-token"))
    scope: dict[str, Any] = {}
    exec(
        kv_setting("transformers", replace(allocate(index, "bf16"), kv=pairs), index).files["kv_cache.py"],
        scope,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = scope["kv_cache"](model)
    assert [type(c) is Layer for c in cache.layers] == [not w for w in index.kv.windows]
    ids = torch.randint(1, 200, (1, 7))
    out = model.generate(ids, past_key_values=cache, max_new_tokens=80, do_sample=False, eos_token_id=None)
    assert out.shape == (1, 87)
    assert cache.get_seq_length() == 86
