"""The same jobs on PostgreSQL: a server of the test's own, on loopback, stopped afterwards."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from bitatlas.app.jobs.service import Jobs
from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store


def _binaries() -> Path | None:
    if shutil.which("initdb"):
        return Path(shutil.which("initdb")).parent
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return found[-1] if found else None


@pytest.fixture(scope="module")
def server():
    """URL of a fresh PostgreSQL server."""
    binaries = _binaries()
    if binaries is None or os.name != "posix":
        pytest.skip("NOT TESTED, jobs on PostgreSQL: no server installed (Debian: apt install postgresql)")
    prefix: list[str] = []
    folder = Path(tempfile.mkdtemp(prefix="bitatlas-pg-"))
    if os.geteuid() == 0:
        # The server refuses to run as root.
        if not shutil.which("runuser") or "postgres" not in {p.pw_name for p in pwd.getpwall()}:
            pytest.skip("NOT TESTED, jobs on PostgreSQL: runs as root and there is no user postgres")
        prefix = ["runuser", "-u", "postgres", "--"]
        shutil.chown(folder, "postgres", "postgres")
    (folder / "password").write_text("secret")
    (folder / "password").chmod(0o644)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    data = folder / "data"

    def run(*command: str) -> None:
        done = subprocess.run([*prefix, *command], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            pytest.skip(f"NOT TESTED, jobs on PostgreSQL: {command[0]}: {done.stderr or done.stdout}")

    run(str(binaries / "initdb"), "-D", str(data), "-U", "atlas", "-A", "scram-sha-256",
        f"--pwfile={folder / 'password'}", "--no-sync")  # fmt: skip
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    run(str(binaries / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql://atlas:secret@127.0.0.1:{port}/jobs"
    subprocess.run(
        [*prefix, str(binaries / "pg_ctl"), "-D", str(data), "-m", "immediate", "stop"], check=True
    )
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
def test_jobs_on_postgres(server, bench, monkeypatch, tmp_path):
    monkeypatch.setenv("BITATLAS_JOBS_URL", server)
    assert bench.jobs.jobs() == []
    job = bench.jobs.submit(bench.toy(steps=8, seconds=0.3))
    assert bench.jobs.submit(bench.toy(steps=8, seconds=0.3)) == job
    bench.until(lambda: bench.jobs.job(job).done >= 2, 30, "two steps")
    bench.kill_workers()
    bench.jobs.start_worker_if_needed()
    bench.until(lambda: bench.jobs.job(job).done >= 4, 30, "going on")
    bench.jobs.cancel(job)
    bench.until(lambda: not bench.engines(), 10, "the engine is gone")
    bench.jobs.resume(job)
    assert bench.jobs.wait(job, timeout_s=60).state == "done"
    bench.assert_complete("r", 8)
    assert len(bench.computed(job)) <= 10
    assert not bench.home.jobs_db.exists()

    # A machine that dies for good: another one takes its job, and its own store is complete.
    job = bench.jobs.submit(bench.toy("moved", steps=6, seconds=0.3))
    bench.until(lambda: bench.jobs.job(job).done >= 2, 30, "two steps")
    bench.kill_workers()
    other = type(bench)(Home(tmp_path / "other"))
    try:
        bench.until(lambda: other.jobs.job(job).state == "interrupted", 30, "the silence is noticed")
        other.jobs.resume(job)
        assert other.jobs.wait(job, timeout_s=60).state == "done"
        other.assert_complete("moved", 6)
        assert len(Store(bench.home).steps_done("moved")) >= 2
        assert [j.id for j in Jobs(bench.home).jobs()][0] == job
    finally:
        other.kill_workers()
        bench.until(lambda: not other.engines(), 10)
