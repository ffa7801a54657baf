"""llama.cpp's importance matrix from our own pass over a calibration text: sum of squared inputs, column by column.

One tensor NAME.in_sum2 (experts, columns) and one NAME.counts (experts, 1) for every weight that is multiplied; a count of
0 is an expert that no token reached (llama-quantize then takes 1 for all its columns).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bitatlas.analysis.calibration import CalibrationSet
from bitatlas.analysis.loaded import LoadedModel
from bitatlas.analysis.schema import QuantUnit
from bitatlas.app.targets.ggml import gguf_name

__all__ = ["write_imatrix"]


def write_imatrix(loaded: LoadedModel, text: CalibrationSet, out: str | Path) -> Path:
    """Run ``text`` through ``loaded`` and write the imatrix GGUF ``out``."""
    import gguf

    stacks: dict[str, list[QuantUnit]] = {}
    for u in loaded.index.units:
        if u.role != "embed" and gguf_name(u):
            stacks.setdefault(gguf_name(u), []).append(u)
    place = {u.key: (name, i) for name, us in stacks.items() for i, u in enumerate(us)}
    sums = {name: torch.zeros(len(us), us[0].cols, dtype=torch.float64) for name, us in stacks.items()}
    counts = {name: np.zeros((len(us), 1), np.float32) for name, us in stacks.items()}

    def add(unit: str, x: Tensor, token: Tensor, weight: Tensor | None) -> None:
        name, i = place[unit]
        sums[name][i] += x.detach().double().pow(2).sum(0).cpu()
        counts[name][i] += len(x)

    with torch.no_grad(), loaded.capture(add, place):
        for row in text.tokens:
            loaded.logits(torch.from_numpy(np.ascontiguousarray(row[None])))
    target = Path(out).expanduser().absolute()
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(work, "")
    writer.kv_data[0].clear()  # an imatrix has a type in place of an architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [Path(text.source).name or "text"])
    writer.add_uint32("imatrix.chunk_count", len(text.tokens))
    writer.add_uint32("imatrix.chunk_size", text.tokens.shape[1])
    for name in sorted(stacks):
        writer.add_tensor(f"{name}.weight.in_sum2", sums[name].float().numpy())
        writer.add_tensor(f"{name}.weight.counts", counts[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(work, target)
    finally:
        writer.close()
        work.unlink(missing_ok=True)
    return target
