"""Golden configs and the rules that decide whether an engine takes them."""

from __future__ import annotations

import json
import re

import pytest

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS, WRONG

VLLM, CT = TARGETS["vllm"], TARGETS["compressed-tensors"]


def mixed(index, base: str, **roles: str) -> dict[str, str]:
    other = {"embed": "bf16", "head": "bf16", **roles}
    return {u.key: other.get(u.role, base) for u in index.units}


def experts_of(index, layer: int) -> list[str]:
    return [u.key for u in index.units if u.expert >= 0 and u.layer == layer]


def test_compressed_tensors_golden(make_index, allocate) -> None:
    index = make_index("qwen3_moe", layers=1, experts=2)
    plan = allocate(
        index, mixed(index, "int4-g64-sym", q="int8-channel-sym", k="int8-channel-sym", v="int8-channel-sym")
    )
    assert CT.check(plan, index).status == SERVABLE
    config = json.loads(CT.render(plan, index)["quantization_config.json"])["quantization_config"]
    assert config == {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "global_compression_ratio": None, "kv_cache_scheme": None,
        "ignore": ["model.embed_tokens", "lm_head", "model.layers.0.mlp.gate"],
        "config_groups": {
            "group_0": {
                "targets": ["model.layers.0.self_attn.o_proj",
                            "re:model\\.layers\\.0\\.mlp\\.experts\\.\\d+\\.(down_proj|gate_proj|up_proj)$"],
                "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64,
                            "dynamic": False},
                "input_activations": None, "output_activations": None, "format": "pack-quantized"},
            "group_1": {
                "targets": ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj",
                            "model.layers.0.self_attn.v_proj"],
                "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None,
                            "dynamic": False},
                "input_activations": None, "output_activations": None, "format": "pack-quantized"},
        },
    }  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_compressed_tensors_targets_are_disjoint_and_complete(seed: int, make_index, allocate) -> None:
    index = make_index("qwen3_moe", layers=12, experts=3)
    palette = ("int4-g64-sym", "int8-g64-sym", "bf16")
    per_layer = {u.key: palette[(u.layer + seed) % 3] for u in index.units}
    plan = allocate(index, mixed(index, "bf16") | {k: f for k, f in per_layer.items() if "layers" in k})
    config = VLLM.quantization_config(plan, index)
    for unit in index.units:
        hits = []
        for group in config["config_groups"].values():
            for target in group["targets"]:
                match = re.match(target[3:], unit.key) if target.startswith("re:") else target == unit.key
                if match:
                    hits.append(group["weights"]["num_bits"])
        want = plan.formats[unit.key]
        assert hits == ([] if want == "bf16" else [int(want[3])])
        assert (unit.key in config["ignore"]) == (want == "bf16")


def test_vllm_and_transformers_differ_where_layers_differ(make_index, allocate) -> None:
    index = make_index("qwen3_moe", experts=4)
    formats = mixed(index, "int4-g64-sym") | dict.fromkeys(experts_of(index, 1), "int8-g64-sym")
    verdict = VLLM.check(allocate(index, formats), index)
    assert verdict.status == SERVABLE
    assert any("transformers" in n for n in verdict.notes)
    assert CT.check(allocate(index, formats), index).status == WRONG


def test_one_expert_that_differs_is_not_noticed_by_vllm_unless_it_is_the_first(make_index, allocate) -> None:
    index = make_index("qwen3_moe", experts=4)
    formats = mixed(index, "int4-g64-sym")
    third = formats | {k: "int8-g64-sym" for k in experts_of(index, 1) if ".experts.3." in k}
    verdict = VLLM.check(allocate(index, third), index)
    assert verdict.status == WRONG
    assert set(verdict.units) == set(experts_of(index, 1))
    assert len(verdict.changes) == 3
    first = formats | {"model.layers.0.mlp.experts.0.down_proj": "int8-g64-sym"}
    assert VLLM.check(allocate(index, first), index).status == REJECTED


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"k": "int8-g64-sym"}, REJECTED, "fuses q, k and v"),
        ({"gate": "int8-g64-sym"}, REJECTED, "fuses gate and up"),
        ({"o": "int3-g64"}, REJECTED, "asymmetric"),
        ({"o": "int4-g64"}, SERVABLE, ""),
        ({"o": "int3-g64-sym"}, SERVABLE, ""),
        ({"embed": "int8-g64-sym"}, REJECTED, "16 bits"),
        ({"head": "int8-g64-sym"}, REJECTED, "16 bits"),
    ],
)
def test_vllm_rules_for_dense_models(change: dict, status: str, words: str, make_index, allocate) -> None:
    index = make_index()
    verdict = VLLM.check(allocate(index, mixed(index, "int4-g64-sym", **change)), index)
    assert verdict.status == status
    assert words in " ".join(verdict.reasons)


def test_vllm_rules_for_experts_and_odd_checkpoints(make_index, allocate, tiny_checkpoint) -> None:
    index = make_index("qwen3_moe", experts=4)
    plan = allocate(index, mixed(index, "int4-g64"))
    assert VLLM.check(plan, index).status == REJECTED
    assert CT.check(plan, index).status == REJECTED
    dense = make_index()
    plan = allocate(dense, mixed(dense, "int4-g64"))
    assert VLLM.check(plan, dense).status == SERVABLE
    assert "transformers refuses" in CT.check(plan, dense).reasons[0]
    mixtral = make_index("mixtral", experts=4)
    assert VLLM.check(allocate(mixtral, mixed(mixtral, "int4-g64-sym")), mixtral).status == WRONG
    for family, words in (
        ("gpt2", "Conv1D"),
        ("gpt_oss", "fused in the checkpoint"),
        ("llama", "do not divide"),
    ):
        odd = index_model(tiny_checkpoint(family))
        verdict = VLLM.check(allocate(odd, "int4-g32-sym"), odd)
        assert verdict.status == REJECTED
        assert words in " ".join(verdict.reasons)


def test_auto_round_golden(make_index, allocate) -> None:
    target, index = TARGETS["auto-round"], make_index(layers=1)
    plan = allocate(index, mixed(index, "int4-g128-sym", o="int8-channel-sym", down="bf16", head="int6-g64"))
    assert target.check(plan, index).status == SERVABLE
    files = target.render(plan, index)
    assert files["layer_config.json"] == (
        "{\n"
        '"model.layers.0.self_attn.q_proj": {"bits": 4, "group_size": 128, "sym": true},\n'
        '"model.layers.0.self_attn.k_proj": {"bits": 4, "group_size": 128, "sym": true},\n'
        '"model.layers.0.self_attn.v_proj": {"bits": 4, "group_size": 128, "sym": true},\n'
        '"model.layers.0.self_attn.o_proj": {"bits": 8, "group_size": -1, "sym": true},\n'
        '"model.layers.0.mlp.gate_proj": {"bits": 4, "group_size": 128, "sym": true},\n'
        '"model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 128, "sym": true},\n'
        '"model.layers.0.mlp.down_proj": {"bits": 16, "data_type": "float"},\n'
        '"lm_head": {"bits": 6, "group_size": 64, "sym": false}\n'
        "}\n"
    )
    assert "base = {'bits': 4, 'group_size': 128, 'sym': True}" in files["quantize.py"]


def test_gptqmodel_golden(make_index, allocate) -> None:
    target, index = TARGETS["gptqmodel"], make_index("qwen3_moe", layers=2, experts=2)
    formats = mixed(index, "int4-g64-sym", o="bf16")
    formats |= {u.key: "int8-g64-sym" for u in index.units if u.layer == 1 and u.role in "qkv"}
    formats |= dict.fromkeys(experts_of(index, 0), "int3-g32-sym")
    plan = allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    assert target.quantize_config(plan, index) == {
        "bits": 4, "group_size": 64, "sym": True, "desc_act": False, "lm_head": False,
        "dynamic": {
            "-:.*layers\\.0\\.self_attn\\.o_proj$": {},
            "+:.*layers\\.0\\.mlp\\.experts(\\.|$)": {"bits": 3, "group_size": 32},
            "+:.*layers\\.1\\.self_attn\\.(q_proj|k_proj|v_proj|qkv_proj)$": {"bits": 8, "group_size": 64},
            "-:.*layers\\.1\\.self_attn\\.o_proj$": {},
        },
    }  # fmt: skip


def test_gptqmodel_rules_match_shards_and_fused_names_and_nothing_else(make_index, allocate) -> None:
    target, index = TARGETS["gptqmodel"], make_index("qwen3_moe", layers=13, experts=2)
    per_layer = {
        u.key: ("int4-g64-sym", "int8-g64-sym", "bf16")[u.layer % 3] for u in index.units if u.layer >= 0
    }
    plan = allocate(index, mixed(index, "bf16") | per_layer)
    config = target.quantize_config(plan, index)

    def scheme(name: str) -> int:
        for rule, value in config["dynamic"].items():
            if re.match(rule[2:], name):
                return 16 if rule[0] == "-" else value["bits"]
        return config["bits"]

    for u in index.units:
        if u.layer >= 0:
            want = {"int4-g64-sym": 4, "int8-g64-sym": 8, "bf16": 16}[plan.formats[u.key]]
            assert scheme(u.key) == want
            if u.role == "q":
                assert scheme(u.key.replace("q_proj", "qkv_proj")) == want
            if u.expert == 0 and u.role == "up":
                assert scheme(u.key.partition(".0.up_proj")[0]) == want


def test_gptqmodel_rules(make_index, allocate) -> None:
    target, index = TARGETS["gptqmodel"], make_index()
    six = target.check(allocate(index, mixed(index, "int6-g64-sym")), index)
    assert six.status == REJECTED
    assert set(six.changes.values()) == {"int8-g64-sym"}
    three = target.check(allocate(index, mixed(index, "int3-g64-sym")), index)
    assert three.status == SERVABLE
    assert any("Marlin" in n for n in three.notes)


def test_mlx_golden(make_index, allocate) -> None:
    target, index = TARGETS["mlx"], make_index("mixtral", layers=1, experts=2)
    plan = allocate(index, mixed(index, "int4-g64", down="int3-g32", embed="int6-g64"))
    assert target.check(plan, index).status == SERVABLE
    files = target.render(plan, index)
    assert json.loads(files["quantization.json"]) == {
        "group_size": 64, "bits": 4, "mode": "affine",
        "model.embed_tokens": {"group_size": 64, "bits": 6},
        "model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 4},
        "model.layers.0.self_attn.k_proj": {"group_size": 64, "bits": 4},
        "model.layers.0.self_attn.v_proj": {"group_size": 64, "bits": 4},
        "model.layers.0.self_attn.o_proj": {"group_size": 64, "bits": 4},
        "model.layers.0.block_sparse_moe.switch_mlp.gate_proj": {"group_size": 64, "bits": 4},
        "model.layers.0.block_sparse_moe.switch_mlp.up_proj": {"group_size": 64, "bits": 4},
        "model.layers.0.block_sparse_moe.switch_mlp.down_proj": {"group_size": 32, "bits": 3},
        "lm_head": False,
    }  # fmt: skip


def test_mlx_counts_a_bias_with_every_scale(make_index, allocate) -> None:
    target, index = TARGETS["mlx"], make_index(layers=1)
    plan = allocate(index, mixed(index, "int4-g64-sym"))
    linears = sum(u.params for u in index.units if u.layer >= 0)
    tables = sum(u.params for u in index.units if u.layer < 0)
    assert target.engine_bytes(plan, index) == linears * 4.5 / 8 + tables * 2 + index.kept_bytes
    verdict = target.check(allocate(index, mixed(index, "int4-channel")), index)
    assert verdict.status == REJECTED
    assert set(verdict.changes.values()) == {"int4-g128"}


def test_bitatlas_serves_anything(make_index, allocate) -> None:
    target, index = TARGETS["bitatlas"], make_index("qwen3_moe", experts=4)
    formats = {u.key: ("int2-g32", "int8-channel-sym", "int5-g64")[i % 3] for i, u in enumerate(index.units)}
    plan = allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    assert json.loads(target.render(plan, index)["allocation.json"])["formats"] == formats


def test_torchao_golden(make_index, allocate) -> None:
    target, index = TARGETS["torchao"], make_index(layers=1)
    roles = {"q": "int4-g32-sym", "k": "int8-channel", "gate": "fp8-channel", "up": "fp8-tensor"}
    plan = allocate(index, mixed(index, "bf16", **roles))
    assert target.check(plan, index).status == SERVABLE, target.check(plan, index).reasons
    table = json.loads(target.render(plan, index)["fqn_to_config.json"])
    layer = "model.layers.0."
    assert {k.removeprefix(layer): v for k, v in table.items() if v} == {
        "self_attn.q_proj": {"weight_dtype": "int4", "group_size": 32, "mapping_type": "SYMMETRIC"},
        "self_attn.k_proj": {"weight_dtype": "int8", "group_size": None, "mapping_type": "ASYMMETRIC"},
        "mlp.gate_proj": {"weight_dtype": "float8_e4m3fn", "scales": "row"},
        "mlp.up_proj": {"weight_dtype": "float8_e4m3fn", "scales": "tensor"},
    }
    gate = next(u for u in index.units if u.role == "gate")
    assert target.unit_bytes(gate, FORMATS["fp8-channel"]) == gate.params + 4 * gate.rows
    assert target.unit_bytes(gate, FORMATS["fp8-tensor"]) == gate.params + 4
    assert target.check(allocate(index, mixed(index, "nf4-g64")), index).status == REJECTED
