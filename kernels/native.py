"""C sources of ours, compiled once with the machine's compiler; absent without one.

A shared library lies in the user's cache folder under the hash of source, compiler and processor, so nothing is
compiled twice and a library from another machine is never loaded. ``BITATLAS_KERNELS=torch`` switches all of them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["compiled", "switched_off"]

_FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")


def switched_off() -> bool:
    """Whether the person wants plain torch."""
    return os.environ.get("BITATLAS_KERNELS") == "torch"


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "bitatlas" / "kernels"


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(line for line in lines[:60] if line.startswith(("model name", "flags", "Features")))
    except OSError:
        return platform.processor()


def compiled(source: str, *more: str) -> ctypes.CDLL | None:
    """The library of a C file beside this one; None where there is no compiler, or it fails. ``more`` are further flags."""
    compiler = shutil.which(os.environ.get("CC", "")) or shutil.which("cc") or shutil.which("gcc")
    if compiler is None or sys.byteorder != "little" or sys.platform == "win32":
        return None
    file = Path(__file__).with_name(source)
    parts = [file.read_text(encoding="utf-8"), compiler, *_FLAGS, *more, _processor()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    path = _cache_folder() / f"{file.stem}-{key[:24]}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=path.parent) as work:
                made = Path(work) / path.name
                command = [compiler, *_FLAGS, *more, "-o", str(made), str(file), "-lm"]
                subprocess.run(command, check=True, capture_output=True, timeout=120)
                os.replace(made, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
