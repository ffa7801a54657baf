"""Fit's further limits: the engine that has to load the answer, and most bytes for groups of units."""

from __future__ import annotations

from dataclasses import replace

import streamlit as st

from bitatlas.app import state
from bitatlas.app.studies import Study
from bitatlas.app.targets import TARGETS
from bitatlas.app.views.fit_controls import Asked

__all__ = ["COUNTED", "NO_GROUPS", "grouping_text", "limit_controls", "split_limits"]

_ANY, NO_GROUPS = "any", "not at all"
COUNTED = ("frequency", "damage", "cluster")
"""Ways of grouping that take a number of groups."""


def limit_controls(study: Study, asked: Asked) -> Asked:
    """The question with the engine and the limits on groups that are chosen here."""
    target = st.selectbox("Engine", (_ANY, *TARGETS), key="fit_target", bind="query-params",
                          help="Only formats that it loads, units that it stores alike kept together, in its own bytes.")  # fmt: skip
    experts = ("frequency", "cluster") if study.index.n_experts else ()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        by = st.selectbox("Limits by", (NO_GROUPS, "layer", "role", "damage", *experts, "selection"), key="fit_groups", bind="query-params",
                          help="Most bytes for groups of units. Selection: the units that are boxed or lassoed on the Map.")  # fmt: skip
        parts = 4
        if by in COUNTED:
            parts = int(st.number_input("Groups", 2, 16, 4, key="fit_parts", bind="query-params", width=110))
        text = ""
        if by != NO_GROUPS:
            text = st.text_input("Limits", key="fit_limits", bind="query-params", placeholder=_example(by),
                                 help="Most bits per weight, or most bytes, that a group may take; * stands for the others.")  # fmt: skip
    limits, grouping = split_limits(text), grouping_text(by, parts)
    return replace(
        asked,
        target="" if target == _ANY else target,
        groups=grouping if limits else "",
        group_limits=limits if grouping else (),
    )


def grouping_text(by: str, parts: int) -> str:
    """What is chosen in a menu of groupings as `app.expert_groups` reads it; "" for none, and for an empty selection."""
    if by == "selection":
        chosen = state.selection()
        return f"units:{chosen.encode()}" if len(chosen) else ""
    return "" if by == NO_GROUPS else f"{by}:{parts}" if by in COUNTED else by


def split_limits(text: str) -> tuple[str, ...]:
    """``q1=2.5, *=4`` -> its parts."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _example(by: str) -> str:
    return {"layer": "0=5, *=3.5", "role": "down=3, q=200MB", "selection": "selected=3"}.get(
        by, "q1=2.5, *=4"
    )
