"""What we write, read by the engines' own code: logits and weights compared with ours. Skipped, with a reason, without them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import FORMATS
from bitatlas.app.targets import REJECTED, SERVABLE, TARGETS
from bitatlas.app.targets.mlx import mlx_name
from bitatlas.kernels.reference import quantize_dequantize

pytestmark = pytest.mark.slow  # a minute of other people's imports


def wide(family: str) -> dict[str, object]:
    out: dict[str, object] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    return out | ({"moe_intermediate_size": 32} if family.endswith("_moe") else {})


def our_logits(index, formats: dict[str, str], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits of the original, logits of the allocation)."""
    ours = LoadedModel.open(index)
    weights = {
        u: quantize_dequantize(ours.handle(u).get(), FORMATS[f]) for u, f in formats.items() if f != "bf16"
    }
    with torch.no_grad(), ours.swapped(weights):
        want = ours.logits(ids)
    with torch.no_grad():
        return ours.logits(ids), want


MLX = """
import sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_lm.utils import load_model
folder, ids, out = sys.argv[1:]
model, _ = load_model(Path(folder))
np.save(out, np.array(model(mx.array(np.load(ids))).astype(mx.float32)))
"""


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "mixtral"])
def test_mlx_computes_our_logits(
    family: str, tiny_checkpoint, allocate, tmp_path: Path, client: Callable[..., str]
) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}} if family == "llama" else {}
    index = index_model(tiny_checkpoint(family, **wide(family), **rope))
    palette = ["int4-g32", "int3-g32-sym", "int8-g32", "int2-g32", "bf16", "int5-g32", "int6-g32-sym"]
    stacks: dict[str, str] = {}
    formats = {u.key: stacks.setdefault(mlx_name(u), palette[len(stacks) % 7]) for u in index.units}
    target, plan = TARGETS["mlx"], allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    files = target.write_weights(plan, index, tmp_path / "out")
    assert not [f for f in files if f.suffix == ".tmp"]
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    client("mlx", "mlx_lm", MLX, tmp_path / "out", tmp_path / "ids.npy", tmp_path / "logits.npy")
    plain, want = our_logits(index, formats, ids)
    error = (torch.from_numpy(np.load(tmp_path / "logits.npy")) - want).abs().max()
    assert error <= 0.01 * (plain - want).abs().max()


LLAMA_CPP = """
import sys
import numpy as np
from llama_cpp import Llama
file, ids, out = sys.argv[1:]
rows = np.load(ids)
model = Llama(model_path=file, n_ctx=64, n_batch=64, n_threads=1, logits_all=True, verbose=False)
found = []
for row in rows:
    model.reset()
    model.eval(row.tolist())
    found.append(np.array(model.scores[: len(row)]))
np.save(out, np.stack(found))
"""


@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen3"])
def test_llama_cpp_computes_our_logits(
    family: str, tiny_checkpoint, allocate, tmp_path: Path, client: Callable[..., str]
) -> None:
    index = index_model(tiny_checkpoint(family, **wide(family)))
    palette = ["int4-g32-sym", "int5-g32", "int8-g32-sym", "mxfp4", "int4-g32", "bf16", "int5-g32-sym"]
    formats = {u.key: palette[i % 7] for i, u in enumerate(index.units)}
    target, plan = TARGETS["llama.cpp"], allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    [file] = target.write_weights(plan, index, tmp_path)
    ids = torch.randint(1, 200, (2, 9), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    client("llamacpp", "llama_cpp", LLAMA_CPP, file, tmp_path / "ids.npy", tmp_path / "logits.npy")
    plain, want = our_logits(index, formats, ids)
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    # It rounds the inputs of every product to 8 bits; what quantising the weights does is many times that.
    assert (found - want).square().mean() <= 0.05 * (plain - want).square().mean()


AUTO_ROUND = """
import json, sys
import torch
from auto_round.compressors.utils import set_layer_config
from auto_round.utils import SUPPORTED_DTYPES, SUPPORTED_LAYER_TYPES, INNER_SUPPORTED_LAYER_TYPES
from transformers import AutoModelForCausalLM
folder, config, base = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder)
found, _, _ = set_layer_config(model, json.load(open(config)), "W4A16", torch.float16, SUPPORTED_LAYER_TYPES,
                               INNER_SUPPORTED_LAYER_TYPES, quant_lm_head=True)
print(json.dumps({k: {a: v.get(a) for a in ("bits", "group_size", "sym", "data_type")} for k, v in found.items()}))
"""


def dense_mix(index) -> dict[str, str]:
    """Layers differ, the last is left alone."""
    each = ("int4-g32-sym", "int3-g32", "int8-channel-sym")
    return {
        u.key: "bf16"
        if u.role in ("embed", "head") or (u.layer, u.role) == (1, "down")
        else each[u.layer % 3]
        for u in index.units
    }


def test_auto_round_reads_our_layer_config(
    tiny_checkpoint, allocate, tmp_path: Path, client: Callable[..., str]
) -> None:
    folder = tiny_checkpoint("llama", **wide("llama"))
    index = index_model(folder)
    formats = dense_mix(index)
    target, plan = TARGETS["auto-round"], allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    config = tmp_path / "layer_config.json"
    config.write_text(target.render(plan, index)["layer_config.json"])
    found = json.loads(client("autoround", "auto_round", AUTO_ROUND, folder, config, "").splitlines()[-1])
    for u in index.units:
        fmt, got = FORMATS[formats[u.key]], found.get(u.key)
        if fmt.kind == "float":
            assert got is None or got["bits"] >= 16
        else:
            assert (got["bits"], got["group_size"], got["sym"]) == (
                fmt.bits,
                fmt.group_size or -1,
                fmt.symmetric,
            )


def test_auto_round_refuses_eight_bits_with_zero_points_as_check_says(
    tiny_checkpoint, allocate, tmp_path: Path, client: Callable[..., str]
) -> None:
    folder = tiny_checkpoint("llama", **wide("llama"))
    index = index_model(folder)
    target, plan = TARGETS["auto-round"], allocate(index, "int8-g32")
    verdict = target.check(plan, index)
    assert verdict.status == REJECTED
    assert set(verdict.changes.values()) == {"int8-g32-sym"}
    config = tmp_path / "layer_config.json"
    config.write_text(target.render(plan, index)["layer_config.json"])
    with pytest.raises(AssertionError, match="8-bit asymmetric"):
        client("autoround", "auto_round", AUTO_ROUND, folder, config, "")


GPTQ = """
import json, sys
from gptqmodel import QuantizeConfig
config = QuantizeConfig(**json.load(open(sys.argv[1])))
base = {"bits": config.bits, "group_size": config.group_size, "sym": config.sym}
print(json.dumps({n: config.dynamic_get(n) is not False and {k: config.dynamic_get(n, k, v) for k, v in base.items()}
                  for n in json.load(open(sys.argv[2]))}))
"""


def test_gptqmodel_reads_our_rules(make_index, allocate, tmp_path: Path, client: Callable[..., str]) -> None:
    target, index = TARGETS["gptqmodel"], make_index("qwen3_moe", layers=12, experts=2)
    each = ("int4-g64-sym", "int8-g64-sym", "bf16", "int3-g64-sym")
    formats = {u.key: each[u.layer % 4] if u.layer >= 0 else "bf16" for u in index.units}
    plan = allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE
    (tmp_path / "config.json").write_text(target.render(plan, index)["quantize_config.json"])
    inside = [u for u in index.units if u.layer >= 0]
    (tmp_path / "names.json").write_text(json.dumps([u.key for u in inside]))
    out = client("gptqmodel", "gptqmodel", GPTQ, tmp_path / "config.json", tmp_path / "names.json")
    found = json.loads(out.splitlines()[-1])
    for u in inside:
        fmt = FORMATS[formats[u.key]]
        want = (
            False
            if fmt.kind == "float"
            else {"bits": fmt.bits, "group_size": fmt.group_size, "sym": fmt.symmetric}
        )
        assert found[u.key] == want, u.key


TORCHAO = """
import os, sys
import numpy as np, torch
folder, files, ids, out = sys.argv[1:]
os.chdir(files)
sys.path.insert(0, files)
from quantize import fqn_to_config
from transformers import AutoModelForCausalLM, TorchAoConfig
config = TorchAoConfig(fqn_to_config("fqn_to_config.json"))
assert TorchAoConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
state = {n: m.weight.dequantize().numpy() if hasattr(m.weight, "dequantize") and not m.weight.__class__.__name__ == "Parameter"
         else m.weight.detach().numpy() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
with torch.no_grad():
    np.savez(out, logits=model(torch.from_numpy(np.load(ids))).logits.numpy(), **state)
"""


def test_torchao_quantises_what_we_name_as_we_name_it(
    tiny_checkpoint, allocate, tmp_path: Path, client: Callable[..., str]
) -> None:
    folder = tiny_checkpoint("llama", **wide("llama"))
    index = index_model(folder)
    eight = {"gate": "fp8-channel", "up": "fp8-tensor"}
    formats = dense_mix(index) | {u.key: eight[u.role] for u in index.units if u.role in eight}
    target, plan = TARGETS["torchao"], allocate(index, formats)
    assert target.check(plan, index).status == SERVABLE, target.check(plan, index).findings
    for name, text in target.render(plan, index).items():
        (tmp_path / name).write_text(text)
    np.save(tmp_path / "ids.npy", np.arange(1, 19).reshape(2, 9))
    client("torchao", "torchao", TORCHAO, folder, tmp_path, tmp_path / "ids.npy", tmp_path / "out.npz")
    got, ours = np.load(tmp_path / "out.npz"), LoadedModel.open(index)
    for u in index.units:
        if u.role == "embed":
            continue
        weight, fmt = ours.handle(u.key).get(), FORMATS[formats[u.key]]
        theirs = torch.from_numpy(got[u.key])
        if fmt.kind == "float":
            assert torch.equal(theirs, weight)
            continue
        error, want = theirs - weight, quantize_dequantize(weight, fmt) - weight
        if fmt.codebook:
            # Their scales are float32, ours float16: where a weight lies between two codes they may part, nowhere else.
            assert 0.98 < error.norm() / want.norm() < 1.02, u.key
            assert ((error - want).abs() <= weight.abs() / 8 + 1e-6).all(), u.key
            continue
        assert 0.6 < error.norm() / want.norm() < 1.5, u.key  # another width or group would be off by two
