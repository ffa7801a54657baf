"""The packing job: `app.work.pack.Packer`, a shard a step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from bitatlas.analysis.model_index import index_model
from bitatlas.app.jobs.work import Work
from bitatlas.app.work.checkpoint import loadable
from bitatlas.app.work.pack import Packer
from bitatlas.cache.store import Store

__all__ = ["PackWork"]


class PackWork(Work):
    """Parameters are those of `app.tasks.shipping.submit_pack`."""

    KIND = "pack"

    @cached_property
    def packer(self) -> Packer:
        """Opened once per engine; refuses a checkpoint that changed since the job was asked for."""
        p = self.params
        index = loadable(index_model(p["model"]), self.home)
        return Packer(
            index, Store(self.home).allocation(p["allocation"]), p["output"], quantizer=p["quantizer"]
        )

    def plan(self) -> list[str]:
        """One step per shard."""
        return self.packer.plan()

    def run(self, key: str) -> dict[str, Any]:
        """Write one shard."""
        return self.packer.run(key)

    def finish(self) -> dict[str, Any]:
        """Folder, bytes written, bytes predicted."""
        return self.packer.finish()
