"""What every part of the store shares: the database and the folder of copies."""

from __future__ import annotations

from bitatlas.cache.connect import Database
from bitatlas.cache.copies import Copies

__all__ = ["Part"]


class Part:
    """Base of the store's parts; `Store` is all of them in one object."""

    db: Database
    copies: Copies
