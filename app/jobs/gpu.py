"""One GPU for one job, claimed before torch is imported. Knows nothing of torch."""

from __future__ import annotations

import os
from pathlib import Path

from filelock import FileLock, Timeout

from bitatlas.cache.paths import Home

__all__ = ["claim_gpu", "visible_gpus"]

_held: list[FileLock] = []


def visible_gpus(driver: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """GPUs this process may use: those of ``$CUDA_VISIBLE_DEVICES``, else those the driver lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [g.strip() for g in named.split(",") if g.strip() and g.strip() != "-1"]
    return [str(i) for i, _ in enumerate(sorted(driver.iterdir()))] if driver.is_dir() else []


def claim_gpu(home: Home, gpus: list[str]) -> str | None:
    """Claim the first free one of ``gpus`` for this process and set ``CUDA_VISIBLE_DEVICES`` to it.

    The claim is a file lock, so it ends with the process however that ends. With none free the variable is
    set empty and the job computes on the CPU.

    Returns:
        The claimed one; None when there is none.
    """
    folder = home.folder("gpus") if gpus else home.root
    for gpu in gpus:
        lock = FileLock(str(folder / f"{gpu.replace('/', '_')}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        return gpu
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return None
