"""Loaded models: what capture reports is what the layers compute; other names; everything that cannot be loaded."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitatlas.analysis.experts_hook import IMPLEMENTATION
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.weights import WeightReader
from bitatlas.kernels.errors import UserError

MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")
IDS = torch.randint(1, 250, (2, 11), generator=torch.Generator().manual_seed(7))


def edited(source, folder, state=None, config=None):
    """A copy of a checkpoint with other tensors or other config entries."""
    shutil.copytree(source, folder)
    if state is not None:
        save_file(
            {k: v.contiguous() for k, v in state.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
    if config is not None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | config))
    return folder


@pytest.mark.parametrize("family", MOE)
def test_captured_experts_rebuild_the_layer(tiny_checkpoint, family):
    """sum over experts of weight * (W_down h [+ bias]) at the token's place is what the experts module returned."""
    loaded = LoadedModel.open(index_model(tiny_checkpoint(family)))
    units = {u.key: u for u in loaded.index.units}
    outputs: dict[int, torch.Tensor] = {}
    rebuilt: dict[int, torch.Tensor] = {}
    inputs: dict[tuple[int, int], list[torch.Tensor]] = {}
    modules = {int(n.split(".")[2]): m for n, m in loaded.model.named_modules() if n.endswith(".experts")}

    def callback(key, x, token, weight):
        u = units[key]
        if u.expert < 0:
            assert weight is None
            assert torch.equal(token, torch.arange(IDS.numel()))
            return
        assert weight is not None
        assert len(set(token.tolist())) == len(token)
        if u.role != "down":
            inputs.setdefault((u.layer, u.expert), []).append(x)
            return
        y = x @ loaded.handle(key).get().T
        bias = getattr(modules[u.layer], "down_proj_bias", None)
        y = y if bias is None else y + bias[u.expert]
        out = rebuilt.setdefault(u.layer, torch.zeros(IDS.numel(), u.rows))
        out.index_add_(0, token, weight[:, None] * y)

    hooks = [
        m.register_forward_hook(lambda _m, _a, out, layer=layer: outputs.__setitem__(layer, out))
        for layer, m in modules.items()
    ]
    with torch.no_grad(), loaded.capture(callback):
        loaded.logits(IDS)
    for hook in hooks:
        hook.remove()
    assert outputs.keys() == rebuilt.keys() == {u.layer for u in units.values() if u.expert >= 0}
    for layer, out in outputs.items():
        torch.testing.assert_close(rebuilt[layer], out.reshape(-1, out.shape[-1]), atol=1e-5, rtol=1e-5)
    for gate_x, up_x in inputs.values():
        assert torch.equal(gate_x, up_x)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_captured_inputs_are_the_layers(tiny_checkpoint, family):
    loaded = LoadedModel.open(index_model(tiny_checkpoint(family)))
    modules = dict(loaded.model.named_modules())
    checked = []

    def callback(key, x, token, weight):
        module = modules.get(key, loaded.model.lm_head)
        y = x @ loaded.handle(key).get().T + (0 if getattr(module, "bias", None) is None else module.bias)
        if not isinstance(module, torch.nn.Embedding):
            torch.testing.assert_close(y, module.forward(x), atol=1e-5, rtol=1e-5)
            checked.append(key)

    with torch.no_grad(), loaded.capture(callback):
        loaded.logits(IDS)
    assert len(checked) >= len(loaded.index.units) - 1
    # Nothing stays attached.
    assert all(not m._forward_pre_hooks for m in loaded.model.modules())


def test_capture_of_chosen_units_and_after_an_error(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("qwen3_moe")))
    wanted = {"model.layers.1.self_attn.q_proj", "model.layers.0.mlp.experts.2.down_proj"}
    seen = set()
    with torch.no_grad(), loaded.capture(lambda key, *_: seen.add(key), wanted):
        loaded.logits(IDS)
    assert seen == wanted
    with pytest.raises(ZeroDivisionError), torch.no_grad(), loaded.capture(lambda *_: 1 / 0):
        loaded.logits(IDS)
    with torch.no_grad():
        loaded.logits(IDS)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_expert_gradients_equal_transformers_own(tiny_checkpoint, family):
    import transformers

    loaded = LoadedModel.open(index_model(tiny_checkpoint(family)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint(family), dtype=torch.float32
    ).eval()
    theirs.set_experts_implementation("eager")
    assert loaded.model.config._experts_implementation == IMPLEMENTATION
    theirs(input_ids=IDS).logits.square().mean().backward()
    wanted = dict(theirs.named_parameters())
    with loaded.requires_grad(loaded.index.unit_keys()) as params:
        loaded.logits(IDS).square().mean().backward()
        assert len(params) == len({id(p) for p in params})
        for name, p in loaded.model.named_parameters():
            if p.grad is not None:
                torch.testing.assert_close(p.grad, wanted[name].grad, atol=1e-7, rtol=1e-4)


def test_second_derivatives_with_eager_attention(tiny_checkpoint):
    """A Hessian-vector product equals the finite difference of gradients."""
    loaded = LoadedModel.open(
        index_model(tiny_checkpoint("qwen3_moe")), dtype=torch.float64, attention="eager"
    )
    unit = "model.layers.0.mlp.experts.1.down_proj"
    v = torch.randn(24, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with loaded.requires_grad([unit]) as (param,):
        handle = loaded.handle(unit)

        def gradient(graph=False):
            (g,) = torch.autograd.grad(
                loaded.model(input_ids=IDS).logits.square().mean(), param, create_graph=graph
            )
            return handle.view(g)

        (hv,) = torch.autograd.grad((gradient(True) * v).sum(), param)
        original, step = handle.get().clone(), 1e-2  # norms and routers compute in float32
        handle.set(original + step * v)
        plus = gradient()
        handle.set(original - step * v)
        minus = gradient()
        handle.set(original)
    want = (plus - minus) / (2 * step)
    assert (handle.view(hv) - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("family", ["llama4", "granitemoe_shared", "gpt_neox", "qwen3_next", "mamba"])
def test_families_beyond_the_promise(tiny_checkpoint, family):
    import transformers

    index = index_model(tiny_checkpoint(family))
    loaded = LoadedModel.open(index)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint(family), dtype=torch.float32
    ).eval()
    seen: dict[str, int] = {}
    with torch.no_grad(), loaded.capture(lambda key, x, *_: seen.__setitem__(key, len(x))):
        got = loaded.logits(IDS)
        torch.testing.assert_close(got, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    for u in index.units:
        if u.expert < 0 and u.role != "embed":
            assert seen[u.key] == IDS.numel(), u.key
    experts = [u for u in index.units if u.expert >= 0]
    layers = len({u.layer for u in experts})
    assert sum(seen.get(u.key, 0) for u in experts) == 3 * layers * index.top_k * IDS.numel()


TEXT = {"vocab_size": 300, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 24,
               "deepstack_visual_indexes": [0]}  # fmt: skip
WITH_PICTURES = {
    "Gemma3": (TEXT | {"sliding_window": 16}, VISION),
    "Llava": (TEXT | {"model_type": "llama"}, VISION | {"model_type": "clip_vision_model"}),
    "Qwen3VLMoe": (
        TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default"}},
        QWEN_VISION,
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_language_model_inside_a_multimodal_one(tmp_path, family):
    import transformers

    text, vision = WITH_PICTURES[family]
    config = getattr(transformers, f"{family}Config")(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    theirs.save_pretrained(tmp_path)
    index = index_model(tmp_path)
    assert index.n_layers == 2
    assert index.kv is not None
    assert not any("vis" in u.key for u in index.units)
    loaded = LoadedModel.open(index)
    with WeightReader(index) as reader:
        for u in index.units:
            assert torch.equal(loaded.handle(u.key).get(), reader.get(u)), u.key
    seen = set()
    with torch.no_grad(), loaded.capture(lambda key, *_: seen.add(key)):
        torch.testing.assert_close(loaded.logits(IDS), theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)
    assert {u.key for u in index.units if u.expert < 0 and u.role != "embed"} <= seen


def test_config_with_more_layers_than_weights(tiny_checkpoint, tmp_path):
    folder = edited(tiny_checkpoint("llama"), tmp_path / "m", config={"num_hidden_layers": 10**8})
    with pytest.raises(UserError, match="disagree about the layers"):
        LoadedModel.open(index_model(folder))


def test_names_without_their_prefix(tiny_checkpoint, tmp_path):
    """The hub's GPT-2 calls its tensors h.0..., newer files transformer.h.0...: the same model."""
    source = tiny_checkpoint("gpt2")
    state = {k.removeprefix("transformer."): v for k, v in load_file(source / "model.safetensors").items()}
    loaded = LoadedModel.open(index_model(edited(source, tmp_path / "m", state)))
    assert "h.1.attn.c_attn" in loaded.index.unit_keys()
    with torch.no_grad():
        assert torch.equal(loaded.logits(IDS), LoadedModel.open(index_model(source)).logits(IDS))


def test_stored_tied_head(tiny_checkpoint, tmp_path):
    source = tiny_checkpoint("llama_tied")
    state = load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    loaded = LoadedModel.open(index_model(edited(source, tmp_path / "m", state)))
    new = torch.randn(300, 24)
    with loaded.swapped({"model.embed_tokens": new}):
        assert torch.equal(loaded.model.lm_head.weight, new)


def test_custom_code_never_runs(tiny_checkpoint, tmp_path):
    canary = tmp_path / "canary"
    config = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, "trust_remote_code": True,
              "_attn_implementation": "evil/kernel", "_experts_implementation": "evil"}  # fmt: skip
    folder = edited(tiny_checkpoint("llama"), tmp_path / "m", config=config)
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    index = index_model(folder)
    assert any("auto_map" in note for note in index.notes)
    loaded = LoadedModel.open(index)
    assert loaded.tokenizer("a")["input_ids"]
    with torch.no_grad():
        assert torch.equal(
            loaded.logits(IDS), LoadedModel.open(index_model(tiny_checkpoint("llama"))).logits(IDS)
        )
    assert not canary.exists()


@pytest.mark.parametrize("model_type", ["never_heard_of", None, "clip", 7])
def test_unknown_architecture(tiny_checkpoint, tmp_path, model_type):
    index = index_model(edited(tiny_checkpoint("llama"), tmp_path / "m", config={"model_type": model_type}))
    assert len(index.units) == 16
    with pytest.raises(UserError, match="does not know the architecture") as caught:
        LoadedModel.open(index)
    assert "only the weights still work" in caught.value.fix


def test_tensor_missing_or_of_another_size(tiny_checkpoint, tmp_path):
    state = load_file(tiny_checkpoint("llama") / "model.safetensors")
    less = {k: v for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"}
    with pytest.raises(UserError, match=r"lacks 1 tensors.*layers\.1\.mlp\.up_proj"):
        LoadedModel.open(index_model(edited(tiny_checkpoint("llama"), tmp_path / "a", less)))
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(39, 24)
    with pytest.raises(UserError, match="do not fit|another shape"):
        LoadedModel.open(index_model(edited(tiny_checkpoint("llama"), tmp_path / "b", state)))


@pytest.mark.parametrize("config", [{"num_attention_heads": "many"}, {"hidden_act": "no_such_function"}])
def test_config_that_makes_no_model(tiny_checkpoint, tmp_path, config):
    with pytest.raises(UserError, match="config.json|do not fit"):
        LoadedModel.open(index_model(edited(tiny_checkpoint("llama"), tmp_path / "m", config=config)))


def test_tokenizer_missing(tiny_checkpoint, tmp_path):
    folder = edited(tiny_checkpoint("llama"), tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(UserError, match="tokenizer"):
        _ = LoadedModel.open(index_model(folder)).tokenizer


def test_handles_refuse_what_does_not_fit(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("llama")))
    with pytest.raises(UserError, match="no unit 'nope'"):
        loaded.handle("nope")
    before = loaded.handle("lm_head").get().clone()
    with pytest.raises(ValueError, match="not"), loaded.swapped({"lm_head": torch.zeros(2, 2)}):
        pass
    assert torch.equal(loaded.handle("lm_head").get(), before)
    with pytest.raises(RuntimeError, match="inside"), loaded.swapped({"lm_head": torch.zeros(300, 24)}):
        raise RuntimeError("inside")
    assert torch.equal(loaded.handle("lm_head").get(), before)


def test_free_gives_the_model_back(tiny_checkpoint):
    import weakref

    loaded = LoadedModel.open(index_model(tiny_checkpoint("llama")))
    model = weakref.ref(loaded.model)
    loaded.free()
    assert model() is None


def test_other_dtype(tiny_checkpoint):
    loaded = LoadedModel.open(index_model(tiny_checkpoint("qwen3_moe")), dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits = loaded.logits(IDS)
        exact = LoadedModel.open(index_model(tiny_checkpoint("qwen3_moe"))).logits(IDS)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact, atol=0.1, rtol=0.1)
