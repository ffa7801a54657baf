"""The pages, in menu order. A new page is a file here with a ``page()`` function and one line in `SCREENS`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SCREENS", "Screen"]


@dataclass(frozen=True, slots=True)
class Screen:
    """One page: ``name`` is the module, the page's address and its place in the menu's ``section``."""

    name: str
    section: str
    title: str
    icon: str
    address: str


SCREENS: tuple[Screen, ...] = (
    Screen("library", "Measure", "Library", ":material/folder_open:", "library"),
    Screen("run", "Measure", "Run", ":material/play_circle:", "run"),
    Screen("sensitivity_map", "Understand", "Map", ":material/grid_on:", "map"),
    Screen("unit", "Understand", "Unit", ":material/search_insights:", "unit"),
    Screen("metric_agreement", "Understand", "Metrics", ":material/compare_arrows:", "metrics"),
    Screen("kv", "Understand", "KV cache", ":material/view_column:", "kv"),
    Screen("experts", "Decide", "Experts", ":material/groups:", "experts"),
    Screen("fit", "Decide", "Fit", ":material/memory:", "fit"),
    Screen("allocators", "Decide", "Allocators", ":material/stacked_line_chart:", "allocators"),
    Screen("compare", "Decide", "Compare", ":material/difference:", "compare"),
    Screen("verify", "Ship", "Verify", ":material/fact_check:", "verify"),
    Screen("export", "Ship", "Export", ":material/output:", "export"),
)
