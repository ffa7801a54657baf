"""Bad input through the command line: one clear error, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation

Cli = Callable[..., Any]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("llama"), folder)
    return folder


def shard(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


def truncate(folder: Path) -> None:
    path = shard(folder)
    path.write_bytes(path.read_bytes()[:-100])


def header_bomb(folder: Path) -> None:
    shard(folder).write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def overlap(folder: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        a, b = [v for k, v in header.items() if k != "__metadata__"][:2]
        b["data_offsets"] = [
            a["data_offsets"][0],
            a["data_offsets"][0] + b["data_offsets"][1] - b["data_offsets"][0],
        ]

    rewrite_header(shard(folder), change)


def outside(folder: Path) -> None:
    name = next(k for k in load_file(shard(folder)))
    shard(folder).rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {name: "../../etc/passwd.safetensors"}})
    )


def missing_shard(folder: Path) -> None:
    names = list(load_file(shard(folder)))
    shard(folder).rename(folder / "model-00001-of-00009.safetensors")
    weight_map = {n: shard(folder).name for n in names} | {names[0]: "model-00009-of-00009.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def pickle_only(folder: Path) -> None:
    shard(folder).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "word"),
    [(truncate, ""), (header_bomb, "header"), (overlap, "overlap"), (outside, "not a plain file name"), (missing_shard, "model-00009"),
     (pickle_only, "pickle"), (no_config, "config.json")],
    ids=lambda f: getattr(f, "__name__", ""),
)  # fmt: skip
def test_damaged_checkpoints(
    cli: Cli, checkpoint: Path, damage: Callable[[Path], None], word: str, home: Path
):
    damage(checkpoint)
    before = sorted(p.name for p in checkpoint.iterdir())
    error = cli("scan", checkpoint, code=2)
    assert word in " ".join(error.values())
    cli("measure", checkpoint, "--metric", "weight_error", "--wait", code=2)
    assert sorted(p.name for p in checkpoint.iterdir()) == before
    assert not list(home.rglob("*.tmp"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(cli: Cli, checkpoint: Path, value: float):
    tensors = load_file(shard(checkpoint))
    name = next(n for n in tensors if "q_proj" in n)
    tensors[name] = tensors[name].copy()
    tensors[name][0, 0] = value
    save_file(tensors, shard(checkpoint), metadata={"format": "pt"})
    error = cli("measure", checkpoint, "--metric", "weight_error", "--formats", "int4-g64", "--wait", code=2)
    assert name in " ".join(error.values())


def test_unknown_architecture_still_gives_what_needs_weights_only(cli: Cli, checkpoint: Path, text: Path):
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"], config["model_type"] = ["NoSuchForCausalLM"], "no_such"
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert cli("scan", checkpoint)["units"] > 0
    assert (
        cli("measure", checkpoint, "--metric", "weight_error", "--formats", "int4-g64", "--wait")["state"]
        == "done"
    )
    error = cli("measure", checkpoint, "--metric", "activation_error", "--formats", "int4-g64", "--calibration", text,
                "--tokens", 64, "--seq-len", 32, "--wait", code=2)  # fmt: skip
    assert "no_such" in " ".join(error.values()) or "NoSuch" in " ".join(error.values())


def measure(cli: Cli, model: Path, calibration: Path, code: int = 0) -> Any:
    return cli("measure", model, "--metric", "activation_error", "--formats", "int2-g64,int4-g64", "--calibration", calibration,
               "--tokens", 64, "--seq-len", 32, "--wait", code=code)  # fmt: skip


def test_calibration_files(cli: Cli, checkpoint: Path, tmp_path: Path):
    assert "no such" in measure(cli, checkpoint, tmp_path / "absent.txt", code=2)["error"]
    (tmp_path / "short.txt").write_text("three words only")
    assert "too short" in measure(cli, checkpoint, tmp_path / "short.txt", code=2)["error"]
    (tmp_path / "binary.txt").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 50)
    assert measure(cli, checkpoint, tmp_path / "binary.txt", code=2)["error"]


@pytest.fixture(scope="module")
def measured(home: Path, tiny_checkpoint: Callable[..., Path]) -> Path:
    from bitatlas.app import tasks

    model = tiny_checkpoint("llama")
    tasks.measure(model, "weight_error", formats="int2-g64,int4-g64", wait=True)
    return model


def solve(cli: Cli, model: Path, *words: object, code: int = 0) -> Any:
    return cli(
        "solve", model, "--metric", "weight_error", "--formats", "int2-g64,int4-g64", *words, code=code
    )


def test_impossible_budget_names_the_smallest(cli: Cli, measured: Path, tmp_path: Path):
    out = tmp_path / "plan.json"
    error = solve(cli, measured, "--bits", 0.5, "-o", out, code=2)
    index = index_model(measured)
    from bitatlas.kernels.formats import parse_format

    smallest = int(index.bytes_table([parse_format("int2-g64")]).sum())
    assert str(smallest) in error["found"]
    assert not out.exists()
    assert solve(cli, measured, "--bytes", smallest + index.kept_bytes)["payload_bytes"] == smallest


def test_pins_and_budgets_that_cannot_be(cli: Cli, measured: Path):
    assert (
        "matches no unit"
        in solve(cli, measured, "--bits", 4, "--pin", "nothing_like_it=int4-g64", code=2)["error"]
    )
    assert "regular expression" in solve(cli, measured, "--bits", 4, "--pin", "(=int4-g64", code=2)["error"]
    assert "one budget" in solve(cli, measured, "--bits", 4, "--bytes", "1MB", code=2)["error"]
    assert "one budget" in solve(cli, measured, code=2)["error"]
    assert "not a size" in solve(cli, measured, "--bytes", "lots", code=2)["error"]
    assert "nothing is left" in solve(cli, measured, "--fit", "1KiB", "--context", 4096, code=2)["error"]
    assert cli("solve", measured, "--metric", "never_measured", "--bits", 4, code=2)["fix"]


def test_allocation_for_another_model(
    cli: Cli, measured: Path, tiny_checkpoint: Callable[..., Path], tmp_path: Path, text: Path
):
    plan = tmp_path / "plan.json"
    solve(cli, measured, "--bits", 4, "-o", plan)
    other = tiny_checkpoint("qwen3_moe")
    assert "another model" in cli("verify", other, plan, "--text", text, code=2)["error"]
    assert "another model" in cli("pack", other, plan, "-o", tmp_path / "packed", code=2)["error"]
    assert not (tmp_path / "packed").exists()
    allocation = Allocation.from_json(plan.read_text())
    plan.write_text(replace(allocation, model_digest="0" * 64).to_json())
    assert "other weights" in cli("pack", measured, plan, "-o", tmp_path / "packed", code=2)["error"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema": "other"}', '{"schema": "bitatlas/allocation/1", "surprise": 1}']
)
def test_allocation_files_that_are_none(cli: Cli, measured: Path, tmp_path: Path, content: str):
    plan = tmp_path / "plan.json"
    plan.write_text(content)
    assert cli("pack", measured, plan, "-o", tmp_path / "packed", code=2)["error"]
    assert not (tmp_path / "packed").exists()


def test_a_model_that_is_not_there(cli: Cli):
    assert "no such model" in cli("scan", "/nowhere/at/all", code=2)["error"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("a full disk needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_packing_onto_a_full_disk(cli: Cli, measured: Path, small_disk: Path, tmp_path: Path):
    plan = tmp_path / "plan.json"
    solve(cli, measured, "--bits", 4, "-o", plan)
    (small_disk / "filler").write_bytes(b"x" * 252 * 1024)
    error = cli("pack", measured, plan, "-o", small_disk / "packed", code=2)
    assert "full" in error["error"] or "space" in " ".join(error.values())
    left = list((small_disk / "packed").rglob("*")) if (small_disk / "packed").exists() else []
    assert not [p for p in left if p.name == "bitatlas.json" or p.suffix == ".tmp"]


def test_a_read_only_folder(cli: Cli, measured: Path, small_disk: Path, tmp_path: Path):
    plan = tmp_path / "plan.json"
    solve(cli, measured, "--bits", 4, "-o", plan)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert cli("pack", measured, plan, "-o", small_disk / "packed", code=2)["error"]
    assert cli("export", plan, "--target", "bitatlas", "-o", small_disk / "files", code=2)["error"]
    assert cli("solve", measured, "--metric", "weight_error", "--formats", "int2-g64,int4-g64", "--bits", 4,
               "-o", small_disk / "plan.json", code=2)["error"]  # fmt: skip
