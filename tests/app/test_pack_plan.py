"""Shards are small enough to show progress, and a packing that was begun with others goes on with those."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation
from bitatlas.app.work import pack_plan
from bitatlas.app.work.pack import Packer, pack_model
from bitatlas.app.work.pack_plan import SHARD_BYTES, plan_packing, shard_size
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packed.manifest import Manifest
from bitatlas.kernels.packed.shards import ShardReader


def planned(folder: Path, name: str = "int3-g32") -> tuple:
    index = index_model(folder)
    return index, Allocation(index.digest, index.name, dict.fromkeys(index.unit_keys(), name), 1, 1, 3.0)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for path in sorted(folder.glob("packed-*.safetensors")):
        with ShardReader(path) as shard:
            out |= {name: shard.read(name) for name in shard.tensors}
    return out


def test_a_shard_is_about_a_32nd(
    tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert shard_size(64 << 20) == 2 << 20
    assert shard_size(1 << 40) == SHARD_BYTES
    assert shard_size(1000) == 64 << 10
    monkeypatch.setattr(pack_plan, "_LEAST", 1)
    index, plan = planned(tiny_checkpoint("qwen3_moe"))
    manifest = plan_packing(index, plan.formats, quantizer="rtn", model={})
    total = manifest.payload_bytes + manifest.kept_bytes
    largest = max(t.nbytes for t in (*manifest.units, *manifest.kept))
    assert 12 <= len(manifest.shards) <= 64
    assert max(manifest.shards) <= max(total / 32, largest)


@pytest.mark.parametrize("quantizer", ["gptq", "awq"])
def test_small_shards_hold_the_same_and_cost_no_more_passes(
    quantizer: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    index, plan = planned(tiny_checkpoint("llama"))
    text = CalibrationSet.of(np.random.default_rng(0).integers(1, 250, (8, 16)))
    passes = []
    for name, size in (("one", 1 << 30), ("many", 4_000)):
        packer = Packer(index, plan, tmp_path / name, quantizer=quantizer, calibration=text, shard_bytes=size)
        for key in packer.plan():
            packer.run(key)
        packer.finish()
        passes.append(packer._unit_quantizer.source.passes)
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert len(list((tmp_path / "many").glob("packed-*"))) > 4
    assert one.keys() == many.keys()
    assert all(torch.equal(one[n].view(torch.uint8), many[n].view(torch.uint8)) for n in one)
    assert passes == [1, 1]


def test_a_folder_begun_with_other_shards_goes_on_with_them(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    index, plan = planned(tiny_checkpoint("llama"))
    out = tmp_path / "packed"
    first = Packer(index, plan, out, shard_bytes=6_000)
    first.run("shard-00001")
    before = (out / "packed-00001.safetensors").stat()
    again = Packer(index, plan, out)
    assert again.plan() == first.plan()
    pack_model(index, plan, out)
    after = (out / "packed-00001.safetensors").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert Manifest.read(out) == first.manifest
    assert pack_model(index, plan, out)["shards"] == len(first.plan())  # finished: nothing to do
    with pytest.raises(UserError, match="holds another packed model"):
        pack_model(*planned(tiny_checkpoint("llama"), "int4-g32"), out)
