"""Running a metric: the context it sees, and steps that survive a kill.

A step's result is one file ``<parts>/<step>.npz``, written beside and renamed, before the step counts as
done. Whoever runs the steps (a test, a job, two workers) can stop anywhere: a file that is there is a step
that is done, and `finish_metric` may be called again at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitatlas.analysis.calibration import SELF, CalibrationSet, load_tokenizer, make_calibration
from bitatlas.analysis.schema import DamageRow, ModelIndex, QuantUnit
from bitatlas.kernels.errors import UserError
from bitatlas.kernels.formats import Format

if TYPE_CHECKING:
    from torch import Tensor

    from bitatlas.analysis.loaded import LoadedModel
    from bitatlas.analysis.metrics.base import Metric, StepResult
    from bitatlas.analysis.quantising import UnitQuantizer
    from bitatlas.analysis.weights import WeightReader

__all__ = [
    "WHOLE",
    "MeasureContext",
    "PartsOnDisk",
    "StepDone",
    "finish_metric",
    "kept_arrays",
    "part_path",
    "run_metric",
    "run_step",
    "save_step",
    "step_saved",
]

_ROWS = "__rows__"
_MOMENT_BYTES = 4 << 30  # of second moments held at once for the setting ``quantizer``
WHOLE = 1 << 24  # weights of a unit that is held whole: 64 MiB of float32


class MeasureContext:
    """Everything a metric may look at; what is expensive is made on first use.

    Args:
        index: the checkpoint.
        formats: the formats to measure.
        seed: of everything random.
        settings: options of the metrics (`Metric.SETTINGS`), JSON-able.
        text: calibration file, or `SELF` for text sampled from the model; None where the metrics need none.
        tokens, seq_len: how much of it.
        text_mode: ``packed`` or ``document``.
        dtype, device: of the loaded model.
        calibration, reader, loaded: ready-made ones, instead of those that would be opened here.
    """

    def __init__(
        self,
        index: ModelIndex,
        formats: Collection[Format] = (),
        *,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        text: str | Path | None = None,
        tokens: int = 16384,
        seq_len: int = 256,
        text_mode: str = "packed",
        dtype: str = "float32",
        device: str = "cpu",
        calibration: CalibrationSet | None = None,
        reader: WeightReader | None = None,
        loaded: LoadedModel | None = None,
    ) -> None:
        self.index = index
        self.formats = tuple(formats)
        self.seed = seed
        self.settings = dict(settings or {})
        self.text = text
        self.tokens = tokens
        self.seq_len = seq_len
        self.text_mode = text_mode
        self.dtype = dtype
        self.device = device
        if calibration is not None:
            self.tokens, self.seq_len = calibration.size, calibration.tokens.shape[1]
        # A ready-made part takes the place of the lazy one, and stays its maker's to close.
        ready = {"calibration": calibration, "reader": reader, "loaded": loaded}
        self._given = {k: v for k, v in ready.items() if v is not None}
        self.__dict__.update(self._given)
        self._last: tuple[str, Tensor] | None = None
        self._shared: tuple[str, dict[str, Any]] = "", {}
        self._others: dict[str, LoadedModel] = {}
        self._quantizers: dict[str, UnitQuantizer] = {}
        # Room for what steps of one process may share to save work; results never hang on it.
        self.scratch: dict[str, Any] = {}

    @cached_property
    def reader(self) -> WeightReader:
        """The checkpoint's weights, one at a time."""
        from bitatlas.analysis.weights import WeightReader

        return WeightReader(self.index)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The model in memory."""
        import torch

        from bitatlas.analysis.loaded import LoadedModel

        return LoadedModel.open(self.index, dtype=getattr(torch, self.dtype), device=self.device)

    def loaded_in(self, dtype: str) -> LoadedModel:
        """The model with parameters of another type (``--set dtype=bfloat16``), "" = the context's own; kept.

        Raises:
            UserError: a type that a model cannot run in.
        """
        if dtype not in ("", "float32", "bfloat16", "float16"):
            raise UserError("unknown dtype for the model", found=dtype, fix="float32 or bfloat16")
        if dtype in ("", self.dtype):
            return self.loaded
        import torch

        from bitatlas.analysis.loaded import LoadedModel

        if dtype not in self._others:
            self._others[dtype] = LoadedModel.open(self.index, getattr(torch, dtype), self.device)
        return self._others[dtype]

    @cached_property
    def calibration(self) -> CalibrationSet:
        """The calibration sequences; needs the tokenizer only, or with the text `SELF` the model.

        Raises:
            UserError: no text was given, or it does not do.
        """
        if self.text is None:
            raise UserError(
                "this metric needs a calibration text", fix="--calibration FILE (text or JSON lines)"
            )
        if self.text == SELF:
            from bitatlas.analysis.self_text import sample_from_model

            return sample_from_model(self.loaded, self.tokens, self.seq_len, self.seed)
        loaded = self.__dict__.get("loaded")
        tokenizer = loaded.tokenizer if loaded is not None else load_tokenizer(self.index.path)
        return make_calibration(
            tokenizer, self.text, self.tokens, self.seq_len, self.seed,
            mode=self.text_mode, vocab_size=self.index.vocab_size,  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def sequences(self) -> int:
        """Calibration sequences a pass sees, known before the text is read."""
        return -(-self.tokens // self.seq_len)

    @property
    def calibration_tokens(self) -> int:
        """Tokens a pass sees: whole sequences."""
        return self.sequences * self.seq_len

    @cached_property
    def unit_by_key(self) -> dict[str, QuantUnit]:
        """Unit key -> unit."""
        return {u.key: u for u in self.index.units}

    def weight(self, unit: QuantUnit) -> Tensor:
        """(rows, cols) float32 original weight; the last one is kept, so formats of a unit share a read."""
        if self._last is None or self._last[0] != unit.key:
            self._last = None
            self._last = unit.key, self.reader.get(unit)
        return self._last[1]

    def blocks(self, unit: QuantUnit) -> Iterator[Tensor]:
        """The weight as consecutive (n, cols) float32 row blocks, n a multiple of 128 but for the last.

        A unit of ordinary size is one block, `weight` itself; only a huge one (an embedding) is read in parts,
        so that no metric that looks at weights alone ever holds one whole.
        """
        if unit.params <= WHOLE:
            yield self.weight(unit)
        else:
            yield from self.reader.blocks(unit)

    def largest(self, unit: QuantUnit) -> Tensor | None:
        """The largest |w| of a unit, where a format has one scale for the matrix and blocks have to share it."""
        if not any(f.per_tensor for f in self.formats):
            return None
        found: Tensor = self.of_unit(
            unit, "largest", lambda: max((b.abs().amax() for b in self.blocks(unit)), key=float)
        )
        return found

    def slabs(self, unit: QuantUnit) -> Iterator[Tensor]:
        """The weight as consecutive (n, min(rows, cols)) blocks along its longer side; sum of B^T B is its Gram."""
        if unit.params <= WHOLE:
            whole = self.weight(unit)
            yield whole if unit.rows >= unit.cols else whole.mT
        elif unit.rows >= unit.cols:
            yield from self.reader.blocks(unit)
        else:
            yield from (block.mT for block in self.reader.blocks(unit, columns=True))

    def of_unit(self, unit: QuantUnit, name: str, make: Callable[[], Any]) -> Any:
        """``make()``, kept until another unit is asked about: metrics that look at a unit together share a result."""
        if self._shared[0] != unit.key:
            self._shared = unit.key, {}
        memo = self._shared[1]
        if name not in memo:
            memo[name] = make()
        return memo[name]

    def candidate(self, unit: QuantUnit, fmt: Format) -> Tensor:
        """(rows, cols) float32: what the unit's weight becomes under ``fmt``, by the quantiser of the settings."""
        from bitatlas.kernels.reference import quantize_dequantize

        if not self._quantizers:
            return quantize_dequantize(self.weight(unit), fmt)
        made = self._quantizers.get(fmt.name) or next(iter(self._quantizers.values()))
        return made.effective(unit.key, self.weight(unit), fmt)

    def prepare(self) -> None:
        """What the setting ``quantizer`` needs, gathered before a step watches or changes the model.

        Units that AWQ scales together are scaled as in the uniform model of each format.

        Raises:
            UserError: an unknown quantiser, or more statistics than fit into memory.
        """
        from bitatlas.kernels.quantizers import get_quantizer

        name = str(self.settings.get("quantizer", "rtn"))
        kind = get_quantizer(name)
        if name == "rtn" or self._quantizers:
            return
        from bitatlas.analysis.input_stats import InputSource
        from bitatlas.analysis.quantising import UnitQuantizer

        source = InputSource(self.loaded, self.calibration.tokens, self.index.units, _MOMENT_BYTES)
        if (kind.NEEDS_INPUTS or kind.TAKES_INPUTS) and source.nbytes > _MOMENT_BYTES:
            raise UserError(f"measuring for {name} needs more memory than there is for its statistics",
                            found=f"{source.nbytes >> 20} MiB, {_MOMENT_BYTES >> 20} MiB are allowed",
                            fix="--set quantizer=rtn")  # fmt: skip
        for fmt in self.formats:
            uniform = dict.fromkeys(self.index.unit_keys(), fmt.name)
            self._quantizers[fmt.name] = UnitQuantizer.over(
                name, self.loaded, self.calibration.tokens, uniform, source=source
            )
        source.fill()

    def random_seed(self, *labels: object) -> int:
        """A 63-bit seed from the context's seed and ``labels``: the same in every process."""
        text = json.dumps([self.seed, *map(str, labels)])
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

    def rng(self, *labels: object) -> np.random.Generator:
        """A generator of its own for ``labels`` (step key, unit, probe)."""
        return np.random.default_rng(self.random_seed(*labels))

    def close(self) -> None:
        """Lets go of the files and the model that were opened here."""
        reader, loaded = self.__dict__.get("reader"), self.__dict__.get("loaded")
        if reader is not None and "reader" not in self._given:
            reader.close()
        if loaded is not None and "loaded" not in self._given:
            loaded.free()
            del self.__dict__["loaded"]
        for other in self._others.values():
            other.free()
        self._others.clear()
        self._quantizers.clear()
        self.scratch.clear()
        self._last, self._shared = None, ("", {})

    def __enter__(self) -> MeasureContext:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class StepDone:
    """Told to ``on_step``: which step, how far, what it found, how long; ``reused`` = it was there already."""

    key: str
    done: int
    total: int
    rows: list[DamageRow]
    seconds: float
    reused: bool


def part_path(parts_dir: str | Path, key: str) -> Path:
    """File of a step: readable, safe on every file system, and different for different keys."""
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip("-.")[:80]
    return Path(parts_dir) / f"{safe}.{hashlib.sha256(key.encode()).hexdigest()[:10]}.npz"


class PartsOnDisk(Mapping[str, Mapping[str, np.ndarray]]):
    """step key -> arrays, each read when asked for, so that a run larger than memory can be reduced.

    ``keys`` may be a function: most steps ask for no part, and a plan over thousands of units takes its time.
    """

    def __init__(self, parts_dir: str | Path, keys: Collection[str] | Callable[[], Collection[str]]) -> None:
        self._dir, self._plan = Path(parts_dir), keys

    @cached_property
    def _keys(self) -> dict[str, None]:
        return dict.fromkeys(self._plan() if callable(self._plan) else self._plan)

    def __getitem__(self, key: str) -> Mapping[str, np.ndarray]:
        found = _read_part(part_path(self._dir, key)) if key in self._keys else None
        if found is None:
            raise KeyError(key)
        return found[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def run_step(metric: Metric, ctx: MeasureContext, parts_dir: str | Path, key: str) -> list[DamageRow]:
    """Rows of one step; measured unless its part file is there, and saved before this returns."""
    path = part_path(parts_dir, key)
    found = _read_part(path)
    if found is not None:
        return found[0]
    if "quantizer" in metric.SETTINGS:
        ctx.prepare()
    parts = PartsOnDisk(parts_dir, partial(metric.plan, ctx))
    return save_step(parts_dir, key, metric.step_after(ctx, key, parts))


def save_step(parts_dir: str | Path, key: str, result: StepResult) -> list[DamageRow]:
    """Make a step's result its part file; returns its rows."""
    rows = [_plain(r) for r in result.rows]
    _write_part(part_path(parts_dir, key), rows, result.arrays or {})
    return rows


def step_saved(parts_dir: str | Path, key: str) -> bool:
    """Whether a step's part file is there and sound."""
    return _read_part(part_path(parts_dir, key)) is not None


def finish_metric(metric: Metric, ctx: MeasureContext, parts_dir: str | Path) -> list[DamageRow]:
    """Rows that come from all parts together. Measures nothing of the plan; may be called again.

    Raises:
        RuntimeError: a step has not been run.
    """
    plan = metric.plan(ctx)
    missing = [key for key in plan if not part_path(parts_dir, key).exists()]
    if missing:
        raise RuntimeError(
            f"{metric.NAME}: {len(missing)} of {len(plan)} steps are missing, such as {missing[0]!r}"
        )
    return [_plain(r) for r in metric.finish(ctx, PartsOnDisk(parts_dir, plan))]


def kept_arrays(metric: Metric, ctx: MeasureContext, parts_dir: str | Path) -> dict[str, np.ndarray]:
    """What stays of a finished run beside its rows; may be called again."""
    return metric.keep(ctx, PartsOnDisk(parts_dir, metric.plan(ctx)))


def run_metric(
    metric: Metric,
    ctx: MeasureContext,
    parts_dir: str | Path,
    on_step: Callable[[StepDone], None] | None = None,
    done: Collection[str] = (),
) -> list[DamageRow]:
    """All rows of a metric, in this process, steps in the order of the plan.

    Args:
        parts_dir: folder of the part files; those that exist are reused.
        on_step: told after each step; an exception from it stops the run (that is how one cancels).
        done: keys that ``on_step`` has been told before; not told again.
    """
    plan = metric.plan(ctx)
    rows: list[DamageRow] = []
    for i, key in enumerate(plan):
        reused = part_path(parts_dir, key).exists()
        start = time.perf_counter()
        found = run_step(metric, ctx, parts_dir, key)
        rows += found
        if on_step is not None and key not in done:
            on_step(StepDone(key, i + 1, len(plan), found, time.perf_counter() - start, reused))
    return rows + finish_metric(metric, ctx, parts_dir)


def _plain(r: DamageRow) -> DamageRow:
    """The row with Python's own numbers, whatever scalars the metric's arithmetic left behind."""
    return DamageRow(
        r.metric, r.unit, r.format, float(r.value), float(r.stderr), int(r.count), float(r.floor)
    )


def _write_part(path: Path, rows: list[DamageRow], arrays: Mapping[str, np.ndarray]) -> None:
    packed = json.dumps([[r.metric, r.unit, r.format, r.value, r.stderr, r.count, r.floor] for r in rows])
    buffer = io.BytesIO()
    np.savez(buffer, **{_ROWS: np.frombuffer(packed.encode(), np.uint8)}, **arrays)  # type: ignore[arg-type]
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two workers on the same step from writing into one file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(buffer.getbuffer())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_part(path: Path) -> tuple[list[DamageRow], dict[str, np.ndarray]] | None:
    """Rows and arrays of a part; None when it is missing or damaged (then the step is run again)."""
    try:
        with np.load(path, allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        rows = [DamageRow(*r) for r in json.loads(bytes(arrays.pop(_ROWS)))]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile):
        return None
    return rows, arrays
