"""`tasks.export`: every option counts or is refused, and an error leaves nothing behind."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.analysis.model_index import index_model
from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app import tasks
from bitatlas.app.tasks import shipping

Export = Callable[..., dict[str, Any]]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
TEXT = {"tokens": 256, "seq_len": 32}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(f"word{i * j % 97}" for j in range(40)) for i in range(60)))
    return path


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path]) -> Path:
    return tiny_checkpoint("llama", **SIZES)


@pytest.fixture
def export(
    model: Path, allocate: Callable[..., Allocation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Export:
    """``export(target, fmt, **options)`` into ``tmp_path / "out"``."""
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    plan_of = {name: allocate(index_model(model), name) for name in ("int4-g32-sym", "int4-g64-sym")}

    def run(target: str, fmt: str = "int4-g32-sym", out: str = "out", **options: Any) -> dict[str, Any]:
        return tasks.export(plan_of[fmt], target, tmp_path / out, model=str(model), **options)

    return run


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("mlx", {"quantizer": "foo"}, "no quantizer called 'foo'"),
        ("mlx", {"quantizer": "foo", "weights": True}, "no quantizer called 'foo'"),
        ("mlx", {"quantizer": "mse"}, "only for weights"),
        ("llama.cpp", {"calibration": "missing.txt"}, "no such calibration text"),
        ("llama.cpp", {"calibration": "missing.txt", "weights": True, "quantizer": "mse"}, "no such calibration text"),
        ("llama.cpp", {"calibration": "self"}, "from a file"),
        ("mlx", {"calibration": "TEXT"}, "makes nothing of a calibration text"),
        ("mlx", {"calibration": "TEXT", "weights": True}, "rtn reads no calibration text"),
        ("llama.cpp", {"calibration": "TEXT", "tokens": 10**6}, "too short"),
        ("vllm", {"calibration": "TEXT", "weights": True, "quantizer": "mse", "tokens": 10**6}, "too short"),
        ("bitatlas", {"weights": True}, "bitatlas pack"),
        ("auto-round", {"weights": True}, "own tools"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_count_is_an_error_and_nothing_is_written(
    target: str, options: dict[str, Any], words: str, export: Export, text: Path, tmp_path: Path
) -> None:
    if options.get("calibration") == "TEXT":
        options = options | {"calibration": text}
    with pytest.raises(UserError, match=words):
        export(target, **options)
    assert not (tmp_path / "out").exists()


def test_packing_is_named_where_it_writes_the_weights(export: Export, model: Path) -> None:
    with pytest.raises(UserError) as caught:
        export("bitatlas", weights=True)
    assert caught.value.fix == f"bitatlas pack {model} allocation.json -o DIR"


@pytest.mark.parametrize(
    ("target", "fmt", "start"),
    [("vllm", "int4-g32-sym", "vllm serve "), ("mlx", "int4-g32-sym", "mlx_lm.generate --model "),
     ("llama.cpp", "int4-g32-sym", "llama-server -m ")],
)  # fmt: skip
def test_weights_come_with_the_command_that_serves_them(
    target: str, fmt: str, start: str, export: Export
) -> None:
    done = export(target, fmt, weights=True)
    assert done["command"].startswith(start)
    named = Path(done["command"].removeprefix(start).split()[0])
    assert named.is_file() if target == "llama.cpp" else (named / "config.json").is_file()


def test_mse_reads_the_text(export: Export, text: Path, tmp_path: Path) -> None:
    scales = []
    for out, more in (("plain", {}), ("read", {"calibration": text, **TEXT})):
        export("vllm", out=out, weights=True, quantizer="mse", **more)
        scales.append(load_file(next((tmp_path / out).glob("*.safetensors"))))
    name = "model.layers.0.mlp.down_proj.weight_scale"
    assert not torch.equal(scales[0][name], scales[1][name])


def test_a_failure_in_the_middle_leaves_what_was_there(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.sh").write_text("mine")
    write = shipping.atomic_write

    def full(path: Path, data: bytes, *, named: bool = False) -> None:
        if path.name == "run.sh":
            raise UserError("the disk is full")
        write(path, data, named=named)

    monkeypatch.setattr(shipping, "atomic_write", full)
    with pytest.raises(UserError, match="disk is full"):
        export("mlx")
    assert {p.name: p.read_text() for p in (tmp_path / "out").iterdir()} == {"run.sh": "mine"}
    monkeypatch.undo()


def test_an_imatrix_stands_beside_the_files(export: Export, text: Path, tmp_path: Path) -> None:
    done = export("llama.cpp", "int4-g64-sym", calibration=text, **TEXT)
    assert {Path(f).name for f in done["files"]} == {"tensor-types.txt", "run.sh", "imatrix.gguf"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"tensor-types.txt", "run.sh", "imatrix.gguf"}
    assert json.dumps(done)


def test_a_file_is_no_folder(export: Export, text: Path) -> None:
    with pytest.raises(UserError, match="the output is a file"):
        export("mlx", out=text.name)


GPTQMODEL = """
import json
class QuantizeConfig:
    def __init__(self, **options): self.options = options
class GPTQModel:
    @staticmethod
    def load(source, config): return GPTQModel()
    def quantize(self, samples, batch_size): self.samples = samples
    def save(self, out): json.dump(self.samples, open(out, "w"))
"""


def run_command(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """A command as run.sh has it, with this interpreter and a GPTQModel that only takes down what it is given."""
    (folder / "gptqmodel.py").write_text(GPTQMODEL)
    words = [sys.executable, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


def test_gptqmodel_gets_the_tokens_that_pack_reads(
    export: Export, model: Path, text: Path, tmp_path: Path
) -> None:
    done = export("gptqmodel", calibration=text, **TEXT)
    assert str(tmp_path / "out" / "calibration.json") in done["files"]
    ran = run_command(tmp_path / "out", done["command"])
    assert ran.returncode == 0, ran.stderr
    samples = json.loads((tmp_path / "out" / shlex.split(done["command"])[-1]).read_text())
    want = make_calibration(load_tokenizer(model), text, **TEXT).tokens
    assert [s["input_ids"] for s in samples] == want.tolist()
    assert all(s["attention_mask"] == [1] * 32 for s in samples)


def test_gptqmodel_without_a_text_says_so(export: Export, tmp_path: Path) -> None:
    done = export("gptqmodel")
    assert not (tmp_path / "out" / "calibration.json").exists()
    assert any("--calibration" in n for n in done["notes"])
    ran = run_command(tmp_path / "out", done["command"])
    assert ran.returncode == 1
    assert "--calibration TEXT" in ran.stderr


def test_the_demo_brings_its_own_text(
    allocate: Callable[..., Allocation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITATLAS_HOME", str(tmp_path / "home"))
    index = index_model(tasks.demo_path())
    tasks.export(
        allocate(index, "int4-g32-sym"), "gptqmodel", tmp_path / "out", model=str(tasks.demo_path()),
        tokens=4096, seq_len=256,
    )  # fmt: skip
    rows = json.loads((tmp_path / "out" / "calibration.json").read_text())
    assert [len(r) for r in rows] == [256] * 16
