"""What was clicked or boxed in a chart."""

from __future__ import annotations

from typing import Any

import streamlit as st

__all__ = ["drawn", "picked", "picked_ids"]


def picked_ids(event: Any) -> list[int]:
    """The integer ids in ``customdata`` (its first column) of a Plotly selection, sorted, without repeats.

    Point indices are per trace, so they are no use with several traces. A row of a typed array arrives as a
    mapping ``{"0": …}``, a plain row as a list, a single column as a number.
    """
    points = (event or {}).get("selection", {}).get("points", [])
    ids = set()
    for p in points:
        data = p.get("customdata")
        if isinstance(data, dict):
            data = data.get("0")
        elif isinstance(data, (list, tuple)):
            data = data[0] if data else None
        if data is not None:
            ids.add(int(data))
    return sorted(ids)


def picked(key: str) -> list[int]:
    """`picked_ids` of the chart with this key, in its ``on_select`` callback."""
    return picked_ids(st.session_state.get(key))


def drawn(key: str) -> Any:
    """The event of the chart with this key: boxes and lassos for `views.regions`."""
    return st.session_state.get(key)
