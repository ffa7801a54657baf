"""A frontier as bytes: an .npz without pickles, the names as JSON beside the arrays."""

from __future__ import annotations

import io
import json
from math import isnan

import numpy as np

from bitatlas.analysis.schema import Frontier, UserError

__all__ = ["decode_frontier", "encode_frontier"]


def encode_frontier(frontier: Frontier) -> bytes:
    """Compressed bytes of a frontier; neighbouring points are nearly alike, so they shrink a lot."""
    head = {
        "units": frontier.units,
        "formats": frontier.formats,
        "metric": frontier.metric,
        "solver": frontier.solver,
        "cost": [
            None if isnan(frontier.seconds) else frontier.seconds,
            int(frontier.evaluations),
            int(frontier.tokens),
        ],
    }
    out = io.BytesIO()
    np.savez_compressed(
        out,
        head=np.frombuffer(json.dumps(head).encode(), np.uint8),
        payload_bytes=np.asarray(frontier.payload_bytes, np.int64),
        predicted=np.asarray(frontier.predicted, np.float64),
        choice=np.asarray(frontier.choice, np.uint8),
        supported=np.asarray(frontier.supported, bool),
        kv_bytes=np.asarray(frontier.kv_bytes, np.int64),
    )
    return out.getvalue()


def decode_frontier(data: bytes) -> Frontier:
    """Inverse of `encode_frontier`.

    Raises:
        UserError: not such a file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as z:
            head = json.loads(bytes(z["head"]).decode())
            seconds, evaluations, tokens = head.get("cost", (None, 0, 0))
            return Frontier(
                tuple(head["units"]), tuple(head["formats"]), z["payload_bytes"], z["predicted"], z["choice"],
                head["metric"], head["solver"], z["supported"] if "supported" in z.files else np.zeros(0, bool),
                float("nan") if seconds is None else float(seconds), int(evaluations), int(tokens),
                z["kv_bytes"] if "kv_bytes" in z.files else np.zeros(0, np.int64),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError("this is not a frontier file", found=str(e)) from None
