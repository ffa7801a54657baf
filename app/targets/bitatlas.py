"""Our own packed checkpoint: every format, every expert on its own."""

from __future__ import annotations

import shlex

from bitatlas.analysis.schema import Allocation, Format, ModelIndex, UserError
from bitatlas.app.targets.base import Target

__all__ = ["Bitatlas"]


class Bitatlas(Target):
    """`bitatlas pack`, then `from bitatlas.kernels.packed import load`."""

    NAME = "bitatlas"
    TITLE = "bitatlas packed checkpoint"
    SERVES = "transformers through bitatlas.kernels.packed.load"
    KV_ENGINE = "bitatlas"

    def loads(self, fmt: Format) -> bool:
        """All of them."""
        return True

    def check_weights(self, allocation: Allocation, index: ModelIndex, quantizer: str = "rtn") -> None:
        """Always raises: the packer writes them, as a job that can be resumed."""
        raise UserError("`bitatlas pack` writes this checkpoint",
                        fix=f"bitatlas pack {shlex.quote(index.path)} allocation.json -o DIR")  # fmt: skip

    def render(self, allocation: Allocation, index: ModelIndex) -> dict[str, str]:
        """The allocation itself and the commands."""
        return {
            "allocation.json": allocation.to_json(),
            "run.sh": "#!/bin/sh\nset -e\n" + self.command(allocation, index) + "\n",
        }

    def command(self, allocation: Allocation, index: ModelIndex) -> str:
        """Pack, then try it."""
        out = f"{index.name}-packed"
        return (
            f"bitatlas pack {shlex.quote(index.path)} allocation.json -o {shlex.quote(out)}\n"
            f'bitatlas generate {shlex.quote(out)} "Once upon a time"'
        )
