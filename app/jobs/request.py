"""What somebody wants done. The same request is the same job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bitatlas.cache.keys import canonical

__all__ = ["JobRequest"]


@dataclass(frozen=True)
class JobRequest:
    """A kind of work with its parameters.

    Attributes:
        kind: a key of `bitatlas.app.work.WORKS`.
        params: JSON-able; names everything the result depends on (model digest, text digest, seed, …).
        title: for people; not part of the identity.
    """

    kind: str
    params: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""

    @property
    def id(self) -> str:
        """16 hex digits of the SHA-256 of kind and parameters: two equal requests are one job."""
        text = canonical({"kind": self.kind, "params": dict(self.params)})
        return hashlib.sha256(text.encode()).hexdigest()[:16]
