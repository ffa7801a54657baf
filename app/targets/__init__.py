"""Engines that allocations can be exported to: an explicit, ordered table. A new one is one file and one line."""

from __future__ import annotations

import difflib

from bitatlas.analysis.schema import UserError
from bitatlas.app.targets.auto_round import AutoRound
from bitatlas.app.targets.base import REJECTED, SERVABLE, WRONG, Finding, Target, Verdict
from bitatlas.app.targets.bitatlas import Bitatlas
from bitatlas.app.targets.compressed_tensors import CompressedTensors, Vllm
from bitatlas.app.targets.gptqmodel import GptqModel
from bitatlas.app.targets.llama_cpp import LlamaCpp
from bitatlas.app.targets.mlx import Mlx
from bitatlas.app.targets.torchao import TorchAo

__all__ = ["REJECTED", "SERVABLE", "TARGETS", "WRONG", "Finding", "Target", "Verdict", "get_target"]

TARGETS: dict[str, Target] = {
    t.NAME: t
    for t in (Bitatlas(), LlamaCpp(), Vllm(), CompressedTensors(), AutoRound(), GptqModel(), Mlx(), TorchAo())
}


def get_target(name: str) -> Target:
    """The target called ``name``.

    Raises:
        UserError: there is none; the message names the nearest.
    """
    if name not in TARGETS:
        near = difflib.get_close_matches(name.lower(), TARGETS, n=1, cutoff=0.4)
        raise UserError(f"there is no target called {name!r}", found=f"known: {', '.join(TARGETS)}",
                        fix=f"--target {near[0] if near else next(iter(TARGETS))}")  # fmt: skip
    return TARGETS[name]
