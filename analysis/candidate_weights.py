"""Quantised weights of (unit, format), made once and kept within a byte limit: in memory, beyond it on disk.

Least recently used weights leave memory first. What fits nowhere is quantised again when it is asked for, so the limits
change speed and never a number.
"""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitatlas.analysis.loaded import LoadedModel
from bitatlas.kernels.formats import Format
from bitatlas.kernels.reference import quantize_dequantize

__all__ = ["CandidateWeights"]


class CandidateWeights:
    """The candidates of one model.

    Args:
        loaded: the model, original weights in place whenever `get` has to quantise.
        units, formats: the axes of the indices.
        storage: dtype of what is kept; bf16 halves the memory and rounds the quantised values.
        ram_bytes: limit in memory (of the model's device).
        folder: where to put what leaves memory; None = nowhere. Files are named by model, unit, format and dtype.
        disk_bytes: limit in ``folder``, files of earlier processes included.
    """

    def __init__(
        self, loaded: LoadedModel, units: Sequence[str], formats: Sequence[Format], *, storage: torch.dtype = torch.float32,
        ram_bytes: int = 4 << 30, folder: str | Path | None = None, disk_bytes: int = 0,
    ) -> None:  # fmt: skip
        self._loaded, self.units, self.formats = loaded, tuple(units), tuple(formats)
        self._storage, self._ram_limit, self._disk_limit = storage, ram_bytes, disk_bytes
        self._ram: OrderedDict[tuple[int, int], Tensor] = OrderedDict()
        self.ram_bytes = 0
        self._folder = Path(folder) if folder is not None and disk_bytes > 0 else None
        self.disk_bytes = 0
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self.disk_bytes = sum(f.stat().st_size for f in self._folder.glob("*.safetensors"))
        self.quantised = 0

    def get(self, unit: int, fmt: int) -> Tensor:
        """(rows, cols) weight of a unit in a format, in the dtype and on the device of the model's parameter.

        The original weight must be in the model unless `kept` says otherwise.
        """
        key = (unit, fmt)
        found = self._ram.get(key)
        if found is None:
            found = self._read(key)
            if found is None:
                handle = self._loaded.handle(self.units[unit])
                found = quantize_dequantize(handle.get(), self.formats[fmt]).to(self._storage).contiguous()
                self.quantised += 1
            self._keep(key, found)
        else:
            self._ram.move_to_end(key)
        param = self._loaded.handle(self.units[unit]).param
        return found.to(device=param.device, dtype=param.dtype)

    def kept(self, unit: int, fmt: int) -> bool:
        """Whether `get` works without the original weight in the model: a file may be damaged, memory is not."""
        return (unit, fmt) in self._ram

    def _keep(self, key: tuple[int, int], weight: Tensor) -> None:
        size = weight.numel() * weight.element_size()
        if size > self._ram_limit:
            self._write(key, weight)
            return
        while self.ram_bytes + size > self._ram_limit:
            old, tensor = self._ram.popitem(last=False)
            self.ram_bytes -= tensor.numel() * tensor.element_size()
            self._write(old, tensor)
        self._ram[key] = weight
        self.ram_bytes += size

    def _file(self, key: tuple[int, int]) -> Path:
        assert self._folder is not None
        name = f"{self._loaded.index.digest}/{self.units[key[0]]}/{self.formats[key[1]].name}/{self._storage}"
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.safetensors"

    def _write(self, key: tuple[int, int], weight: Tensor) -> None:
        """To disk while there is room; a disk that is full only makes the search slower."""
        size = weight.numel() * weight.element_size()
        if self._folder is None or self.disk_bytes + size > self._disk_limit:
            return
        path = self._file(key)
        if path.exists():
            return
        temporary = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        try:
            save_file({"weight": weight.cpu()}, temporary)
            os.replace(temporary, path)
            self.disk_bytes += path.stat().st_size
        except (OSError, SafetensorError):
            temporary.unlink(missing_ok=True)

    def _read(self, key: tuple[int, int]) -> Tensor | None:
        """From disk; None when it is not there or damaged."""
        if self._folder is None:
            return None
        unit, path = self._loaded.handle(self.units[key[0]]).unit, self._file(key)
        try:
            found = load_file(path)["weight"]
        except OSError:
            return None
        except (SafetensorError, KeyError):
            self.disk_bytes -= path.stat().st_size
            path.unlink(missing_ok=True)
            return None
        return found if found.shape == (unit.rows, unit.cols) and found.dtype == self._storage else None
