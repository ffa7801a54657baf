"""K and V bits on the Fit page: presets, the KV metric's own plan for this memory, or a table to edit layer by layer."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import KV_DAMAGES, UserError
from bitatlas.app.kv_plan import KV_BITS, decode_kv, encode_kv
from bitatlas.app.sizes import format_bytes
from bitatlas.app.studies import Study
from bitatlas.app.views import kv as views
from bitatlas.app.views.fit_controls import Asked
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import error_box

__all__ = ["kv_controls"]

_PRESETS = {"all 16": "16/16", "all 8": "8/8", "K 8 / V 4": "8/4", "K 4 / V 8": "4/8", "all 4": "4/4"}
_METRIC, _LAYERS = "by the KV metric", "layer by layer"


def kv_controls(study: Study, asked: Asked) -> Asked:
    """The question with the bits of K and V that are chosen here."""
    geometry = study.index.kv
    if geometry is None or not asked.context:
        return asked
    metric = next((m for m in KV_DAMAGES if m in study.kv), "")
    options = [*_PRESETS, *([_METRIC] if metric else []), _LAYERS]
    chosen = st.selectbox("K and V of the cache", options, key="kv_preset", bind="query-params",
                          help="By the KV metric: the split of this memory, and the bits of each layer, with the least predicted damage.")  # fmt: skip
    text = _PRESETS.get(chosen, "16/16")
    try:
        if chosen == _METRIC:
            text = _by_metric(study, asked, metric)
        elif chosen == _LAYERS:
            text = _by_layer(geometry.layers)
        bits = decode_kv(text, geometry.layers)
    except UserError as error:
        error_box(error)
        return asked
    plan = replace(asked, kv=encode_kv(bits))
    mean = sum(k + v for k, v in bits.values()) / max(2 * len(bits), 1)
    words = (
        f"{mean:.2g} bits on average"
        if len(set(bits.values())) > 1
        else f"K {bits[geometry.layers[0]][0]}, V {bits[geometry.layers[0]][1]} bits"
    )
    with st.container(horizontal=True, vertical_alignment="center"):
        st.caption(f"{words}; {format_bytes(_bytes(study, plan))} of cache")
        if chosen != _LAYERS:
            st.button("Edit by layer", on_click=_edit, args=(plan.kv,), type="tertiary", key="kv_edit")
    return plan


def _bytes(study: Study, asked: Asked) -> int:
    try:
        return asked.budget(study.index).kv_bytes
    except UserError:
        return 0  # the page says what is wrong with the budget


def _edit(text: str) -> None:
    st.session_state["kv_plan"] = text
    st.session_state["kv_preset"] = _LAYERS


def _by_metric(study: Study, asked: Asked, metric: str) -> str:
    if not asked.formats or study.index.kv is None:
        return "16/16"
    _, front = fit_cache.front(study, asked.metric, asked.formats, {})
    left = asked.total_bytes - study.index.kept_bytes - asked.reserve_bytes
    return views.best_bits(
        front, study.kv[metric], study.index.kv, memory=left, context=asked.context, batch=asked.batch
    )


def _by_layer(layers: tuple[int, ...]) -> str:
    """A line of text, which the link keeps, and the same as a table."""
    text = (
        st.text_input(
            "Bits of K/V by layer", key="kv_plan", bind="query-params", placeholder="8/4, or 0-5=8/8;6-29=8/4"
        )
        or "16/16"
    )
    bits = decode_kv(text, layers)
    frame = pd.DataFrame(
        {"layer": list(bits), "K": [k for k, _ in bits.values()], "V": [v for _, v in bits.values()]}
    )
    # The text is part of the key: what was edited is in it, and the table starts anew from there.
    key = f"kv_table {text}"

    def edited() -> None:
        changed = dict(bits)
        for row, cells in st.session_state[key]["edited_rows"].items():
            layer = int(frame["layer"].iloc[int(row)])
            k, v = changed[layer]
            changed[layer] = int(cells.get("K") or k), int(cells.get("V") or v)
        st.session_state["kv_plan"] = encode_kv(changed)

    column = st.column_config.SelectboxColumn
    st.data_editor(frame, hide_index=True, key=key, on_change=edited, height=min(38 + 35 * len(frame), 260), disabled=["layer"],
                   column_config={"K": column(options=list(KV_BITS), required=True), "V": column(options=list(KV_BITS), required=True)})  # fmt: skip
    return text
