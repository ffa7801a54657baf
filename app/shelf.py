"""Long pieces of a link (selections of thousands of units) live here, under a short content key.

A query string holds 512 KiB at most and people paste links; anything longer than a line is stored once under
``$BITATLAS_HOME/views/`` and named by its hash, so that equal views have equal links in every browser.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from bitatlas.analysis.schema import UserError

__all__ = ["INLINE", "Shelf"]

INLINE = 160
"""Characters that may stand in the URL itself."""


class Shelf:
    """Content-addressed text files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, text: str) -> str:
        """``text`` itself when short, else ``@key`` of the file that holds it."""
        if len(text) <= INLINE:
            return text
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = self.folder / f"{key}.txt"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            tmp = path.with_suffix(f".{os.getpid()}.tmp")
            tmp.write_text(text)
            os.replace(tmp, path)
        return "@" + key

    def get(self, word: str) -> str:
        """Inverse of `put`.

        Raises:
            UserError: the key is malformed, or the file is gone (another machine, a cleaned home).
        """
        if not word.startswith("@"):
            return word
        path = self.folder / f"{word[1:]}.txt"
        if not re.fullmatch(r"@[0-9a-f]{16}", word) or not path.is_file():
            raise UserError(
                "this link names a selection that is not stored here",
                found=word,
                fix="links with large selections work on the machine that made them; clear the selection",
            )
        return path.read_text()
