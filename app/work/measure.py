"""The measuring job: every metric's steps one after the other, then its reduction; rows go back to the worker."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from bitatlas.analysis.cost import estimate
from bitatlas.analysis.measure import MeasureContext, finish_metric, kept_arrays, run_step, step_saved
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.metrics.base import Metric
from bitatlas.analysis.schema import DamageRow, Provenance, parse_format
from bitatlas.analysis.together import run_together
from bitatlas.app.devices import pick_device
from bitatlas.app.jobs.work import Work
from bitatlas.app.work.ahead import Ahead
from bitatlas.app.work.checkpoint import loadable, unchanged
from bitatlas.cache.keys import run_key
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["MeasureWork"]

_FINISH = "finish"


class MeasureWork(Work):
    """Parameters are those of `app.tasks.measuring.measure_params`."""

    KIND = "measure"

    def __init__(self, params: Mapping[str, Any], home: Home) -> None:
        super().__init__(params, home)
        self.metrics = {name: get_metric(name) for name in params["metrics"]}
        self._finished: list[str] = []

    @cached_property
    def context(self) -> MeasureContext:
        """The model and its calibration text, opened on first use and kept for the whole job.

        Raises:
            UserError: the checkpoint changed since the job was asked for.
        """
        p = self.params
        index = unchanged(self.params)
        dtype = p.get("dtype", "float32")
        # Weights-only metrics read files and compute in processes of their own; the GPU is for the model.
        model = any(not self._weights_only(name) for name in self.metrics)
        need = index.params * (4 if dtype == "float32" else 2) * 3 // 2
        return MeasureContext(
            loadable(index, self.home),
            [parse_format(f) for f in p["formats"]],
            seed=p["seed"],
            settings=p["settings"],
            text=p["calibration"] or None,
            tokens=p["tokens"] or 1,
            seq_len=p["seq_len"] or 2,
            text_mode=p.get("text_mode", "packed"),
            dtype=dtype,
            device=pick_device(p.get("device", "auto"), need) if model else "cpu",
        )

    def run_of(self, metric: Metric) -> str:
        """The run that a metric's rows belong to: the same inputs, the same run, whichever job asks."""
        digest = "" if metric.NEEDS == "weights" else self.context.calibration.digest
        formats = self.params["formats"] if metric.PER_FORMAT else []
        return run_key(
            self.params["digest"],
            metric.NAME,
            metric.VERSION,
            formats,
            digest,
            self._settings(metric),
            self.params["seed"],
        )

    def _settings(self, metric: Metric) -> dict[str, Any]:
        """What was asked of a metric; the model's dtype is among it where it is not the usual one."""
        known = {k: v for k, v in self.params["settings"].items() if k in metric.SETTINGS}
        other = "dtype" in self.params and not self._weights_only(metric.NAME)
        return known | ({"model_dtype": self.params["dtype"]} if other else {})

    def plan(self) -> list[str]:
        """``metric/step`` for every step, then ``metric/finish``.

        Steps of the metrics that look at weights alone come first, the same step of all of them together, so
        that each weight is read once for all.
        """
        keys = [key for group in self.groups() for key in group]
        keys += [f"{name}/{_FINISH}" for name in self.metrics if self._weights_only(name)]
        for name, metric in self.metrics.items():
            if not self._weights_only(name):
                keys += [f"{name}/{step}" for step in metric.plan(self.context)]
                keys.append(f"{name}/{_FINISH}")
        return keys

    def weights(self) -> list[float]:
        """Each metric's estimated seconds, in equal shares for its steps."""
        each = {name: estimate(metric, self.context) for name, metric in self.metrics.items()}
        names = [key.partition("/")[0] for key in self.plan()]
        return [each[name].seconds / (each[name].steps + 1) for name in names]

    def groups(self) -> list[list[str]]:
        """Keys of the weights-only metrics, those of the same step side by side."""
        groups: dict[str, list[str]] = {}
        for name, metric in self.metrics.items():
            if self._weights_only(name):
                for step in metric.plan(self.context):
                    groups.setdefault(step, []).append(f"{name}/{step}")
        return list(groups.values())

    def run_group(self, keys: Sequence[str]) -> None:
        """Leave the parts of steps that read the same weights; those that are there stay."""
        step = keys[0].partition("/")[2]
        metrics = [self.metrics[key.partition("/")[0]] for key in keys]
        run_together({m: self.home.runs(self.run_of(m)) for m in metrics}, self.context, step)

    def saved(self, key: str) -> bool:
        """Whether a step's part is there."""
        name, _, step = key.partition("/")
        return step_saved(self.home.runs(self.run_of(self.metrics[name])), step)

    def _weights_only(self, name: str) -> bool:
        return self.metrics[name].NEEDS == "weights"

    def runs(self) -> list[dict[str, Any]]:
        """What the store has to know about each run before its first row."""
        return [self._description(m) for m in self.metrics.values()]

    def run(self, key: str) -> dict[str, Any]:
        """Rows of one step, for the run they belong to."""
        name, _, step = key.partition("/")
        metric = self.metrics[name]
        run = self.run_of(metric)
        self._finish_earlier()
        parts = self.home.runs(run)
        if step == _FINISH:
            self._ahead.close()  # memory for what comes next
            rows = finish_metric(metric, self.context, parts)
            Store(self.home).put_arrays(run, kept_arrays(metric, self.context, parts))
            self._finished.append(name)
        else:
            if metric.NEEDS == "weights":
                self._ahead.wait(key)
            rows = run_step(metric, self.context, parts, step)
        return {"rows": {run: [_listed(r) for r in rows]}, "note": f"{metric.NAME}: {step}"}

    @cached_property
    def _ahead(self) -> Ahead:
        """The processes that run weights-only steps ahead of the worker's questions."""
        metrics = sum(map(self._weights_only, self.metrics))
        return Ahead(self, self.context.index.params * metrics)

    def _finish_earlier(self) -> None:
        """Runs of the metrics that have ended are complete now: people can use them while the job goes on."""
        store = Store(self.home)
        for name in self._finished:
            run = self.run_of(self.metrics[name])
            if f"{name}/{_FINISH}" in store.steps_done(run):
                store.finish_run(run)
        self._finished.clear()

    def finish(self) -> dict[str, Any]:
        """The runs of this job by metric."""
        return {
            "runs": {name: self.run_of(m) for name, m in self.metrics.items()},
            "formats": self.params["formats"],
        }

    def _facts(self, metric: Metric) -> dict[str, Any]:
        """What a trust table needs to know and a page could only learn by loading torch."""
        cost = metric.cost(self.context)
        return {"unit": metric.UNIT, "additive": metric.ADDITIVE, "forward_tokens": cost.forward_tokens,
                "backward_tokens": cost.backward_tokens}  # fmt: skip

    def _description(self, metric: Metric) -> dict[str, Any]:
        needs_text = metric.NEEDS != "weights"
        calibration = self.context.calibration if needs_text else None
        provenance = Provenance(
            model_digest=self.params["digest"],
            model_name=self.context.index.name,
            calibration_digest=calibration.digest if calibration else "",
            tokens=calibration.size if calibration else 0,
            seed=self.params["seed"],
            settings={"metric": self._facts(metric)}
            | ({"source": calibration.source, **calibration.settings} if calibration else {}),
            versions={p: importlib.metadata.version(p) for p in ("bitatlas", "torch", "transformers")},
            device=self.context.device,
        )
        return {
            "run": self.run_of(metric),
            "model_digest": self.params["digest"],
            "metric": metric.NAME,
            "settings": self._settings(metric),
            "formats": self.params["formats"] if metric.PER_FORMAT else [],
            "calibration": calibration.digest if calibration else "",
            "provenance": provenance.to_dict(),
        }


def _listed(row: DamageRow) -> list[Any]:
    return [row.metric, row.unit, row.format, row.value, row.stderr, row.count, row.floor]
