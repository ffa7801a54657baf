"""A checkpoint in an engine's own container: the target says which tensors a unit becomes, this writes them.

Streaming, one unit in memory at a time; written beside the folder and renamed when whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from bitatlas.analysis.schema import Allocation, ModelIndex, QuantUnit
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bitatlas.analysis.calibration import CalibrationSet
    from bitatlas.analysis.quantising import UnitQuantizer
    from bitatlas.analysis.weights import WeightReader
    from bitatlas.kernels.formats import Format
    from bitatlas.kernels.packed.shards import TensorSpec
    from bitatlas.kernels.reference import Quantized

__all__ = ["Container", "check_quantizer", "unit_quantizer", "write_engine_checkpoint"]


class Container(Protocol):
    """How an engine stores a quantised matrix."""

    def groups(self, index: ModelIndex) -> list[list[QuantUnit]]:
        """Units that become one module, which has one format: each alone, or the experts of a projection."""

    def specs(self, units: Sequence[QuantUnit], fmt: Format, dtype: torch.dtype) -> list[TensorSpec]:
        """Tensors that a group becomes; ``dtype`` is the checkpoint's. Pass-through formats: the weight as it is."""

    def tensors(
        self, units: Sequence[QuantUnit], qs: Sequence[Quantized], dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """Those tensors of a quantised group."""

    def config(self, allocation: Allocation, index: ModelIndex) -> dict[str, Any]:
        """What is added to config.json."""


@dataclass(frozen=True, slots=True)
class _Piece:
    specs: list[TensorSpec]
    make: Callable[[], dict[str, Tensor]]


def write_engine_checkpoint(
    container: Container,
    index: ModelIndex,
    allocation: Allocation,
    out: str | Path,
    *,
    quantizer: str = "rtn",
    calibration: CalibrationSet | None = None,
    shard_bytes: int = 1 << 30,
) -> Path:
    """Write ``index`` quantised by ``allocation`` into the folder ``out``, which must be empty or missing.

    Units in a pass-through format, and all other tensors, stay as they are in the checkpoint, but for scales that the
    quantiser folds into them.

    Raises:
        UserError: the folder is in use, another model's allocation, a quantiser that needs text or whose folded scales
            do not fit, the disk is full.
    """
    from bitatlas.analysis.weights import WeightReader
    from bitatlas.kernels.packed.writer import check_folder, copy_side_files

    allocation.check_model(index)
    check_quantizer(quantizer, index)
    target = Path(out).expanduser().absolute()
    if check_folder(target):
        raise UserError(f"{target} holds a packed model", fix="name a folder that is empty or does not exist")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        with WeightReader(index) as reader:
            order = [u for units in container.groups(index) for u in units]
            quantise = unit_quantizer(quantizer, index, allocation, order, reader, calibration)
            _write_shards(work, _pieces(container, index, allocation, reader, quantise), shard_bytes)
        copy_side_files(Path(index.path), work, container.config(allocation, index))
        work.chmod(0o755)  # mkdtemp's folders are private
        os.replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return target


def check_quantizer(name: str, index: ModelIndex) -> None:
    """Whether the codes of this quantiser can be stored without our own packed modules; a look, no work.

    Raises:
        UserError: an unknown quantiser, or scales folded into tensors that stay at the checkpoint's precision.
    """
    from bitatlas.analysis.folding import find_folds, widened
    from bitatlas.app.targets.names import stacked_on_disk
    from bitatlas.kernels.quantizers import get_quantizer

    if not get_quantizer(name).FOLDS:
        return
    wide = widened(find_folds(index))
    lost = [k.name for k in index.kept if k.name in wide and k.dtype != "F32"]
    lost += [u.key for u in index.units if stacked_on_disk(u)]
    if lost:
        raise UserError(
            f"{name} would change tensors that this container keeps as they are", found=f"{len(lost)}, such as {lost[0]}",
            fix="--quantizer gptq, or `bitatlas pack`, which stores them as float32",
        )  # fmt: skip


def unit_quantizer(
    name: str, index: ModelIndex, allocation: Allocation, order: Sequence[QuantUnit],
    reader: WeightReader, calibration: CalibrationSet | None,
) -> UnitQuantizer:  # fmt: skip
    """What chooses the codes: the packer's, with the same statistics.

    Args:
        order: the units in the order in which they will be written, which spares passes of the text.

    Raises:
        UserError: an unknown quantiser, or a text is needed and missing.
    """
    from bitatlas.analysis.quantising import UnitQuantizer
    from bitatlas.kernels.formats import FORMATS
    from bitatlas.kernels.quantizers import get_quantizer

    kind = get_quantizer(name)
    if calibration is None or not (kind.NEEDS_INPUTS or kind.TAKES_INPUTS):
        return UnitQuantizer(name)
    from bitatlas.analysis.input_stats import InputSource
    from bitatlas.analysis.loaded import LoadedModel

    loaded = LoadedModel.open(index)
    rounded = [u for u in order if FORMATS[allocation.formats[u.key]].kind != "float"]
    source = InputSource(loaded, calibration.tokens, rounded)
    return UnitQuantizer.over(
        name, loaded, calibration.tokens, allocation.formats, gamma=reader.kept, source=source
    )


def _pieces(
    container: Container, index: ModelIndex, allocation: Allocation, reader: WeightReader, quantise: UnitQuantizer
) -> list[_Piece]:  # fmt: skip
    import torch

    from bitatlas.kernels.formats import FORMATS
    from bitatlas.kernels.packed.shards import DTYPES, TensorSpec

    pieces, whole = [], {k.name for k in index.kept}
    for units in container.groups(index):
        fmt = FORMATS[allocation.formats[units[0].key]]
        dtype = DTYPES[reader.files.tensors[units[0].tensor][1].dtype]
        specs = container.specs(units, fmt, dtype)
        alone = len(units) == 1 and specs[0].name == units[0].tensor
        if fmt.kind == "float" and alone and not quantise.folding.touches(units[0].key):
            whole.add(units[0].tensor)
            continue

        def make(
            units: list[QuantUnit] = units, fmt: Format = fmt, dtype: torch.dtype = dtype, specs: Any = specs
        ) -> dict[str, Tensor]:
            if fmt.kind == "float":
                parts = [quantise.prepared(u.key, reader.get(u)).to(dtype) for u in units]
                return {specs[0].name: torch.stack(parts) if len(specs[0].shape) == 3 else parts[0]}
            return container.tensors(units, [quantise.codes(u.key, reader.get(u), fmt) for u in units], dtype)

        pieces.append(_Piece(specs, make))
    for name in sorted(whole):
        info = reader.files.tensors[name][1]
        spec = TensorSpec(name, DTYPES[info.dtype], tuple(info.shape))

        def plain(name: str = name, dtype: torch.dtype = spec.dtype) -> dict[str, Tensor]:
            return {name: quantise.folding.kept(name, reader.kept(name)).to(dtype)}

        pieces.append(_Piece([spec], plain))
    return pieces


def _write_shards(folder: Path, pieces: list[_Piece], shard_bytes: int) -> None:
    """Shards in the naming of the hub, with their index."""
    from bitatlas.kernels.packed.shards import write_shard
    from bitatlas.kernels.packed.writer import write_text

    shards: list[list[_Piece]] = [[]]
    size = total = 0
    for piece in pieces:
        nbytes = sum(s.nbytes for s in piece.specs)
        if size and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size, total = size + nbytes, total + nbytes
    where: dict[str, str] = {}
    for i, members in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        specs = [s for piece in members for s in piece.specs]
        write_shard(folder / name, specs, (item for piece in members for item in piece.make().items()))
        where |= dict.fromkeys((s.name for s in specs), name)
    text = json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=1
    )
    write_text(folder / "model.safetensors.index.json", text + "\n")
