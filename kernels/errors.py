"""The one error type that means "your input, not our fault". Torch-free; the lowest layer, so all may raise it."""

from __future__ import annotations

__all__ = ["UserError"]


class UserError(ValueError):
    """The user's input is wrong. Says what is wrong, what was found, and what to do.

    The command line prints it without a traceback and exits with 2; pages show it as a box.

    Args:
        what: one sentence, what is wrong (``"the shard is truncated"``).
        found: what was found, with the numbers or names (``"model-00001.safetensors has 12 of 40 bytes"``).
        fix: what to do next (``"download the file again"``).
    """

    def __init__(self, what: str, *, found: str = "", fix: str = "") -> None:
        self.what = what
        self.found = found
        self.fix = fix
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.what.rstrip(".") + "."]
        if self.found:
            parts.append(f"Found: {self.found.rstrip('.')}.")
        if self.fix:
            parts.append(f"Try: {self.fix.rstrip('.')}.")
        return " ".join(parts)

    def to_dict(self) -> dict[str, str]:
        """The same as a JSON object, for ``--json`` and for the job log."""
        return {"error": self.what, "found": self.found, "fix": self.fix}
