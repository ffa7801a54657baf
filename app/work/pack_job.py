"""The packing job: `app.work.pack.Packer`, a shard a step."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from bitatlas.analysis.calibration import load_tokenizer, make_calibration
from bitatlas.app.jobs.work import Work
from bitatlas.app.work.checkpoint import loadable, unchanged
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
        index = unchanged(self.params)
        allocation = Store(self.home).allocation(p["allocation"])
        source = loadable(index, self.home)
        calibration = None
        if p.get("calibration"):
            calibration = make_calibration(
                load_tokenizer(source.path), p["calibration"], p["tokens"], p["seq_len"], p["seed"],
                vocab_size=source.vocab_size,
            )  # fmt: skip
        return Packer(
            index, allocation, p["output"], quantizer=p["quantizer"], source=source, calibration=calibration
        )

    def plan(self) -> list[str]:
        """One step per shard. Claims the output folder, so that a wrong folder or a small disk shows at once."""
        _ = self.packer.writer
        return self.packer.plan()

    def run(self, key: str) -> dict[str, Any]:
        """Write one shard."""
        return self.packer.run(key)

    def finish(self) -> dict[str, Any]:
        """Folder, bytes written, bytes predicted."""
        return self.packer.finish()
