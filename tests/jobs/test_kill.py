"""The worker is killed with -9 at random moments; every job ends complete and nothing acknowledged is lost."""

from __future__ import annotations

import random
import time

import pytest

from bitatlas.cache.store import Store


def kill_at_random(bench, kills: int, steps: int, seed: int) -> None:
    rng = random.Random(seed)
    store = Store(bench.home)
    jobs: dict[str, str] = {}

    def submit_two() -> None:
        for n in range(len(jobs), len(jobs) + 2):
            jobs[f"k{n}"] = bench.jobs.submit(bench.toy(f"k{n}", steps=steps, seconds=0.1))

    def all_final() -> bool:
        return all(bench.jobs.job(job).final for job in jobs.values())

    def working() -> bool:
        return all_final() or bench.jobs.start_worker_if_needed() or bench.jobs.worker_alive()

    seen: dict[str, dict] = {}
    killed = 0
    while killed < kills:
        if all_final():
            # A fast machine ends its jobs before the last kill: it is given more, so that the count never hangs on speed.
            submit_two()
        bench.until(working, 30, "a worker")
        if not killed:
            # On a slow machine the first seconds pass before there is anything to lose.
            bench.until(lambda: any(bench.jobs.job(job).done for job in jobs.values()), 60, "a first step")
        end = time.monotonic() + rng.uniform(0.0, 4.0)
        while time.monotonic() < end:
            for run, job in jobs.items():
                # What a reader was shown is acknowledged: progress first, then the rows behind it.
                done = bench.jobs.job(job).done
                if run in {r.run for r in store.runs()}:
                    assert len(store.steps_done(run) - {"(finish)"}) >= done
                    seen.setdefault(run, {}).update(
                        {(r.metric, r.unit, r.format): r.value for r in store.rows(run)}
                    )
            time.sleep(rng.uniform(0.0, 0.3))
        killed += bench.kill_workers()
        bench.until(lambda: not bench.engines(), 10, "engines die with their worker")
        states = {bench.jobs.job(job).state for job in jobs.values()}
        assert states <= {"queued", "interrupted", "done"}
        bench.until(working, 30, "the next worker")
    assert seen, "no reader ever saw a row"
    for run, job in jobs.items():
        assert bench.jobs.wait(job, timeout_s=300).state == "done"
        bench.assert_complete(run, steps)
        rows = {(r.metric, r.unit, r.format): r.value for r in store.rows(run)}
        assert seen.get(run, {}).items() <= rows.items()
        begun = bench.computed(job)
        assert set(begun) == {f"s{i}" for i in range(steps)}
        # At most the step in hand is computed again after a kill.
        assert len(begun) <= steps + killed
    assert store.repairs() == []


@pytest.mark.slow
def test_three_kills(bench):
    kill_at_random(bench, 3, 12, seed=1)


@pytest.mark.slow
def test_twenty_kills(bench):
    kill_at_random(bench, 20, 60, seed=2)


def test_a_killed_worker_is_followed_by_another(bench):
    job = bench.jobs.submit(bench.toy(steps=6, seconds=0.3))
    bench.until(lambda: bench.jobs.job(job).done >= 2, 30, "two steps")
    assert bench.kill_workers() == 1
    bench.until(lambda: not bench.engines(), 10, "the engine dies with its worker")
    assert bench.jobs.job(job).state == "interrupted"
    bench.jobs.resume(job)
    assert bench.jobs.wait(job, timeout_s=60).state == "done"
    bench.assert_complete("r", 6)
    assert len(bench.computed(job)) <= 7
