"""Checkpoint folders: sharded, linked and odd ones are read; what leads outside or runs code is refused unopened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from bitatlas.analysis.checkpoint import CheckpointFiles, sanitized
from bitatlas.kernels.errors import UserError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    """Two shards with an index."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"a.weight": torch.ones(4, 3)}, folder / "one.safetensors")
    save_file({"b.weight": torch.ones(2, 3), "c": torch.ones(2)}, folder / "two.safetensors")
    write_index(
        folder, {"a.weight": "one.safetensors", "b.weight": "two.safetensors", "c": "two.safetensors"}
    )
    return folder


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(sharded):
    files = CheckpointFiles.open(sharded)
    assert {name: shard for name, (shard, _) in files.tensors.items()} == {
        "a.weight": "one.safetensors", "b.weight": "two.safetensors", "c": "two.safetensors",
    }  # fmt: skip
    assert files.notes == ()


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/one.safetensors", "..", "", ".safetensors",
     "C:\\x.safetensors", "one.bin", "a\nb.safetensors", 7, None, ["one.safetensors"]],
)  # fmt: skip
def test_index_leading_outside_opens_nothing(sharded, name):
    save_file({"a.weight": torch.ones(4, 3)}, sharded.parent / "outside.safetensors")
    write_index(sharded, {"a.weight": name, "b.weight": "two.safetensors", "c": "two.safetensors"})
    opened = []
    watching = [True]

    def hook(event, args):
        if watching and event == "open":
            opened.append(str(args[0]))

    sys.addaudithook(hook)
    with pytest.raises(UserError, match="plain file name"):
        CheckpointFiles.open(sharded)
    watching.clear()
    assert not [p for p in opened if p.endswith((".safetensors", "passwd", ".bin"))]


def test_key_missing_from_its_shard(sharded):
    write_index(
        sharded, {"a.weight": "two.safetensors", "b.weight": "two.safetensors", "c": "two.safetensors"}
    )
    with pytest.raises(UserError, match=r"a\.weight.*not in two"):
        CheckpointFiles.open(sharded)


def test_key_missing_from_the_index(sharded):
    write_index(sharded, {"a.weight": "one.safetensors", "b.weight": "two.safetensors"})
    with pytest.raises(UserError, match="not in the index.*'c'"):
        CheckpointFiles.open(sharded)


def test_key_in_two_shards(sharded):
    save_file(
        {"a.weight": torch.ones(4, 3), "b.weight": torch.ones(2, 3), "c": torch.ones(2)},
        sharded / "two.safetensors",
    )
    with pytest.raises(UserError, match=r"a\.weight.*two shards"):
        CheckpointFiles.open(sharded)


def test_missing_shard(sharded):
    (sharded / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"two\.safetensors is missing"):
        CheckpointFiles.open(sharded)


def test_truncated_shard(sharded):
    path = sharded / "two.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=r"two\.safetensors is truncated"):
        CheckpointFiles.open(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}', "[" * 100_000])
def test_malformed_index(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(UserError, match="index.json"):
        CheckpointFiles.open(sharded)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "\x00", '{"a":' * 50_000])
def test_malformed_config(sharded, text):
    (sharded / "config.json").unlink()
    if text is not None:
        (sharded / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        CheckpointFiles.open(sharded)


def test_config_of_ten_megabytes(sharded):
    (sharded / "config.json").write_text('{"a": "' + "x" * (10 << 20) + '"}')
    with pytest.raises(UserError, match="too large"):
        CheckpointFiles.open(sharded)


def test_fifo_as_shard_does_not_block(sharded):
    (sharded / "one.safetensors").unlink()
    os.mkfifo(sharded / "one.safetensors")
    with pytest.raises(UserError, match="not a regular file"):
        CheckpointFiles.open(sharded)


def test_link_out_of_the_folder(sharded):
    outside = sharded.parent / "elsewhere.safetensors"
    shutil.move(sharded / "one.safetensors", outside)
    (sharded / "one.safetensors").symlink_to(outside)
    with pytest.raises(UserError, match="leaves the checkpoint folder"):
        CheckpointFiles.open(sharded)


def test_hub_cache_links_are_inside(sharded, tmp_path):
    repo = tmp_path / "models--a--b"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, repo / "blobs" / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    assert len(CheckpointFiles.open(snapshot).tensors) == 3
    # The same link out of another repository's snapshot is not.
    other = tmp_path / "models--evil--b" / "snapshots" / "0123abcd"
    shutil.copytree(sharded, other)
    (other / "one.safetensors").unlink()
    (other / "one.safetensors").symlink_to(repo / "blobs" / "blob2")
    with pytest.raises(UserError, match="leaves"):
        CheckpointFiles.open(other)


class _Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_not_opened(tmp_path, name):
    canary = tmp_path / "canary"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / name).write_bytes(pickle.dumps(_Payload(str(canary))))
    with pytest.raises(UserError, match="pickles") as caught:
        CheckpointFiles.open(folder)
    assert "safetensors" in caught.value.fix
    assert name in caught.value.found
    assert not canary.exists()


def test_pickles_beside_safetensors_are_left_alone(sharded):
    (sharded / "pytorch_model.bin").write_bytes(b"junk")
    assert any("pytorch_model.bin" in note for note in CheckpointFiles.open(sharded).notes)


def test_nothing_usable(tmp_path):
    with pytest.raises(UserError, match="no checkpoint folder"):
        CheckpointFiles.open(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no safetensors"):
        CheckpointFiles.open(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        CheckpointFiles.open(tmp_path)
    assert "x.gguf" in caught.value.fix


def test_shards_without_an_index(sharded):
    (sharded / INDEX).unlink()
    with pytest.raises(UserError, match="2 shards but no"):
        CheckpointFiles.open(sharded)
    (sharded / "two.safetensors").unlink()
    assert list(CheckpointFiles.open(sharded).tensors) == ["a.weight"]


def test_custom_code_is_noted_and_dropped(sharded):
    config = {"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"},
              "text_config": {"auto_map": {}, "_attn_implementation": "evil/kernel", "hidden_size": 4}}  # fmt: skip
    (sharded / "config.json").write_text(json.dumps(config))
    (sharded / "evil.py").write_text("raise SystemExit('ran')")
    files = CheckpointFiles.open(sharded)
    assert any("auto_map" in note for note in files.notes)
    assert sanitized(files.config) == {"model_type": "llama", "text_config": {"hidden_size": 4}}
    assert files.text_config["hidden_size"] == 4
