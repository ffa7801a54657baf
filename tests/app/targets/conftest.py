from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitatlas.analysis.schema import KeptTensor, ModelIndex, QuantUnit

HIDDEN, FFN, EXPERT_FFN, KV, VOCAB = 256, 512, 128, 64, 1000


def build_index(kind: str = "llama", layers: int = 2, experts: int = 0, tied: bool = False) -> ModelIndex:
    """An index with the names of a real checkpoint, without one."""
    units, kept = [], []

    def unit(key: str, role: str, layer: int, rows: int, cols: int, expert: int = -1) -> None:
        units.append(QuantUnit(key, role, layer, expert, rows, cols, f"{key}.weight"))

    unit("model.embed_tokens", "embed", -1, VOCAB, HIDDEN)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        for leaf, rows in (("q", HIDDEN), ("k", KV), ("v", KV), ("o", HIDDEN)):
            unit(f"{at}.self_attn.{leaf}_proj", leaf, layer, rows, HIDDEN)
        mixtral = kind == "mixtral"
        for expert in range(experts) if experts else (-1,):
            inside = "block_sparse_moe" if mixtral else "mlp"
            path = f"{at}.{inside}.experts.{expert}" if experts else f"{at}.mlp"
            names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
            wide = EXPERT_FFN if experts else FFN
            unit(f"{path}.{names[0]}", "gate", layer, wide, HIDDEN, expert)
            unit(f"{path}.{names[1]}", "up", layer, wide, HIDDEN, expert)
            unit(f"{path}.{names[2]}", "down", layer, HIDDEN, wide, expert)
        kept.append(KeptTensor(f"{at}.input_layernorm.weight", (HIDDEN,), "BF16", HIDDEN * 2))
        if experts:
            kept.append(KeptTensor(f"{at}.mlp.gate.weight", (experts, HIDDEN), "BF16", experts * HIDDEN * 2))
    if not tied:
        unit("lm_head", "head", -1, VOCAB, HIDDEN)
    return ModelIndex("/models/tiny model", "d" * 40, "tiny model", "X", kind, tuple(units), tuple(kept),
                      layers, experts, 2 if experts else 0, None, VOCAB)  # fmt: skip


@pytest.fixture(scope="session")
def make_index() -> Callable[..., ModelIndex]:
    return build_index


@pytest.fixture(scope="session")
def client() -> Callable[..., str]:
    """``client("mlx", "mlx_lm", script, *arguments)`` runs Python code where an engine is installed; returns its output.

    That is this interpreter, or the one of the virtual environment NAME in $BITATLAS_CLIENTS (`make clients` makes
    them). Without either the test is skipped, with the reason.
    """
    root = Path(os.environ.get("BITATLAS_CLIENTS") or Path(__file__).parents[3] / ".clients")

    def run(name: str, module: str, script: str, *arguments: object) -> str:
        python = root / name / "bin" / "python"
        if not python.exists():
            if importlib.util.find_spec(module) is None:
                pytest.skip(
                    f"{module} is not installed: `make clients`, or name its folder in BITATLAS_CLIENTS"
                )
            python = Path(sys.executable)
        done = subprocess.run(
            [str(python), "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run
