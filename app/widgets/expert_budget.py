"""The part of the Experts page that spends a budget: groups, limits, floors, ties."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import state
from bitatlas.app.charts import expert_budget as charts
from bitatlas.app.expert_groups import ExpertGroups, group_experts, tokens_reached
from bitatlas.app.expert_rules import TIES, ExpertRules
from bitatlas.app.studies import Study
from bitatlas.app.views import expert_budget as views
from bitatlas.app.views import fit_controls
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import error_box
from bitatlas.app.widgets.kept import kept
from bitatlas.app.widgets.limit_controls import COUNTED, NO_GROUPS, grouping_text, split_limits
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["expert_budget"]

_GROUPS = (NO_GROUPS, "layer", "frequency", "damage", "cluster", "selection")


def expert_budget(study: Study, metric: str) -> None:
    """Draw it; ``metric`` is the damage that is minimised."""
    if not st.toggle("A budget for the experts", key="expert_budget", bind="query-params",
                     help="Groups with limits of their own, floors for rare experts, what a token reads."):  # fmt: skip
        return
    formats = tuple(fit_controls.usual(study.tables[metric].formats))
    rules, bits = _controls(study, formats)
    pins = {study.keys[i]: f for i, f in state.pins().items()}
    limit = int(bits * study.index.params / 8)
    try:
        groups = _groups(study, rules.groups, metric)
        problem, cache = fit_cache.front(study, metric, formats, pins, rules)
        _, free = fit_cache.front(study, metric, formats, pins)
        view = views.build(
            study.index,
            problem,
            cache,
            limit,
            groups,
            tokens_reached(study.index, study.tables),
            free if rules else None,
        )
        both = kept(
            study,
            "expert_fronts",
            metric,
            formats,
            tuple(sorted(pins.items())),
            rules,
            make=lambda: views.fronts(study.index, problem, cache),
        )
    except UserError as error:
        error_box(error)
        return
    st.markdown(f"**{view.title}.** {view.detail}")
    left, right = st.columns([1.15, 1], gap="large")
    with left:
        axis = st.segmented_control("Across", charts.AXES, default=charts.AXES[0], required=True, key="expert_axis", bind="query-params") or charts.AXES[0]  # fmt: skip
        unit = fit_cache.unit_of(metric)
        st.plotly_chart(charts.front(both, view, axis, metric, unit, current_palette()), key="expert_front", theme=None,
                        config={"displayModeBar": False}, alt=f"{view.title}: damage over {axis}")  # fmt: skip
    with right:
        _table(study, view)
    asked = {"expert_groups": rules.groups, "group_limit": list(rules.limits), "rare_floor": rules.floor,
             "rare_below": rules.below if rules.floor else None, "expert_ties": rules.ties if rules.ties != "free" else None}  # fmt: skip
    cli_twin(command("solve", study.index.path, metric=metric, bits=f"{bits:g}", solver="hull", formats=",".join(formats),
                     **(asked if rules else {}), output="allocation.json"))  # fmt: skip


def _controls(study: Study, formats: tuple[str, ...]) -> tuple[ExpertRules, float]:
    with st.container(horizontal=True, vertical_alignment="bottom", gap="small"):
        bits = st.slider(
            "Bits per weight, all units",
            2.0,
            8.5,
            4.0,
            step=0.05,
            key="expert_bits",
            bind="query-params",
            width=260,
        )
        by = st.selectbox("Group experts by", _GROUPS, key="expert_group", bind="query-params", width=150,
                          help="Selection: the experts that are boxed or lassoed on the map above.")  # fmt: skip
        parts = 4
        if by in COUNTED:
            parts = int(
                st.number_input("Groups", 2, 16, 4, key="expert_parts", bind="query-params", width=110)
            )
        text = ""
        if by != NO_GROUPS:
            text = st.text_input("Limits", key="expert_limits", bind="query-params", placeholder="q1=2.5, q4=200MB, *=4", width=210,
                                 help="Most bits per weight, or most bytes, that a group may take; * stands for the others.")  # fmt: skip
        floor = st.selectbox("Floor for rare experts", ("", *formats), key="expert_floor", bind="query-params", width=150,
                             format_func=lambda f: f or "none")  # fmt: skip
        below = 1
        if floor:
            below = int(st.number_input("Rare: fewer tokens than", 1, 1_000_000, 1, key="expert_below", bind="query-params", width=150,
                                        help="1 = never reached."))  # fmt: skip
        ties = st.selectbox("Same format for", TIES, key="expert_ties", bind="query-params", width=150,
                            format_func=lambda t: {"free": "nothing", "gate-up": "gate and up", "expert": "a whole expert", "layer": "a layer's experts"}[t])  # fmt: skip
    limits = split_limits(text)
    return ExpertRules(grouping_text(by, parts), limits, floor, below, ties), float(bits)


def _groups(study: Study, grouping: str, metric: str) -> ExpertGroups | None:
    if not grouping:
        return None
    return kept(
        study,
        "expert_groups",
        grouping,
        metric,
        make=lambda: group_experts(study.index, study.tables, grouping, metric),
    )


def _table(study: Study, view: views.ExpertBudgetView) -> None:
    frame = pd.DataFrame(
        [{"group": r.group, "experts": r.experts, "tokens": r.tokens, "bits": r.bits, "limit": r.limit and r.limit * r.bits / max(r.nbytes, 1),
          "bytes": r.nbytes, "damage": r.share} for r in view.rows]
    )  # fmt: skip
    number = st.column_config.NumberColumn
    st.dataframe(
        frame, hide_index=True, key="expert_groups_table", height=min(38 + 35 * len(frame), 340),
        column_config={"bits": number(format="%.2f"), "limit": number(format="%.2f", help="bits per weight"), "bytes": number(format="localized"),
                       "tokens": number(format="percent", help="share of the tokens"), "damage": number(format="percent", help="share of the predicted damage")},
    )  # fmt: skip
    downloads(f"{study.index.name}-expert-budget", lambda: frame, view.to_dict, "expert_budget")
