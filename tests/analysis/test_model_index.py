"""The index: roles, experts, kept tensors, KV geometry; from headers alone, quickly, without torch."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitatlas.analysis.families import bare_name, classify
from bitatlas.analysis.kv_geometry import kv_geometry
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import KvLayout, ModelIndex
from bitatlas.kernels.errors import UserError


def fake_checkpoint(folder, shapes, config, dtype="BF16"):
    """A checkpoint of zeros (a sparse file): any number of tensors, no memory."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)
    return folder


EXPECTED = {
    "llama": "embed:1 q:2 k:2 v:2 o:2 gate:2 up:2 down:2 head:1",
    "llama_tied": "embed:1 q:2 k:2 v:2 o:2 gate:2 up:2 down:2",
    "qwen2": "embed:1 q:2 k:2 v:2 o:2 gate:2 up:2 down:2 head:1",
    "qwen3": "embed:1 q:2 k:2 v:2 o:2 gate:2 up:2 down:2 head:1",
    "mistral": "embed:1 q:2 k:2 v:2 o:2 gate:2 up:2 down:2 head:1",
    "gemma3": "embed:1 q:2 k:2 v:2 o:2 gate:2 up:2 down:2",
    "phi3": "embed:1 qkv:2 o:2 gate_up:2 down:2 head:1",
    "gpt2": "embed:1 qkv:2 o:2 fc1:2 fc2:2",
    "opt": "embed:1 q:2 k:2 v:2 o:2 fc1:2 fc2:2",
    "mixtral": "embed:1 q:2 k:2 v:2 o:2 gate:8 up:8 down:8 head:1",
    "qwen2_moe": "embed:1 q:2 k:2 v:2 o:2 gate:5 up:5 down:5 shared_gate:1 shared_up:1 shared_down:1 head:1",
    "qwen3_moe": "embed:1 q:2 k:2 v:2 o:2 gate:8 up:8 down:8 head:1",
    "olmoe": "embed:1 q:2 k:2 v:2 o:2 gate:8 up:8 down:8 head:1",
    "deepseek_v2": "embed:1 q_a:2 q_b:2 kv_a:2 kv_b:2 o:2 gate:5 up:5 down:5 shared_gate:1 shared_up:1 "
    "shared_down:1 head:1",
    "deepseek_v3": "embed:1 q_a:3 q_b:3 kv_a:3 kv_b:3 o:3 gate:9 up:9 down:9 shared_gate:2 shared_up:2 "
    "shared_down:2 head:1",
    "gpt_oss": "embed:1 q:2 k:2 v:2 o:2 gate:8 up:8 down:8 head:1",
}


@pytest.mark.parametrize("family", EXPECTED)
def test_roles_and_completeness(tiny_checkpoint, checkpoints, family):
    folder = tiny_checkpoint(family)
    index = index_model(folder)
    want = {r: int(n) for r, n in (pair.split(":") for pair in EXPECTED[family].split())}
    assert Counter(u.role for u in index.units) == want
    assert len(set(index.unit_keys())) == len(index.units)
    # Every stored number is in a unit or in a kept tensor, and in one only.
    stored = load_file(folder / "model.safetensors")
    assert index.params + sum(torch.Size(k.shape).numel() for k in index.kept) == sum(
        t.numel() for t in stored.values()
    )
    assert {u.tensor for u in index.units} | {k.name for k in index.kept} == set(stored)
    assert not {u.tensor for u in index.units} & {k.name for k in index.kept}
    assert index.kept_bytes == sum(stored[k.name].nbytes for k in index.kept)
    assert index.vocab_size == checkpoints.VOCAB
    assert index.n_experts == (4 if family in checkpoints.MOE_FAMILIES else 0)
    assert index.top_k == (2 if family in checkpoints.MOE_FAMILIES else 0)
    layers = [u.layer for u in index.units if u.layer >= 0]
    assert layers == sorted(layers)
    assert set(layers) == set(range(index.n_layers))
    assert index.units[0].role == "embed"
    assert ("tied" in " ".join(index.notes)) == ("head" not in want)
    assert ModelIndex.from_dict(json.loads(json.dumps(index.to_dict()))) == index


def test_keys_of_experts(tiny_checkpoint):
    keys = set(index_model(tiny_checkpoint("mixtral")).unit_keys())
    assert "model.layers.1.block_sparse_moe.experts.3.w2" in keys
    units = {u.key: u for u in index_model(tiny_checkpoint("mixtral")).units}
    assert [units[f"model.layers.1.block_sparse_moe.experts.3.{w}"].role for w in ("w1", "w2", "w3")] == [
        "gate", "down", "up"]  # fmt: skip
    units = {u.key: u for u in index_model(tiny_checkpoint("gpt_oss")).units}
    gate = units["model.layers.0.mlp.experts.gate_up_proj[2].gate"]
    assert (gate.rows, gate.cols, gate.expert, gate.transposed, gate.interleaved) == (40, 24, 2, True, True)
    down = units["model.layers.0.mlp.experts.down_proj[2]"]
    assert (down.rows, down.cols, down.role, down.transposed, down.interleaved) == (
        24,
        40,
        "down",
        True,
        False,
    )
    units = {u.key: u for u in index_model(tiny_checkpoint("gpt2")).units}
    c_attn = units["transformer.h.0.attn.c_attn"]
    assert (c_attn.rows, c_attn.cols, c_attn.transposed) == (72, 24, True)
    assert not units["transformer.wte"].transposed


@pytest.mark.parametrize(
    ("name", "shape"),
    [("model.layers.0.mlp.gate.weight", (8, 24)), ("model.layers.0.block_sparse_moe.gate.weight", (8, 24)),
     ("model.layers.0.mlp.router.weight", (8, 24)), ("model.layers.0.block_sparse_moe.router.layer.weight", (8, 24)),
     ("model.layers.0.mlp.shared_expert_gate.weight", (1, 24)), ("model.norm.weight", (24,)),
     ("model.layers.0.self_attn.q_proj.bias", (24,)), ("backbone.layers.0.mixer.conv1d.weight", (48, 1, 4)),
     ("model.decoder.embed_positions.weight", (258, 24)), ("transformer.wpe.weight", (256, 24)),
     ("backbone.layers.0.mixer.A_log", (48, 16)), ("x.experts.gate_up_proj_bias", (8, 80)),
     ("model.vision_tower.layers.0.self_attn.q_proj.weight", (24, 24)), ("empty.weight", (0, 24)),
     ("model.layers.0.mlp.gate.e_score_correction_bias", (8,))],
)  # fmt: skip
def test_kept_as_it_is(name, shape):
    assert classify(name, shape, "llama", 24) is None


@pytest.mark.parametrize(
    ("name", "role"),
    [("something.odd_matrix.weight", "linear"), ("backbone.layers.3.mixer.in_proj.weight", "linear"),
     ("model.language_model.layers.3.self_attn.q_proj.weight", "q"), ("language_model.lm_head.weight", "head"),
     ("gpt_neox.layers.3.attention.dense.weight", "o"), ("gpt_neox.layers.3.mlp.dense_4h_to_h.weight", "fc2"),
     ("transformer.h.3.self_attention.query_key_value.weight", "qkv"), ("output.weight", "head"),
     ("model.layers.3.mlp.shared_experts.gate_proj.weight", "shared_gate"), ("layers.3.feed_forward.w2.weight", "down")],
)  # fmt: skip
def test_roles_by_name(name, role):
    place = classify(name, (48, 24), "x", 24)
    assert place is not None
    assert place.role == role
    assert place.layer == (3 if ".3." in name else -1)


@pytest.mark.parametrize(
    ("name", "shape", "model_type", "role", "transposed"),
    [("model.layers.0.block_sparse_moe.input_linear.weight", (4, 80, 24), "granitemoe", "gate_up", False),
     ("model.layers.0.block_sparse_moe.output_linear.weight", (4, 24, 40), "granitemoe", "down", False),
     ("language_model.model.layers.0.feed_forward.experts.gate_up_proj", (4, 24, 80), "llama4_text", "gate_up", True),
     ("language_model.model.layers.0.feed_forward.experts.down_proj", (4, 40, 24), "llama4_text", "down", True),
     ("model.layers.0.mlp.experts.gate_up_proj", (4, 80, 24), "qwen3_5_moe_text", "gate_up", False),
     ("model.layers.0.mlp.experts.gate_up_proj", (4, 24, 80), "unheard_of", "gate_up", True),
     ("model.layers.0.mlp.experts.down_proj", (4, 24, 24), "gpt_oss", "down", True)],
)  # fmt: skip
def test_stacked_layouts(name, shape, model_type, role, transposed):
    place = classify(name, shape, model_type, 24)
    assert place is not None
    assert (place.role, place.stacked, place.transposed) == (role, True, transposed)


def test_bare_names_join_wrappers():
    assert (
        bare_name("model.language_model.layers.0.x")
        == bare_name("language_model.model.layers.0.x")
        == "layers.0.x"
    )
    assert bare_name("transformer.h.0.x") == bare_name("h.0.x")


def test_unknown_architecture_is_indexed(tmp_path):
    index = index_model(
        fake_checkpoint(tmp_path / "m", {"foo.bar.weight": (6, 4), "foo.b": (6,)}, {"model_type": "zz"})
    )
    assert [(u.key, u.role) for u in index.units] == [("foo.bar", "linear")]
    assert index.kv is None
    assert any("plain linears" in n for n in index.notes)


def test_no_unit_at_all(tmp_path):
    with pytest.raises(UserError, match="no weight matrix"):
        index_model(fake_checkpoint(tmp_path / "m", {"a.bias": (6,)}, {}))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantised_already(tmp_path, method):
    folder = fake_checkpoint(
        tmp_path / "m", {"a.weight": (6, 4)}, {"quantization_config": {"quant_method": method}}
    )
    with pytest.raises(UserError, match=f"already quantised.*{method}"):
        index_model(folder)


def test_extra_prediction_layers_are_kept(tmp_path):
    shapes = {f"model.layers.{i}.self_attn.q_proj.weight": (6, 4) for i in range(3)}
    index = index_model(fake_checkpoint(tmp_path / "m", shapes, {"num_hidden_layers": 2}))
    assert [u.layer for u in index.units] == [0, 1]
    assert [k.name for k in index.kept] == ["model.layers.2.self_attn.q_proj.weight"]


def test_stored_copy_of_a_tied_head_counts_once(tiny_checkpoint, tmp_path):
    state = load_file(tiny_checkpoint("llama_tied") / "model.safetensors")
    config = json.loads((tiny_checkpoint("llama_tied") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "model.safetensors")
    assert [u.key for u in index_model(tmp_path).units if u.role in ("embed", "head")] == [
        "model.embed_tokens"
    ]
    state["lm_head.weight"] += 1
    save_file(state, tmp_path / "model.safetensors")
    assert [u.role for u in index_model(tmp_path).units if u.role in ("embed", "head")] == ["embed", "head"]


def test_digest_changes_with_what_it_covers(tiny_checkpoint, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((tiny_checkpoint("llama") / name).read_bytes())
    first = index_model(folder).digest
    assert first == index_model(tiny_checkpoint("llama")).digest
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] += 0.5
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    second = index_model(folder).digest
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert len({first, second, index_model(folder).digest}) == 3


def test_twenty_thousand_tensors_without_torch(tmp_path):
    shapes = {"model.embed_tokens.weight": (512, 64)}
    for layer in range(52):
        for e in range(128):
            for p, shape in (("gate", (96, 64)), ("up", (96, 64)), ("down", (64, 96))):
                shapes[f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"] = shape
        shapes[f"model.layers.{layer}.mlp.gate.weight"] = (128, 64)
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 52, "hidden_size": 64, "num_attention_heads": 4,
              "num_experts": 128, "num_experts_per_tok": 8}  # fmt: skip
    folder = fake_checkpoint(tmp_path / "big", shapes, config)
    code = (
        "import sys, time\n"
        "begun = time.process_time()\n"
        "from bitatlas.analysis.model_index import index_model\n"
        "index = index_model(sys.argv[1])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "print(len(index.units), index.n_experts, index.top_k, time.process_time() - begun)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    units, experts, top_k, seconds = done.stdout.split()
    assert (int(units), int(experts), int(top_k)) == (19969, 128, 8)
    assert float(seconds) < 2


KV = {
    "plain": ({"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}, ((4, 4), 8, (0, 0))),
    "grouped": ({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2,
                 "head_dim": 16}, ((2,), 16, (0,))),
    "gpt2": ({"n_layer": 2, "n_embd": 24, "n_head": 4}, ((4, 4), 6, (0, 0))),
    "mistral": ({"model_type": "mistral", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                 "sliding_window": 16}, ((4, 4), 8, (16, 16))),
    "gemma3": ({"model_type": "gemma3_text", "num_hidden_layers": 7, "hidden_size": 32, "num_attention_heads": 4,
                "sliding_window": 16}, ((4,) * 7, 8, (16, 16, 16, 16, 16, 0, 16))),
    "types": ({"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "sliding_window": 16,
               "layer_types": ["linear_attention", "full_attention", "sliding_attention"]}, ((0, 4, 4), 8, (0, 0, 16))),
    "qwen2 off": ({"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                   "sliding_window": 16, "use_sliding_window": False}, ((4, 4), 8, (0, 0))),
    "qwen2 on": ({"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4,
                  "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}, ((4, 4), 8, (0, 16))),
    "latent": ({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "kv_lora_rank": 512,
                "qk_rope_head_dim": 64}, ((1,), 512, (0,))),
    "shared": ({"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "num_kv_shared_layers": 1},
               ((4, 4, 0), 8, (0, 0, 0))),
}  # fmt: skip


@pytest.mark.parametrize("case", KV)
def test_kv_geometry(case):
    config, (heads, dim, windows) = KV[case]
    kv = kv_geometry(config)
    assert kv is not None
    assert (kv.heads, kv.head_dim, kv.windows) == (heads, dim, windows)


def test_latent_cache_bytes_are_the_latent_alone():
    kv = kv_geometry(KV["latent"][0])
    assert kv is not None
    assert kv.cache_bytes(100, 2) == 2 * 100 * (512 + 64) * 2
    assert kv.plan_bytes({}, 100, 2, KvLayout()) == 2 * 100 * (512 + 64) * 2


@pytest.mark.parametrize(
    "config",
    [{}, {"num_hidden_layers": "x"}, {"num_hidden_layers": -1, "num_attention_heads": 4}, {"num_hidden_layers": 1e9},
     {"num_hidden_layers": 10**9, "num_attention_heads": 1}, {"num_hidden_layers": 2, "num_attention_heads": 4},
     {"num_hidden_layers": True, "num_attention_heads": True}],
)  # fmt: skip
def test_kv_geometry_unknown(config):
    assert kv_geometry(config) is None
