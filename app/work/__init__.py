"""What a job of each kind does: ``plan``, ``run(step)``, ``finish``. See `bitatlas.app.jobs.work.Work`.

`WORKS` is the table: kind -> ``module:Class``. Text, not classes, so that reading it imports nothing.
"""

from __future__ import annotations

__all__ = ["WORKS"]

WORKS: dict[str, str] = {
    "measure": "bitatlas.app.work.measure:MeasureWork",
    "random_allocations": "bitatlas.app.work.random_allocations:RandomAllocationsWork",
    "search": "bitatlas.app.work.search:SearchWork",
    "verify": "bitatlas.app.work.verify:VerifyWork",
    "pack": "bitatlas.app.work.pack_job:PackWork",
    "answers": "bitatlas.app.work.answers:AnswersWork",
}
