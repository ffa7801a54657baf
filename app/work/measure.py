"""The measuring job: every metric's steps one after the other, then its reduction; rows go back to the worker."""

from __future__ import annotations

import importlib.metadata
import itertools
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from bitatlas.analysis.measure import MeasureContext, finish_metric, run_step
from bitatlas.analysis.metrics import get_metric
from bitatlas.analysis.metrics.base import Metric
from bitatlas.analysis.schema import DamageRow, Provenance, parse_format
from bitatlas.app.jobs.work import Work
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
        self._current = ""

    @cached_property
    def context(self) -> MeasureContext:
        """The model and its calibration text, opened on first use and kept for the whole job.

        Raises:
            UserError: the checkpoint changed since the job was asked for.
        """
        p = self.params
        index = unchanged(self.params)
        return MeasureContext(
            loadable(index, self.home),
            [parse_format(f) for f in p["formats"]],
            seed=p["seed"],
            settings=p["settings"],
            text=p["calibration"] or None,
            tokens=p["tokens"] or 1,
            seq_len=p["seq_len"] or 2,
        )

    def run_of(self, metric: Metric) -> str:
        """The run that a metric's rows belong to: the same inputs, the same run, whichever job asks."""
        digest = "" if metric.NEEDS == "weights" else self.context.calibration.digest
        known = {k: v for k, v in self.params["settings"].items() if k in metric.SETTINGS}
        formats = self.params["formats"] if metric.PER_FORMAT else []
        return run_key(
            self.params["digest"], metric.NAME, metric.VERSION, formats, digest, known, self.params["seed"]
        )

    def plan(self) -> list[str]:
        """``metric/step`` for every step, then ``metric/finish``."""
        keys: list[str] = []
        for name, metric in self.metrics.items():
            keys += [f"{name}/{step}" for step in metric.plan(self.context)]
            keys.append(f"{name}/{_FINISH}")
        return keys

    def runs(self) -> list[dict[str, Any]]:
        """What the store has to know about each run before its first row."""
        return [self._description(m) for m in self.metrics.values()]

    def run(self, key: str) -> dict[str, Any]:
        """Rows of one step, for the run they belong to."""
        name, _, step = key.partition("/")
        metric = self.metrics[name]
        run = self.run_of(metric)
        if name != self._current:
            self._finish_earlier(name)
            self._current = name
        parts = self.home.runs(run)
        if step == _FINISH:
            rows = finish_metric(metric, self.context, parts)
        else:
            rows = run_step(metric, self.context, parts, step)
        return {"rows": {run: [_listed(r) for r in rows]}, "note": f"{metric.NAME}: {step}"}

    def _finish_earlier(self, name: str) -> None:
        """Runs of the metrics before ``name`` are complete now: people can use them while the job goes on."""
        store = Store(self.home)
        for earlier in itertools.takewhile(lambda n: n != name, self.metrics):
            run = self.run_of(self.metrics[earlier])
            if f"{earlier}/{_FINISH}" in store.steps_done(run):
                store.finish_run(run)

    def finish(self) -> dict[str, Any]:
        """The runs of this job by metric."""
        return {
            "runs": {name: self.run_of(m) for name, m in self.metrics.items()},
            "formats": self.params["formats"],
        }

    def _description(self, metric: Metric) -> dict[str, Any]:
        needs_text = metric.NEEDS != "weights"
        calibration = self.context.calibration if needs_text else None
        provenance = Provenance(
            model_digest=self.params["digest"],
            model_name=self.context.index.name,
            calibration_digest=calibration.digest if calibration else "",
            tokens=calibration.size if calibration else 0,
            seed=self.params["seed"],
            settings={"source": calibration.source, **calibration.settings} if calibration else {},
            versions={p: importlib.metadata.version(p) for p in ("bitatlas", "torch", "transformers")},
            device=self.context.device,
        )
        return {
            "run": self.run_of(metric),
            "model_digest": self.params["digest"],
            "metric": metric.NAME,
            "settings": {k: v for k, v in self.params["settings"].items() if k in metric.SETTINGS},
            "formats": self.params["formats"] if metric.PER_FORMAT else [],
            "calibration": calibration.digest if calibration else "",
            "provenance": provenance.to_dict(),
        }


def _listed(row: DamageRow) -> list[Any]:
    return [row.metric, row.unit, row.format, row.value, row.stderr, row.count, row.floor]
