"""A GGUF written directly: streaming, one tensor in memory at a time, beside its name and renamed when whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitatlas.analysis.schema import FORMATS, Allocation, Format, ModelIndex, QuantUnit
from bitatlas.app.targets.ggml import (
    ARCHITECTURES,
    MAKEABLE,
    WRITTEN,
    exact_type,
    ggml_type,
    gguf_name,
    tensor_bytes,
)
from bitatlas.app.work.gguf_blocks import blocks_of, ggml_round
from bitatlas.app.work.gguf_metadata import ROPE_PERMUTED, add_config, add_tokenizer, read_config
from bitatlas.kernels.errors import UserError

if TYPE_CHECKING:
    from bitatlas.analysis.calibration import CalibrationSet
    from bitatlas.analysis.quantising import UnitQuantizer
    from bitatlas.analysis.weights import WeightReader

__all__ = ["check_gguf", "write_gguf"]

_EXACT = (
    "solve with --formats int{4,5,8}-g32-sym,int{4,5}-g32,mxfp4 --target llama.cpp"  # see `ggml.exact_type`
)
_FILE_TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "mxfp4": 38, "f16": 1, "bf16": 32}


@dataclass(frozen=True, slots=True)
class _Tensor:
    """name, shape (rows last but one), ggml type, and how its bytes are made."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], np.ndarray]


def check_gguf(index: ModelIndex, allocation: Allocation, quantizer: str = "rtn") -> None:
    """A look, no work.

    Raises:
        UserError: an architecture or a type that is not written here, or one that the gguf package rounds itself while
            another quantiser than rtn is asked for.
    """
    if index.model_type not in WRITTEN:
        raise UserError(f"the GGUF of {index.model_type} is not written here", found=f"written: {', '.join(WRITTEN)}",
                        fix="export without --weights and run the command")  # fmt: skip
    stuck: dict[str, str] = {}
    for unit in index.units:
        kind = ggml_type(FORMATS[allocation.formats[unit.key]], unit.cols)
        if kind not in MAKEABLE:
            stuck.setdefault(gguf_name(unit), kind)
    if stuck:
        name, kind = next(iter(stuck.items()))
        raise UserError(
            f"the gguf package cannot make {kind}", found=f"{len(stuck)} tensors, such as {name}",
            fix=f"{_EXACT}, or run the command of the export without --weights",
        )  # fmt: skip
    own = [u.key for u in index.units if not _same_grid(FORMATS[allocation.formats[u.key]], u.cols)]
    if own and quantizer != "rtn":
        raise UserError(
            f"{quantizer} does not count where the gguf package rounds by itself",
            found=f"{len(own)} units, such as {own[0]} in {allocation.formats[own[0]]}",
            fix=f"{_EXACT}, or --quantizer rtn",
        )  # fmt: skip


def _same_grid(fmt: Format, cols: int) -> bool:
    """Whether ggml stores our codes, or the weight as it is."""
    return exact_type(fmt) == ggml_type(fmt, cols)


def write_gguf(
    index: ModelIndex,
    allocation: Allocation,
    out: str | Path,
    *,
    quantizer: str = "rtn",
    calibration: CalibrationSet | None = None,
) -> Path:
    """Write ``index`` quantised by ``allocation`` into the file ``out``.

    Codes are ours wherever ggml has the same grid (`app.work.gguf_blocks`); other types are rounded by the gguf package,
    and then only rtn is taken.

    Raises:
        UserError: as `check_gguf`; a tokenizer that is not written here, a quantiser without its text, the disk.
    """
    import gguf

    from bitatlas.analysis.weights import WeightReader
    from bitatlas.app.work.engine_checkpoint import unit_quantizer

    allocation.check_model(index)
    check_gguf(index, allocation, quantizer)
    config, target = read_config(Path(index.path)), Path(out).expanduser().absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    arch = gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[ARCHITECTURES[index.model_type]]]
    writer = gguf.GGUFWriter(work, arch)
    try:
        add_config(writer, config, index.name)
        add_tokenizer(writer, Path(index.path), config["vocab_size"])
        with WeightReader(index) as reader:
            order = [u for units in _stacks(index).values() for u in units]
            quantise = unit_quantizer(quantizer, index, allocation, order, reader, calibration)
            tensors = _tensors(index, allocation, config, reader, quantise)
            most = max(tensors, key=lambda t: math.prod(t.shape) * (t.kind != "f32"))
            writer.add_file_type(_FILE_TYPES.get(most.kind, 0))
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            for t in tensors:
                kind = gguf.GGMLQuantizationType[t.kind.upper()]
                writer.add_tensor_info(
                    t.name, t.shape, np.dtype(np.float32), tensor_bytes(t.kind, math.prod(t.shape)), kind
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for t in tensors:
                writer.write_tensor_data(t.make())
        writer.close()
        os.replace(work, target)
    finally:
        writer.close()
        work.unlink(missing_ok=True)
    return target


def _stacks(index: ModelIndex) -> dict[str, list[QuantUnit]]:
    """GGUF tensor -> its units, in file order."""
    stacks: dict[str, list[QuantUnit]] = {}
    for unit in index.units:
        stacks.setdefault(gguf_name(unit), []).append(unit)
    if "" in stacks:
        raise UserError("a tensor has no place in GGUF", found=stacks[""][0].key)
    return stacks


def _tensors(
    index: ModelIndex, allocation: Allocation, config: dict[str, Any], reader: WeightReader, quantise: UnitQuantizer
) -> list[_Tensor]:  # fmt: skip
    """All tensors in file order: stacks of experts become one each."""
    import gguf

    heads = {
        "q": config["num_attention_heads"],
        "k": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    permuted = index.model_type in ROPE_PERMUTED
    out = []
    for name, units in _stacks(index).items():
        first, fmt = units[0], FORMATS[allocation.formats[units[0].key]]
        kind = ggml_type(fmt, first.cols)

        def one(unit: QuantUnit, fmt: Any = fmt, kind: str = kind) -> np.ndarray:
            weight = reader.get(unit)
            if _same_grid(fmt, unit.cols) and fmt.kind != "float":
                data = blocks_of(quantise.codes(unit.key, weight, fmt))
            else:
                data = ggml_round(quantise.prepared(unit.key, weight), kind)
            return _permute(data, heads[unit.role]) if permuted and unit.role in heads else data

        def stack(units: list[QuantUnit] = units, one: Callable[[QuantUnit], np.ndarray] = one) -> np.ndarray:
            return np.stack([one(u) for u in units])

        shape = (first.rows, first.cols)
        if first.expert >= 0:
            out.append(_Tensor(f"{name}.weight", (len(units), *shape), kind, stack))
        else:
            out.append(_Tensor(f"{name}.weight", shape, kind, partial(one, first)))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[ARCHITECTURES[index.model_type]], index.n_layers)
    for kept in index.kept:
        name = names.get_name(kept.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError("a tensor has no place in GGUF", found=kept.name, fix="export without --weights")

        def plain(key: str = kept.name) -> np.ndarray:
            data = quantise.folding.kept(key, reader.kept(key)).float().numpy()
            role = next((r for r in heads if key.endswith(f"{r}_proj.bias")), None)
            data = _permute(data, heads[role]) if permuted and role else data
            return np.ascontiguousarray(data)

        # llama.cpp's converter squeezes: a gate of one row is a vector.
        out.append(_Tensor(name, tuple(n for n in kept.shape if n > 1) or (1,), "f32", plain))
    return out


def _permute(data: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from two halves to pairs, as convert_hf_to_gguf does; blocks run along the columns."""
    rows = data.shape[0]
    pairs = data.reshape(heads, 2, rows // heads // 2, *data.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(pairs.reshape(data.shape))
