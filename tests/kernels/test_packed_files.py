from __future__ import annotations

import errno
import json
import os
import struct
from pathlib import Path

import packed_models as models
import pytest
import torch
from safetensors import safe_open

from bitatlas.kernels.errors import UserError
from bitatlas.kernels.packed import load, shards
from bitatlas.kernels.packed.manifest import MANIFEST, PARTIAL, Manifest, PackedKept, PackedUnit, plan_shards
from bitatlas.kernels.packed.shards import ShardReader, TensorSpec, write_shard


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    models.build("llama", folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def packing(checkpoint: Path) -> models.Packing:
    return models.Packing(checkpoint, "llama")


def test_size_on_disk_is_the_prediction_and_safetensors_reads_it(checkpoint: Path, tmp_path: Path) -> None:
    p = packing(checkpoint)
    out = p.write(tmp_path / "packed")
    m = Manifest.read(out)
    assert m == p.manifest
    data = 0
    for i in range(len(m.shards)):
        with ShardReader(out / f"packed-{i + 1:05d}.safetensors") as r:
            data += r.path.stat().st_size - r.start
            assert all(begin % spec.dtype.itemsize == 0 for spec, begin in r.tensors.values())
        with safe_open(out / f"packed-{i + 1:05d}.safetensors", "pt") as f:
            for name in f.keys():  # noqa: SIM118
                with ShardReader(out / f"packed-{i + 1:05d}.safetensors") as r:
                    assert torch.equal(r.read(name), f.get_tensor(name))
    assert data == m.payload_bytes + m.kept_bytes
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not [f.name for f in out.iterdir() if f.name.endswith((".tmp", ".partial"))]


def test_manifest_round_trips(checkpoint: Path) -> None:
    m = packing(checkpoint).manifest
    assert Manifest.from_json(m.to_json()) == m
    empty = Manifest((), (), (0,))
    assert Manifest.from_json(empty.to_json()) == empty


def test_large_tensors_get_a_shard_of_their_own() -> None:
    units = [PackedUnit(f"u{i}", "t", n, 32, "int8-g32-sym") for i, n in enumerate((1, 100, 1, 1))]
    placed, _, sizes = plan_shards(units, [PackedKept("k", (2,), "F32", 8)], 100)
    assert [u.shard for u in placed] == [0, 1, 2, 2]
    assert sizes == (8 + 34, 3400, 68)


class Killed(BaseException):
    pass


def test_a_killed_packing_goes_on_without_repeating(checkpoint: Path, tmp_path: Path) -> None:
    first, out = packing(checkpoint), tmp_path / "packed"
    writer = first.writer(out)
    assert len(writer.pending()) > 3
    writer.write(0, first.pack, lambda k: first.tensors[k.name])
    with pytest.raises(ValueError, match="missing"):
        writer.finish()

    def die(unit: PackedUnit) -> dict[str, torch.Tensor]:
        raise Killed

    number = first.manifest.units[-1].shard
    with pytest.raises(Killed):
        writer.write(number, die, lambda k: first.tensors[k.name])
    # kill -9 runs no cleanup, so it may also leave a .tmp file
    (out / "packed-00002.safetensors.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="not packed to the end"):
        load(out)

    second = packing(checkpoint)
    second.write(out)
    assert sorted(second.packed) == sorted(u.key for u in first.manifest.units if u.shard != 0)
    whole = packing(checkpoint).write(tmp_path / "whole")
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {
        f.name: f.read_bytes() for f in whole.iterdir()
    }
    third = packing(checkpoint)
    third.write(out)  # all there: nothing to do
    assert third.packed == []


def test_a_damaged_shard_is_packed_again(checkpoint: Path, tmp_path: Path) -> None:
    p, out = packing(checkpoint), tmp_path / "packed"
    p.write(out)
    (out / MANIFEST).rename(out / PARTIAL)
    shard = out / "packed-00002.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    again = packing(checkpoint)
    assert again.writer(out).pending() == [1]
    again.write(out)
    load(out)


def test_other_peoples_folders_are_left_alone(checkpoint: Path, tmp_path: Path) -> None:
    p = packing(checkpoint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="not an empty folder"):
        p.writer(tmp_path / "mine")
    assert [f.name for f in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    p.write(tmp_path / "packed")
    other = models.Packing(checkpoint, "llama", ("int8-g32",))
    with pytest.raises(UserError, match="another packed model"):
        other.writer(tmp_path / "packed")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        p.writer(tmp_path / "file")


def test_too_small_a_disk_is_seen_before_the_first_byte(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(shards.os, "statvfs", os.statvfs)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 1000})())
    with pytest.raises(UserError, match="too small"):
        packing(checkpoint).writer(tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_a_disk_that_fills_up_leaves_nothing_half_written(
    checkpoint: Path, tmp_path: Path, monkeypatch
) -> None:
    p, out = packing(checkpoint), tmp_path / "packed"
    writer = p.writer(out)
    writer.write(0, p.pack, lambda k: p.tensors[k.name])

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(f.name for f in out.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(shards.os, "posix_fallocate", full)
        with pytest.raises(UserError, match="disk is full"):
            writer.write(1, p.pack, lambda k: p.tensors[k.name])
    assert sorted(f.name for f in out.iterdir()) == before
    p.write(out)
    load(out)


def test_writing_checks_what_it_is_given(tmp_path: Path) -> None:
    spec = TensorSpec("a", torch.float32, (2, 3))
    for bad in ([], [("a", torch.zeros(3, 2))], [("a", torch.zeros(2, 3, dtype=torch.int32))]):
        with pytest.raises(ValueError):
            write_shard(tmp_path / "s", [spec], bad)
    with pytest.raises(KeyError):
        write_shard(tmp_path / "s", [spec], [("b", torch.zeros(2, 3))])
    assert list(tmp_path.iterdir()) == []


def header(table: object, data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 7,
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 4) + b"nope",
        header([]),
        header({"a": F32}),
        header({"a": F32}, b"\0" * 9),
        header({"a": F32 | {"data_offsets": [4, 12]}}, b"\0" * 12),
        header({"a": F32, "b": F32}, b"\0" * 8),
        header({"a": F32 | {"dtype": "PICKLE"}}, b"\0" * 8),
        header({"a": F32 | {"shape": [-2]}}, b"\0" * 8),
        header({"a": F32 | {"shape": [1 << 62, 4]}}, b"\0" * 8),
        header({"a": F32 | {"extra": 1}}, b"\0" * 8),
        header({"a": "x"}, b"\0" * 8),
    ],
)
def test_unsound_shards_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(content)
    with pytest.raises(UserError, match="not a sound"):
        ShardReader(tmp_path / "s")


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d | {"schema": "bitatlas/packed/2"},
        lambda d: d | {"surprise": 1},
        lambda d: {k: v for k, v in d.items() if k != "kept"},
        lambda d: d | {"payload_bytes": d["payload_bytes"] + 1},
        lambda d: d | {"units": d["units"][1:]},
        lambda d: d | {"units": [*d["units"], d["units"][0]]},
        lambda d: d | {"units": [d["units"][0] | {"format": "int9-g64"}, *d["units"][1:]]},
        lambda d: d | {"units": [d["units"][0] | {"rows": -1}, *d["units"][1:]]},
        lambda d: d | {"units": [d["units"][0] | {"rows": True}, *d["units"][1:]]},
        lambda d: d | {"units": [d["units"][0] | {"shard": 10**6}, *d["units"][1:]]},
        lambda d: d | {"units": [d["units"][0] | {"code": "x"}, *d["units"][1:]]},
        lambda d: d | {"units": "none"},
        lambda d: d | {"model": {"name": 1}},
        lambda d: d | {"shards": [d["shards"][0] | {"file": "../../etc/passwd"}, *d["shards"][1:]]},
    ],
)
def test_damaged_manifests_are_refused(damage, checkpoint: Path) -> None:
    data = json.loads(packing(checkpoint).manifest.to_json())
    with pytest.raises(UserError, match="damaged"):
        Manifest.from_json(json.dumps(damage(data)))


def test_what_is_not_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a packed checkpoint"):
        load(tmp_path)
    (tmp_path / MANIFEST).write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    with pytest.raises(UserError, match="damaged"):
        load(tmp_path)


def test_a_shard_that_is_not_what_the_manifest_says(checkpoint: Path, tmp_path: Path) -> None:
    out = packing(checkpoint).write(tmp_path / "packed")
    a, b = out / "packed-00001.safetensors", out / "packed-00002.safetensors"
    a.write_bytes(b.read_bytes())
    with pytest.raises(UserError, match="differ from the manifest"):
        load(out)
    a.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        load(out)
