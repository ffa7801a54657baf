"""`bitatlas doctor`: one line per thing that can be wrong, each with what to do. Works when torch is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable

from bitatlas.app.sizes import format_bytes

__all__ = ["report"]


def _line(name: str, state: str, found: str, fix: str = "") -> dict[str, str]:
    return {"check": name, "state": state, "found": found, "fix": fix}


def _package(name: str, needed_for: str, required: bool) -> dict[str, str]:
    # find_spec does not execute the package, so a broken native library cannot take doctor down.
    if importlib.util.find_spec(name) is None:
        return _line(
            name, "fail" if required else "warn", "not installed", f"pip install {name} ({needed_for})"
        )
    try:
        version = importlib.metadata.version({"pulp": "PuLP"}.get(name, name))
    except importlib.metadata.PackageNotFoundError:
        version = "unknown version"
    return _line(name, "ok", version)


def _python() -> dict[str, str]:
    ok = sys.version_info >= (3, 11)
    return _line(
        "python", "ok" if ok else "fail", sys.version.split()[0], "" if ok else "install Python 3.11 or newer"
    )


def _home() -> dict[str, str]:
    from bitatlas.cache.paths import Home

    home = Home.default()
    probe = home.root / ".doctor"
    try:
        home.root.mkdir(parents=True, exist_ok=True)
        probe.write_text("ok")
        probe.unlink()
    except OSError as error:
        return _line(
            "data folder",
            "fail",
            f"{home.root}: {error}",
            "set BITATLAS_HOME to a folder that can be written",
        )
    free = shutil.disk_usage(home.root).free
    low = free < 5 << 30
    return _line("data folder", "warn" if low else "ok", f"{home.root}, {format_bytes(free)} free",
                 "packing large models needs more" if low else "")  # fmt: skip


def _store() -> dict[str, str]:
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    store = Store(Home.default())
    return _line("store", "ok", f"{len(store.models())} models")


def _sqlite() -> dict[str, str]:
    return _line("sqlite", "ok", sqlite3.sqlite_version)


def _memory() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _line(
        "memory",
        "ok",
        f"{format_bytes(memory.available)} of {format_bytes(memory.total)} free, {cores} cores",
    )


def _gpu() -> dict[str, str]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return _line("gpu", "warn", f"torch does not load: {error}", "scan, solve and export work without it")
    if not torch.cuda.is_available():
        return _line("gpu", "ok", f"none (torch {torch.__version__} on CPU)")
    name = torch.cuda.get_device_name(0)
    return _line("gpu", "ok", f"{name}, {format_bytes(torch.cuda.get_device_properties(0).total_memory)}")


# (name, what it is needed for, required)
_PACKAGES = (
    ("torch", "measuring and packing", True),
    ("transformers", "loading models", True),
    ("safetensors", "reading weights", True),
    ("duckdb", "results", True),
    ("dbos", "jobs", True),
    ("pulp", "the ILP solver", True),
    ("streamlit", "the dashboard", True),
    ("plotly", "the dashboard", True),
    ("triton", "GPU kernels", False),
    ("gguf", "reading GGUF files", False),
)


def report() -> list[dict[str, str]]:
    """All checks, worst news included: check, state (ok, warn, fail), found, fix."""
    lines = [_python(), *(_package(*p) for p in _PACKAGES)]
    checks: tuple[tuple[str, Callable[[], dict[str, str]]], ...] = (
        ("memory", _memory), ("gpu", _gpu), ("sqlite", _sqlite), ("data folder", _home), ("store", _store),
    )  # fmt: skip
    for name, check in checks:
        try:
            lines.append(check())
        except Exception as error:  # noqa: BLE001 - doctor reports what is broken instead of breaking
            lines.append(_line(name, "fail", f"{type(error).__name__}: {error}", "see the message"))
    return lines
