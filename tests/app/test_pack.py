from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation, ModelIndex
from bitatlas.analysis.verify import Verifier
from bitatlas.app.jobs.work import load_work
from bitatlas.app.work.pack import Packer, check_output, check_quantizer, pack_model
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import parse_format
from bitatlas.kernels.packed import load
from bitatlas.kernels.reference import quantize_dequantize

MIX = ("int2-g32", "int3-g64", "int4-g32-sym", "int5-channel", "int6-g128", "int8-g32", "bf16")
FAMILIES = ("llama", "llama_tied", "gemma3", "phi3", "gpt2", "opt", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
            "deepseek_v2", "deepseek_v3", "gpt_oss")  # fmt: skip


def allocate(index: ModelIndex, formats: tuple[str, ...] = MIX) -> Allocation:
    chosen = {u.key: formats[i % len(formats)] for i, u in enumerate(index.units)}
    payload = sum(parse_format(chosen[u.key]).payload_bytes(u.rows, u.cols) for u in index.units)
    return Allocation(
        index.digest, index.name, chosen, payload, index.kept_bytes, payload * 8 / index.params, solver="hand"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_the_model_with_quantised_weights(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    index = index_model(tiny_checkpoint(family))
    plan = allocate(index)
    result = pack_model(index, plan, tmp_path / "packed", shard_bytes=8_000)
    assert result["predicted_bytes"] == plan.weights_bytes
    packed = load(tmp_path / "packed")
    loaded = LoadedModel.open(index)
    weights = {}
    for u in index.units:
        weights[u.key] = quantize_dequantize(loaded.handle(u.key).get(), parse_format(plan.formats[u.key]))
    ids = torch.randint(1, 250, (2, 13), generator=torch.Generator().manual_seed(0))
    with loaded.swapped(weights), torch.no_grad():
        want = loaded.logits(ids)
        got = packed(ids).logits
    assert (want - got).abs().max() <= 1e-4
    assert (want - loaded.logits(ids)).abs().max() > 1e-3  # the formats did something


def test_it_generates_from_its_own_folder_alone(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3_moe"), source)
    index = index_model(source)
    pack_model(index, allocate(index), tmp_path / "packed")
    shutil.rmtree(source)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "packed")
    ids = tokenizer("To be", return_tensors="pt")["input_ids"]
    out = load(tmp_path / "packed").generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert 1 <= out.shape[1] - ids.shape[1] <= 4
    assert tokenizer.decode(out[0]).startswith("To be")
    again = Allocation.from_json((tmp_path / "packed" / "allocation.json").read_text())
    assert again.formats == allocate(index).formats


def test_a_step_is_a_shard_and_finished_ones_are_not_repeated(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_model(tiny_checkpoint("llama"))
    first = Packer(index, allocate(index), tmp_path / "packed", shard_bytes=6_000)
    assert len(first.plan()) > 2
    first.run("shard-00002")
    second = Packer(index, allocate(index), tmp_path / "packed", shard_bytes=6_000)
    seen: list[str] = []
    blocks = second._reader.blocks
    monkeypatch.setattr(
        second._reader, "blocks", lambda unit, **how: seen.append(unit.key) or blocks(unit, **how)
    )
    for key in second.plan():
        second.run(key)
    second.finish()
    assert sorted(seen) == sorted(u.key for u in second.manifest.units if u.shard != 1)


def test_wrong_input_writes_nothing(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    index, other = index_model(tiny_checkpoint("llama")), index_model(tiny_checkpoint("qwen2"))
    with pytest.raises(UserError, match="other weights"):
        Packer(index, allocate(other), tmp_path / "packed")
    with pytest.raises(UserError, match="no quantizer"):
        Packer(index, allocate(index), tmp_path / "packed", quantizer="magic")
    with pytest.raises(UserError, match="known: rtn"):
        check_quantizer("magic")
    check_quantizer("rtn")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    check_output(tmp_path / "mine")
    (tmp_path / "mine" / "a").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        check_output(tmp_path / "mine")


def test_a_weight_that_breaks_later_leaves_no_half_shard(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), source)
    index = index_model(source)
    packer = Packer(index, allocate(index), tmp_path / "packed", shard_bytes=6_000)
    packer.run("shard-00001")
    (source / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        packer.run("shard-00002")
    names = {f.name for f in (tmp_path / "packed").iterdir()}
    assert "packed-00001.safetensors" in names
    assert not any(n.endswith(".tmp") or n == "packed-00002.safetensors" for n in names)
    assert json.loads((tmp_path / "packed" / "bitatlas.json.partial").read_text())["quantizer"] == "rtn"


def test_an_imported_file_is_packed_from_the_folder_it_became(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = index_model(tiny_checkpoint("llama"))
    file = replace(folder, digest="d" * 40, path="/models/tiny.gguf", source="gguf")
    packer = Packer(file, allocate(file), tmp_path / "packed", source=folder)
    for key in packer.plan():
        packer.run(key)
    assert packer.finish()["predicted_bytes"] == allocate(file).weights_bytes
    load(tmp_path / "packed")


def test_the_job_goes_on_in_a_new_process(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    index = index_model(tiny_checkpoint("mixtral"))
    home = Home(tmp_path / "home")
    key = Store(home).put_allocation(allocate(index))
    params = {"model": index.path, "digest": index.digest, "allocation": key, "output": str(tmp_path / "packed"),
              "quantizer": "rtn"}  # fmt: skip
    for step in load_work("pack", params, home).plan():
        assert step in load_work("pack", params, home).run(step)["note"]
    result = load_work("pack", params, home).finish()
    json.dumps(result)
    load(result["folder"])
    with pytest.raises(UserError, match="changed since"):
        load_work("pack", params | {"digest": "0" * 40}, home).plan()


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_gptq_lowers_the_error_that_the_model_sees(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    index = index_model(tiny_checkpoint(family))
    tokens = np.random.default_rng(0).integers(1, 250, (32, 16))
    text = CalibrationSet.of(tokens)
    plan, want = allocate(index, ("int3-channel",)), LoadedModel.open(index).logits(torch.from_numpy(tokens))
    error = {}
    for quantizer in ("rtn", "gptq"):
        pack_model(
            index, plan, tmp_path / quantizer, quantizer=quantizer, calibration=text, shard_bytes=9_000
        )
        with torch.no_grad():
            got = load(tmp_path / quantizer)(torch.from_numpy(tokens)).logits
        error[quantizer] = (got - want).square().mean().item()
    assert error["gptq"] < 0.8 * error["rtn"]
    assert "calibration" in json.loads((tmp_path / "gptq" / "bitatlas.json").read_text())["model"]


@pytest.mark.parametrize("quantizer", ["awq", "gptq", "mse"])
@pytest.mark.parametrize("family", ["llama_tied", "qwen2_moe"])
def test_verify_judges_what_is_packed(
    quantizer: str, family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    index = index_model(tiny_checkpoint(family, dtype="bfloat16"))
    rng = np.random.default_rng(0)
    text, held_out = CalibrationSet.of(rng.integers(1, 250, (24, 16))), rng.integers(1, 250, (4, 16))
    plan = allocate(index, ("int3-g32", "int2-g32-sym", "int4-channel", "bf16"))
    # Several shards, stopped in the middle: what was found before is found again, not searched again.
    first = Packer(index, plan, tmp_path / "packed", quantizer=quantizer, calibration=text, shard_bytes=9_000)
    for key in first.plan()[:3]:
        first.run(key)
    second = Packer(
        index, plan, tmp_path / "packed", quantizer=quantizer, calibration=text, shard_bytes=9_000
    )
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "packed").glob("*.safetensors")}
    for key in second.plan():
        second.run(key)
    second.finish()
    assert before == {n: (tmp_path / "packed" / n).stat().st_mtime_ns for n in before}
    packed, loaded = load(tmp_path / "packed"), LoadedModel.open(index)
    (planned, shipped) = Verifier(
        loaded, index, held_out, {"plan": plan.formats}, quantizer=quantizer, calibration=text.tokens,
        packed={"packed": lambda ids: packed(ids).logits},
    ).results_now().values()  # fmt: skip
    assert shipped.kl_mean == pytest.approx(planned.kl_mean, rel=1e-3)
    assert planned.kl_mean > 1e-4


def test_gptq_without_text_says_so(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    index = index_model(tiny_checkpoint("llama"))
    with pytest.raises(UserError, match="calibration text"):
        Packer(index, allocate(index), tmp_path / "packed", quantizer="gptq")
    assert not (tmp_path / "packed").exists()


def test_a_huge_unit_is_packed_block_by_block(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitatlas.analysis import weights
    from bitatlas.app.work import pack

    index = index_model(tiny_checkpoint("llama", vocab_size=300))
    plan = allocate(index)
    pack_model(index, plan, tmp_path / "whole")
    monkeypatch.setattr(pack, "WHOLE", 1)
    monkeypatch.setattr(weights, "BLOCK", 1)
    monkeypatch.setattr(weights.WeightReader, "get", None)
    pack_model(index, plan, tmp_path / "blocks")
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "blocks" / file.name).read_bytes() == file.read_bytes(), file.name
