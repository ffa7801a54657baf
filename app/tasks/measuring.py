"""Measuring: cost first, then a durable job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitatlas.analysis.schema import ModelIndex, UserError, expand_formats
from bitatlas.app.checks import check_text_size
from bitatlas.app.dataset_text import PREFIXES, dataset_file
from bitatlas.app.devices import check_place, place_params
from bitatlas.app.tasks.demo import demo_path, demo_text
from bitatlas.app.tasks.jobs import status_dict, submit, submit_and_wait
from bitatlas.app.tasks.models import fit_length, register

if TYPE_CHECKING:
    from bitatlas.analysis.measure import MeasureContext

__all__ = [
    "applicable_metrics",
    "asks_for_all",
    "calibration_file",
    "check_text_mode",
    "file_digest",
    "measure",
    "measure_params",
    "metric_names",
    "parse_settings",
    "planned_context",
    "submit_measure",
]

Progress = Callable[[Any], None]
_SELF = "self"
_ALL = ["all"]
_NAMED = 3  # metrics that a job's title names


def metric_names(metric: str | Iterable[str]) -> tuple[str, ...]:
    """Metrics that have to run for the named ones; ``all`` = every one. A name that a metric emits stands for it.

    Raises:
        UserError: an unknown name.
    """
    from bitatlas.analysis.metrics import METRICS, get_metric

    wanted = _named(metric)
    if wanted == _ALL:
        return tuple(METRICS)
    if not wanted:
        raise UserError("no metric was named", fix="bitatlas metrics")
    emitted = {name: m.NAME for m in METRICS.values() for name in m.EMITS}
    return tuple(dict.fromkeys(emitted.get(name) or get_metric(name).NAME for name in wanted))


def asks_for_all(metric: str | Iterable[str]) -> bool:
    """Whether every metric that applies is wanted."""
    return _named(metric) == _ALL


def _named(metric: str | Iterable[str]) -> list[str]:
    raw = metric.split(",") if isinstance(metric, str) else list(metric)
    return [m.strip() for m in raw if m.strip()]


def applicable_metrics(
    model: str | Path,
    *,
    formats: str | Iterable[str] = "int{2,3,4,5,6,8}-g64",
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 128,
    needs_text: bool = True,
) -> tuple[tuple[str, ...], dict[str, str]]:
    """What ``all`` means for a model: metrics that can be measured, the cheapest first, and why others cannot.

    Args:
        needs_text: a metric that reads text is left out where there is none; False = suppose that there will be one.

    Raises:
        UserError: the model or the named text.
    """
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.metrics import METRICS, get_metric

    index = register(model)
    text = calibration_file(index.path, calibration)
    check_text_size(tokens, seq_len)
    ctx = MeasureContext(index, expand_formats(formats), tokens=tokens, seq_len=seq_len)
    passes: dict[str, int] = {}
    skipped: dict[str, str] = {}
    for name, kind in METRICS.items():
        if needs_text and text is None and kind.NEEDS != "weights":
            skipped[name] = "it needs a calibration text: --calibration FILE"
            continue
        try:
            metric = get_metric(name)
            metric.plan(ctx)
            cost = metric.cost(ctx)
            passes[name] = cost.forward_tokens + 2 * cost.backward_tokens
        except UserError as e:
            skipped[name] = f"{e.what} ({e.found})" if e.found else e.what
    return tuple(sorted(passes, key=passes.__getitem__)), skipped


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``NAME=VALUE`` options of metrics; numbers and true/false become what they look like.

    Raises:
        UserError: not a pair. Whether a metric takes the value, `measure_params` says.
    """
    import json

    out: dict[str, Any] = {}
    for pair in pairs:
        name, eq, value = pair.partition("=")
        if not eq:
            raise UserError("an option must be NAME=VALUE", found=repr(pair), fix="--set probes=64")
        try:
            out[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            out[name.strip()] = value
    return out


def calibration_file(model_path: str, named: str | Path | None, kind: str = "calibration") -> Path | None:
    """The text to use: the named file or dataset, else the demo's own for the demo, else none.

    ``datasets:NAME`` is a data set of the `datasets` library (see `app.dataset_text`); for calibration ``self`` stands for
    text sampled from the model, and is handed on as it is.

    Raises:
        UserError: the named file or data set is not there.
    """
    if named is None:
        return demo_text(kind) if Path(model_path).resolve() == demo_path().resolve() else None
    if str(named) == _SELF and kind == "calibration" and not Path(named).exists():
        return Path(_SELF)
    if str(named).startswith(PREFIXES):
        return dataset_file(str(named))
    path = Path(named).expanduser()
    if not path.is_file():
        raise UserError(
            f"there is no such {kind} text",
            found=str(path),
            fix="name a text or JSONL file, datasets:NAME, or self",
        )
    return path.resolve()


def measure_params(
    model: str | Path,
    metric: str | Iterable[str],
    *,
    formats: str | Iterable[str],
    calibration: str | Path | None,
    tokens: int,
    seq_len: int,
    seed: int,
    settings: Mapping[str, Any] | None,
    text_mode: str = "packed",
    device: str = "auto",
    dtype: str = "float32",
) -> dict[str, Any]:
    """The canonical request of a measurement: the same question gives the same dictionary, hence the same job.

    Raises:
        UserError: anything in it that cannot be.
    """
    from bitatlas.analysis.metrics import METRICS, get_metric

    index = register(model)
    names = metric_names(metric)
    if asks_for_all(metric):
        names, _ = applicable_metrics(
            model, formats=formats, calibration=calibration, tokens=tokens, seq_len=seq_len
        )
    text = calibration_file(index.path, calibration)
    needy = [n for n in names if METRICS[n].NEEDS != "weights"]
    if needy and text is None:
        raise UserError(
            f"{', '.join(needy)} need a calibration text",
            found="none was named",
            fix="--calibration FILE (text or JSONL), datasets:NAME, or self",
        )
    if needy:
        fit_length(index, seq_len)
    check_text_mode(text_mode)
    check_place(device, dtype)
    if dtype == "auto":
        raise UserError(
            "a measurement needs one dtype, whatever the machine",
            found="auto",
            fix="--dtype float32 or bfloat16",
        )
    ctx = planned_context(index, names, formats, tokens, seq_len, seed, settings)
    for name in names:
        get_metric(name).plan(ctx)  # what it refuses it refuses here, not in the job
    versions = {n: METRICS[n].VERSION for n in names if METRICS[n].VERSION > 1}
    return {
        "model": index.path,
        "digest": index.digest,
        "metrics": list(names),
        "formats": sorted(f.name for f in ctx.formats),
        "calibration": str(text) if text and needy else "",
        "calibration_sha": file_digest(text) if text and needy else "",
        "tokens": tokens if needy else 0,
        "seq_len": seq_len if needy else 0,
        "seed": seed,
        "settings": ctx.settings,
        **(place_params(device, dtype, "float32") if needy else {}),
        # The usual way of cutting stays unsaid, so that requests made before there was a choice keep their identity.
        **({"text_mode": text_mode} if needy and text_mode != "packed" else {}),
        # A metric that computes something else than it did is another request; first versions stay unsaid for the same reason.
        **({"versions": versions} if versions else {}),
    }


def planned_context(
    index: ModelIndex, names: Iterable[str], formats: str | Iterable[str], tokens: int, seq_len: int, seed: int,
    settings: Mapping[str, Any] | None,
) -> MeasureContext:  # fmt: skip
    """What metrics plan and estimate a request with; nothing is loaded, and of the text only its size is known.

    Raises:
        UserError: a size or settings that cannot be.
    """
    from bitatlas.analysis.measure import MeasureContext
    from bitatlas.analysis.metrics import METRICS
    from bitatlas.analysis.metrics.settings import check_settings, plain_settings

    check_text_size(tokens, seq_len)
    kinds = [METRICS[n] for n in names]
    plain = plain_settings(kinds, settings or {})
    check_settings(kinds, plain)
    return MeasureContext(
        index, expand_formats(formats), seed=seed, settings=plain, tokens=tokens, seq_len=seq_len
    )


def check_text_mode(text_mode: str) -> None:
    """Raises `UserError` unless it is a way of cutting a text into sequences."""
    if text_mode not in ("packed", "document"):
        raise UserError("unknown calibration mode", found=repr(text_mode), fix="packed or document")


def file_digest(path: Path) -> str:
    """First 20 hex digits of the SHA-256 of a text: part of the request, so that another text is another job."""
    import hashlib

    if str(path) == _SELF:
        return _SELF  # the model's digest and the seed say the rest
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:20]


def submit_measure(
    model: str | Path,
    metric: str | Iterable[str] = "fisher",
    *,
    formats: str | Iterable[str] = "int{2,3,4,5,6,8}-g64",
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 128,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    text_mode: str = "packed",
    device: str = "auto",
    dtype: str = "float32",
) -> str:
    """Start (or join) the measurement; returns the job's id at once."""

    params = measure_params(
        model,
        metric,
        formats=formats,
        calibration=calibration,
        tokens=tokens,
        seq_len=seq_len,
        seed=seed,
        settings=settings,
        text_mode=text_mode,
        device=device,
        dtype=dtype,
    )
    names = params["metrics"]
    what = ", ".join(names) if len(names) <= _NAMED else f"{len(names)} metrics"
    return submit("measure", params, f"measure {what} of {Path(params['model']).name}")


def measure(
    model: str | Path,
    metric: str | Iterable[str] = "fisher",
    *,
    formats: str | Iterable[str] = "int{2,3,4,5,6,8}-g64",
    calibration: str | Path | None = None,
    tokens: int = 8192,
    seq_len: int = 128,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    text_mode: str = "packed",
    device: str = "auto",
    dtype: str = "float32",
    wait: bool = False,
    on_progress: Progress | None = None,
    on_estimate: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure as a durable job. Two calls with the same arguments are one job.

    Args:
        calibration: a text or JSON-lines file, ``datasets:NAME[/CONFIG][:SPLIT[:FIELD]]``, or ``self``: text sampled from the
            model itself by the seed.
        text_mode: ``packed`` cuts one stream of tokens; ``document`` starts every sequence at a document's beginning.
        device: ``auto`` (a GPU where there is one that holds the model), ``cpu`` or ``cuda``; the same run either way.
        dtype: of the model's parameters; another than float32 makes runs of their own.
        on_estimate: is told what this will cost (`tasks.estimate_total`) before it begins.

    Returns:
        The job's status; with ``wait`` its result. With the metric ``all`` also ``skipped``: metric -> why not here.

    Raises:
        UserError: the request, or (with ``wait``) the job's own error.
    """
    about: dict[str, Any] = {}
    names = metric_names(metric)
    if asks_for_all(metric):
        names, about["skipped"] = applicable_metrics(
            model, formats=formats, calibration=calibration, tokens=tokens, seq_len=seq_len
        )
    asked: dict[str, Any] = {
        "formats": formats, "calibration": calibration, "tokens": tokens, "seq_len": seq_len, "seed": seed,
        "settings": settings, "text_mode": text_mode,
    }  # fmt: skip
    if on_estimate is not None:
        from bitatlas.app.tasks.estimating import estimate, estimate_total

        on_estimate(estimate_total(estimate(model, names, **asked)))
    job = submit_measure(model, names, **asked, device=device, dtype=dtype)
    return status_dict(submit_and_wait(job, wait, on_progress)) | about
