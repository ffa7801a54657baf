"""The embedded demo: a small trained MoE, its texts, and a finished sample study."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from bitatlas.cache.paths import Home
from bitatlas.cache.store import Store

__all__ = ["demo", "demo_path", "demo_text"]


def _folder() -> Path:
    # The package is always unpacked on disk: a zipped install could not be memory-mapped.
    return Path(str(resources.files("bitatlas.app"))) / "demo"


def demo_path() -> Path:
    """Folder of the demo model, an ordinary checkpoint."""
    return _folder() / "shakespeare-moe"


def demo_text(kind: str) -> Path:
    """``calibration`` or ``eval``: the texts that come with the demo."""
    return _folder() / "text" / f"{kind}.txt"


def demo() -> dict[str, Any]:
    """Put the sample study, or what a newer one has more, into the store; say where the model is."""
    from bitatlas.app.tasks.models import open_index

    store = Store(Home.default())
    index = open_index(demo_path())
    shipped = {file.stem for file in (_folder() / "study" / "runs").glob("*.parquet")}
    if not shipped <= {r.run for r in store.runs(index.digest)}:
        store.import_study(_folder() / "study", str(demo_path()))
    store.put_model(index)
    return {"path": str(demo_path()), "digest": index.digest, "runs": len(store.runs(index.digest)),
            "allocations": len(store.allocations(index.digest))}  # fmt: skip
