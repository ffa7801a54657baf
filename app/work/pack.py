"""Packing: an allocation applied to a checkpoint, shard by shard. A step is a shard; the weights are read one at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import Allocation, ModelIndex, QuantUnit
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.calibration import CalibrationSet
    from bitatlas.analysis.input_stats import InputSource
    from bitatlas.kernels.packed.manifest import PackedUnit

__all__ = ["SHARD_BYTES", "Packer", "check_output", "check_quantizer", "needs_inputs", "pack_model"]

SHARD_BYTES = 256 << 20  # small enough that a killed job repeats seconds, large enough for few files


def check_output(out: Path) -> None:
    """Raises `UserError` when ``out`` is a file or a folder that holds something else than a packed model."""
    from bitatlas.kernels.packed.writer import check_folder

    check_folder(out)


def check_quantizer(name: str) -> None:
    """Raises `UserError` for an unknown quantiser; the message lists those there are."""
    from bitatlas.kernels.quantizers import get_quantizer

    get_quantizer(name)


def needs_inputs(quantizer: str) -> bool:
    """Whether a quantiser runs calibration text through the model."""
    from bitatlas.kernels.quantizers import get_quantizer

    return get_quantizer(quantizer).NEEDS_INPUTS


class Packer:
    """Writes ``allocation`` of the checkpoint ``index`` into ``out``, resumable.

    Args:
        index: the checkpoint that the allocation is for.
        allocation: must be for this very checkpoint.
        out: the folder to write; empty, missing, or an unfinished packing of the same.
        quantizer: name in `kernels.quantizers.QUANTIZERS`.
        shard_bytes: largest shard.
        source: where the weights are read from: the imported safetensors folder of a GGUF file; None = ``index``.
        calibration: tokens for quantisers that need the units' inputs.

    Raises:
        UserError: an allocation for another model, a folder that is in use, an unknown quantiser, too small a disk.
    """

    def __init__(
        self,
        index: ModelIndex,
        allocation: Allocation,
        out: str | Path,
        *,
        quantizer: str = "rtn",
        shard_bytes: int = SHARD_BYTES,
        source: ModelIndex | None = None,
        calibration: CalibrationSet | None = None,
    ) -> None:
        from bitatlas.kernels.packed.manifest import Manifest, PackedKept, PackedUnit, plan_shards
        from bitatlas.kernels.quantizers import get_quantizer

        allocation.check_model(index)
        self.index, self.allocation, self.out = source or index, allocation, Path(out).expanduser()
        self._quantizer = get_quantizer(quantizer)
        self._calibration = calibration
        if self._quantizer.NEEDS_INPUTS and calibration is None:
            raise UserError(f"{quantizer} needs a calibration text", found="none was named",
                            fix="--calibration FILE (text or JSONL), or --quantizer mse")  # fmt: skip
        self._units: dict[str, QuantUnit] = {u.key: u for u in self.index.units}
        units = [
            PackedUnit(u.key, u.tensor, u.rows, u.cols, allocation.formats[u.key], u.expert, u.part,
                       u.transposed, u.interleaved)
            for u in self.index.units
        ]  # fmt: skip
        kept = [PackedKept(k.name, k.shape, k.dtype, k.nbytes) for k in self.index.kept]
        self.manifest = Manifest(
            *plan_shards(units, kept, shard_bytes),
            quantizer=quantizer,
            model={
                "name": index.name,
                "architecture": index.architecture,
                "model_type": index.model_type,
                "digest": index.digest,
                **(
                    {"calibration": calibration.digest}
                    if calibration and self._quantizer.NEEDS_INPUTS
                    else {}
                ),
            },
        )

    @cached_property
    def writer(self) -> Any:
        """The writer; opening it claims the folder."""
        from bitatlas.kernels.packed.writer import PackedWriter

        source = Path(self.index.path)
        if not (source / "config.json").is_file():
            raise UserError("there is no config.json beside the weights", found=str(source),
                            fix="a GGUF file has to be imported first")  # fmt: skip
        return PackedWriter(self.out, self.manifest, source, {"allocation.json": self.allocation.to_json()})

    @cached_property
    def _reader(self) -> Any:
        from bitatlas.analysis.weights import WeightReader

        return WeightReader(self.index)

    def plan(self) -> list[str]:
        """One step per shard."""
        return [f"shard-{i + 1:05d}" for i in range(len(self.manifest.shards))]

    def run(self, key: str) -> dict[str, Any]:
        """Write one shard, unless it is there already.

        Raises:
            UserError: NaN or Inf in a weight, the checkpoint changed, the disk is full.
        """
        number = self.plan().index(key)
        if number in self.writer.pending():
            inputs = self._inputs(number) if self._quantizer.NEEDS_INPUTS else None
            self.writer.write(number, lambda u: self._pack(u, inputs), lambda k: self._reader.kept(k.name))
        return {"note": f"{key} of {len(self.manifest.shards)}"}

    def _pack(self, unit: PackedUnit, inputs: InputSource | None) -> dict[str, Tensor]:
        from bitatlas.kernels.packed.matrix import pack_weight

        quantizer = self._quantizer(inputs.get(unit.key) if inputs and unit.fmt.kind == "int" else None)
        return pack_weight(self._reader.get(self._units[unit.key]), unit.fmt, quantizer)

    @cached_property
    def _loaded(self) -> Any:
        from bitatlas.analysis.loaded import LoadedModel

        return LoadedModel.open(self.index)

    def _inputs(self, number: int) -> InputSource:
        """Statistics for the units of one shard."""
        from bitatlas.analysis.input_stats import InputSource

        assert self._calibration is not None
        units = [self._units[u.key] for u in self.manifest.units if u.shard == number and u.fmt.kind == "int"]
        return InputSource(self._loaded, self._calibration.tokens, units)

    def finish(self) -> dict[str, Any]:
        """Name the manifest. Returns folder, bytes on disk, predicted bytes, bits per weight."""
        folder = self.writer.finish()
        self._reader.close()
        shards = sorted(folder.glob("packed-*.safetensors"))
        return {
            "folder": str(folder),
            "bytes": sum(f.stat().st_size for f in shards),
            "predicted_bytes": self.manifest.payload_bytes + self.manifest.kept_bytes,
            "bits_per_weight": self.manifest.payload_bytes * 8 / self.index.params,
            "shards": len(shards),
            "quantizer": self.manifest.quantizer,
        }


def pack_model(
    index: ModelIndex,
    allocation: Allocation,
    out: str | Path,
    *,
    quantizer: str = "rtn",
    shard_bytes: int = SHARD_BYTES,
    calibration: CalibrationSet | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Pack in this process; the arguments are those of `Packer`. ``progress(done, shards)`` is called per shard.

    Returns:
        what `Packer.finish` says.
    """
    packer = Packer(
        index, allocation, out, quantizer=quantizer, shard_bytes=shard_bytes, calibration=calibration
    )
    keys = packer.plan()
    for done, key in enumerate(keys):
        packer.run(key)
        if progress:
            progress(done + 1, len(keys))
    return packer.finish()
