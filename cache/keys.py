"""Content keys: a result is named by what it was made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from bitatlas.analysis.schema import null_nan

__all__ = ["canonical", "digest", "run_key"]

# Bumped when the meaning of a run key changes, so that old results are not taken for new ones.
# 1: first version.
_KEY_VERSION = 1


def canonical(obj: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, NaN and infinities as null.

    Raises:
        TypeError: something JSON cannot carry.
    """
    return json.dumps(
        null_nan(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def digest(obj: Any) -> str:
    """First 20 hex digits (80 bits) of the SHA-256 of the canonical JSON of ``obj``."""
    return hashlib.sha256(canonical(obj).encode()).hexdigest()[:20]


def run_key(
    model_digest: str,
    metric: str,
    version: int,
    formats: Iterable[str],
    calibration_digest: str,
    settings: Mapping[str, Any],
    seed: int,
) -> str:
    """Key of a measurement. The order of the formats does not matter; every other change makes another run."""
    return digest(
        {
            "key": _KEY_VERSION,
            "model": model_digest,
            "metric": metric,
            "version": version,
            "formats": sorted(set(formats)),
            "calibration": calibration_digest,
            "settings": dict(settings),
            "seed": seed,
        }
    )
