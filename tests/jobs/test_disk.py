"""Jobs on a disk that fills up, and in a folder that is read-only. Needs root, for a small tmpfs."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from bitatlas.analysis.schema import UserError
from bitatlas.app.jobs.service import Jobs
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store


@pytest.fixture
def small(tmp_path, bench):
    """The bench, its home on a tmpfs of 24 MB."""
    if not shutil.which("mount") or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("NOT TESTED, jobs on a full disk: mounting a small tmpfs needs root")
    point = tmp_path / "disk"
    point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(point)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"NOT TESTED, a small disk cannot be mounted here: {done.stderr.strip()}")
    bench.home = Home(point / "home")
    bench.jobs = Jobs(bench.home)
    yield bench
    bench.kill_workers()
    bench.until(lambda: not bench.engines(), 10)
    subprocess.run(["umount", "-l", str(point)], check=False)


def fill(home: Home) -> None:
    with open(home.root / "filler", "wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))

        except OSError:
            return


@pytest.mark.slow
def test_a_full_disk_fails_the_job_and_resume_ends_it(small):
    job = small.jobs.submit(small.toy(steps=8, seconds=0.5))
    small.until(lambda: small.jobs.job(job).done >= 2, 30, "two steps")
    fill(small.home)
    small.until(lambda: not small.engines(), 30, "the job breaks off")
    # Nothing can be written, not even that it failed; the client sees it from the disk and the old heartbeat.
    small.until(
        lambda: "disk is full" in small.jobs.job(job).note or small.jobs.job(job).state == "failed", 30
    )
    assert len(Store(small.home).rows("r")) == 3 * len(Store(small.home).steps_done("r"))
    (small.home.root / "filler").unlink()
    small.jobs.resume(job)
    assert small.jobs.wait(job, timeout_s=90).state == "done"
    small.assert_complete("r", 8)


def test_a_read_only_home_is_said_so(small):
    point = small.home.root.parent
    subprocess.run(["mount", "-o", "remount,ro", str(point)], check=True)
    with pytest.raises(UserError, match="read-only"):
        small.jobs.submit(small.toy())
    assert not small.workers()
    subprocess.run(["mount", "-o", "remount,rw", str(point)], check=True)
