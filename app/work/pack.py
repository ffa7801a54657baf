"""Packing: an allocation applied to a checkpoint, shard by shard. A step is a shard; the weights are read one at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.measure import WHOLE
from bitatlas.analysis.memory import give_back, keep_pages
from bitatlas.analysis.schema import Allocation, ModelIndex, QuantUnit
from bitatlas.app.work.pack_memory import check_memory, needed_memory, statistics_limit
from bitatlas.app.work.pack_plan import as_begun, plan_packing
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.calibration import CalibrationSet
    from bitatlas.analysis.folding import Folding
    from bitatlas.analysis.input_stats import InputSource
    from bitatlas.analysis.quantising import UnitQuantizer
    from bitatlas.kernels.packed.manifest import PackedUnit

__all__ = ["LOSSES", "Packer", "check_output", "check_quantizer", "pack_model"]

LOSSES = "layer_loss.json"
_SCALES = "scales"


def check_output(out: Path) -> None:
    """Raises `UserError` when ``out`` is a file or a folder that holds something else than a packed model."""
    from bitatlas.kernels.packed.writer import check_folder

    check_folder(out)


def check_quantizer(name: str) -> None:
    """Raises `UserError` for an unknown quantiser; the message lists those there are."""
    from bitatlas.kernels.quantizers import get_quantizer

    get_quantizer(name)


class Packer:
    """Writes ``allocation`` of the checkpoint ``index`` into ``out``, resumable.

    Args:
        index: the checkpoint that the allocation is for.
        allocation: must be for this very checkpoint.
        out: the folder to write; empty, missing, or an unfinished packing of the same.
        quantizer: name in `kernels.quantizers.QUANTIZERS`.
        shard_bytes: largest shard; None = about a 32nd of the whole (`pack_plan.shard_size`).
        source: where the weights are read from: the imported safetensors folder of a GGUF file; None = ``index``.
        calibration: tokens for quantisers that need or take the units' inputs.

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
        shard_bytes: int | None = None,
        source: ModelIndex | None = None,
        calibration: CalibrationSet | None = None,
    ) -> None:
        from bitatlas.analysis.folding import find_folds, widened
        from bitatlas.kernels.quantizers import get_quantizer

        allocation.check_model(index)
        self.index, self.allocation, self.out = source or index, allocation, Path(out).expanduser()
        self._quantizer = get_quantizer(quantizer)
        self._calibration = calibration
        if self._quantizer.NEEDS_INPUTS and calibration is None:
            raise UserError(f"{quantizer} needs a calibration text", found="none was named",
                            fix="--calibration FILE (text or JSONL), or --quantizer mse")  # fmt: skip
        kind = self._quantizer
        self._with_inputs = calibration is not None and (kind.NEEDS_INPUTS or kind.TAKES_INPUTS)
        self._units: dict[str, QuantUnit] = {u.key: u for u in self.index.units}
        self._folds = find_folds(self.index) if self._quantizer.FOLDS else []
        text = {"calibration": calibration.digest} if calibration and self._with_inputs else {}
        planned = plan_packing(
            self.index, allocation.formats, quantizer=quantizer, wide=widened(self._folds), shard_bytes=shard_bytes,
            model={"name": index.name, "architecture": index.architecture, "model_type": index.model_type,
                   "digest": index.digest, **text},
        )  # fmt: skip
        self.manifest = as_begun(planned, self.out)

    @cached_property
    def writer(self) -> Any:
        """The writer; opening it claims the folder.

        Raises:
            UserError: the folder is in use, the disk is too small, or the memory for a quantiser that sees inputs.
        """
        from bitatlas.kernels.packed.manifest import MANIFEST
        from bitatlas.kernels.packed.writer import PackedWriter

        source = Path(self.index.path)
        if not (source / "config.json").is_file():
            raise UserError("there is no config.json beside the weights", found=str(source),
                            fix="a GGUF file has to be imported first")  # fmt: skip
        if self._with_inputs and not (self.out / MANIFEST).is_file():
            check_memory(self.manifest.quantizer, needed_memory(self._reader, self._rounded()))
        return PackedWriter(self.out, self.manifest, source, {"allocation.json": self.allocation.to_json()})

    @cached_property
    def _reader(self) -> Any:
        from bitatlas.analysis.weights import WeightReader

        return WeightReader(self.index)

    def plan(self) -> list[str]:
        """One step per shard; before them the search for the scales that the quantiser folds, if it does."""
        shards = [f"shard-{i + 1:05d}" for i in range(len(self.manifest.shards))]
        return [_SCALES, *shards] if self._quantizer.FOLDS else shards

    def run(self, key: str) -> dict[str, Any]:
        """Write one shard, unless it is there already.

        Raises:
            UserError: NaN or Inf in a weight, the checkpoint changed, the disk is full.
        """
        if key == _SCALES:
            return {"note": f"{len(self._folding.scales)} scales"}
        number = int(key.removeprefix("shard-")) - 1
        if not self.writer.is_written(number):
            if not self._with_inputs:
                keep_pages()
            quantizer, losses = self._unit_quantizer, dict[str, float]()
            from bitatlas.kernels.packed.shards import DTYPES

            self.writer.write(
                number,
                lambda u: self._pack(u, quantizer, losses),
                lambda k: self._folding.kept(k.name, self._reader.kept(k.name)).to(DTYPES[k.dtype]),
            )
            self._note(losses)
        return {"note": f"{key} of {len(self.manifest.shards)}"}

    def _pack(
        self, unit: PackedUnit, quantizer: UnitQuantizer, losses: dict[str, float]
    ) -> dict[str, Tensor]:
        from bitatlas.kernels.packed.matrix import pack_blocks

        blocks, one = self._blocks(unit, quantizer), quantizer.instance(unit.key, unit.fmt)
        if unit.fmt.per_tensor:
            one.largest = max((block.abs().amax() for block in blocks()), key=float)
        try:
            out = pack_blocks(blocks(), unit.rows, unit.cols, unit.fmt, one)
        except UserError:
            self._reader.get(self._units[unit.key])  # says which tensor, where the weights came unchecked
            raise
        if one.loss is not None:
            losses[unit.key] = one.loss
        return out

    def _blocks(self, unit: PackedUnit, quantizer: UnitQuantizer) -> Callable[[], Iterable[Tensor]]:
        """Gives the unit's rows in blocks, as often as it is called."""
        from bitatlas.kernels.packed.matrix import block_rows

        source = self._units[unit.key]
        stored = self._quantizer.takes_stored(unit.fmt)
        if not self._quantizer.FOLDS and (unit.rows * unit.cols > WHOLE or not unit.transposed):
            # Never whole as float32, and still in the cache when it is rounded. Turned matrices are read in strips.
            return lambda: self._reader.blocks(source, step=block_rows(unit.cols), stored=stored)
        whole = [quantizer.prepared(unit.key, self._reader.get(source))]
        return lambda: whole

    def _note(self, losses: dict[str, float]) -> None:
        """Layer losses of a shard go to the folder, beside those of the shards before."""
        from bitatlas.kernels.packed.writer import write_text

        path = self.out / LOSSES
        if losses:
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            write_text(path, json.dumps(known | losses, indent=1, sort_keys=True) + "\n")

    @cached_property
    def _loaded(self) -> Any:
        from bitatlas.analysis.loaded import LoadedModel

        give_back()  # what the tokenizer took
        loaded = LoadedModel.open(self.index)
        give_back()  # the weights as they were stored
        return loaded

    def _source(self, units: list[QuantUnit]) -> InputSource:
        from bitatlas.analysis.input_stats import InputSource

        assert self._calibration is not None
        # A pass goes no further than its units, so small batches are cheap.
        return InputSource(self._loaded, self._calibration.tokens, units, statistics_limit(self.index))

    def _rounded(self) -> list[QuantUnit]:
        """Units that get codes, in the order in which they are written."""
        units = sorted((u for u in self.manifest.units if u.fmt.kind != "float"), key=lambda u: u.shard)
        return [self._units[u.key] for u in units]

    @cached_property
    def _unit_quantizer(self) -> UnitQuantizer:
        """One for all shards: statistics that a pass has made for the next shard are still there when it comes."""
        from bitatlas.analysis.quantising import UnitQuantizer

        if not self._with_inputs:
            return UnitQuantizer(self.manifest.quantizer)
        folding = self._folding  # has a source of its own, gone when this one begins
        return UnitQuantizer(self.manifest.quantizer, self._source(self._rounded()), folding)

    @cached_property
    def _folding(self) -> Folding:
        """The folded scales, searched once and kept in the folder: another shard or a resumed job finds them there."""
        from bitatlas.analysis.folding import Folding, read_scales, write_scales
        from bitatlas.analysis.quantising import search_folding

        if not self._quantizer.FOLDS:
            return Folding()
        path = self.writer.out / "folded_scales.safetensors"
        if not path.is_file():
            found = search_folding(
                self._loaded, self._source(list(self.index.units)), self.allocation.formats, self._reader.kept,
                lambda unit: self._loaded.handle(unit.key).get().float(),
            )  # fmt: skip
            write_scales(path, found)
        return read_scales(path, self._folds)

    def finish(self) -> dict[str, Any]:
        """Name the manifest. Returns folder, bytes on disk, predicted bytes, bits per weight."""
        folder = self.writer.finish()
        self._reader.close()
        shards = sorted(folder.glob("packed-*.safetensors"))
        losses = folder / LOSSES
        total = sum(json.loads(losses.read_text(encoding="utf-8")).values()) if losses.is_file() else None
        return {
            "folder": str(folder),
            "bytes": sum(f.stat().st_size for f in shards),
            "predicted_bytes": self.manifest.payload_bytes + self.manifest.kept_bytes,
            "bits_per_weight": self.manifest.payload_bytes * 8 / self.index.params,
            "shards": len(shards),
            "quantizer": self.manifest.quantizer,
            **({} if total is None else {"layer_loss": total}),
        }


def pack_model(
    index: ModelIndex,
    allocation: Allocation,
    out: str | Path,
    *,
    quantizer: str = "rtn",
    shard_bytes: int | None = None,
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
