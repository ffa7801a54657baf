"""Export: how do I use it?"""

from __future__ import annotations

import streamlit as st

from bitatlas.analysis.schema import Allocation, UserError
from bitatlas.app import tasks
from bitatlas.app.sizes import format_bytes
from bitatlas.app.studies import Study, open_store
from bitatlas.app.targets import TARGETS
from bitatlas.app.views.export import ExportView, build_engines, build_export, first_shown
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.twin import cli_twin, command
from bitatlas.cache.paths import Home
from bitatlas.cache.plans import allocation_id

__all__ = ["page"]

_ICON = {
    "servable": ":material/check_circle:",
    "loads but decodes wrong": ":material/warning:",
    "rejected": ":material/block:",
}
_SHOWN = 12_000  # characters of a file shown on the page; the download has all of it


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.allocations:
        title("There is nothing to export yet")
        empty_state(
            "Export writes what an engine needs to load an allocation.", "Make an allocation", screen="fit"
        )
        return
    head = st.container()
    names = {a.label: a for a in study.allocations}
    first = first_shown([a.solver for a in study.allocations])
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = open_store().allocation(
            names[st.selectbox("Allocation", list(names), first, key="export_allocation", width=420)].id
        )
        engine = TARGETS[
            st.selectbox(
                "Engine",
                list(TARGETS),
                key="target",
                bind="query-params",
                format_func=lambda n: TARGETS[n].TITLE,
                width=300,
            )
        ]
    try:
        view = build_export(engine, chosen, study.index)
    except UserError as error:
        with head:
            title("This cannot be exported")
        error_box(error)
        return
    with head:
        title(view.title)
    _verdict(view)
    _files(view)
    _engines(chosen, study)
    if view.target == "bitatlas":
        _pack(study, chosen)
    st.download_button("Allocation file", chosen.to_json, f"{study.index.name}-{chosen.bits_per_weight:.2f}bpw.json", "application/json",
                       icon=":material/download:", on_click="ignore", key="export_json")  # fmt: skip
    cli_twin(command("export", "allocation.json", target=view.target, output="files"))


def _verdict(view: ExportView) -> None:
    box = {"servable": st.success, "rejected": st.error}.get(view.status, st.warning)
    lines = [f"**{view.status}**", *view.reasons[:8]]
    if len(view.reasons) > 8:
        lines.append(f"and {len(view.reasons) - 8} more")
    if view.change:
        lines.append(f"What helps: {view.change}")
    if view.status != "rejected":
        lines.append(f"{format_bytes(view.bytes)} of weights in the engine's container")
    if view.kv:
        lines.append(f"KV cache: `{view.kv}`")
    box("  \n".join(lines), icon=_ICON[view.status])
    if view.notes:
        st.caption("  \n".join(view.notes))
    if view.units:
        _units(view)


def _units(view: ExportView) -> None:
    """What the engine does not take, unit by unit, and the plan with the smallest change."""
    with st.expander("Unit by unit", icon=":material/list:"):
        st.dataframe(
            [{"unit": u.unit, "planned": u.planned, "smallest change": u.after, "reason": u.reason} for u in view.units],
            hide_index=True, key="refused_units",
        )  # fmt: skip
    if view.repaired:
        st.download_button("Allocation with the smallest change", view.repaired, f"repaired-{view.target}.json", "application/json",
                           icon=":material/build:", on_click="ignore", key="export_repaired")  # fmt: skip
        cli_twin(command("check", "allocation.json", target=view.target, repair="repaired.json"))


def _engines(allocation: Allocation, study: Study) -> None:
    """All engines side by side."""
    rows = build_engines(TARGETS.values(), allocation, study.index)
    with st.expander("Engine by engine", icon=":material/dns:"):
        st.dataframe(
            [
                {"engine": r.engine, "verdict": r.status, "size": format_bytes(r.bytes), "why not": r.reason,
                 "units": r.units, "smallest change": r.change}
                for r in rows
            ],
            hide_index=True, key="engines",
        )  # fmt: skip
        cli_twin(command("check", "allocation.json"))


def _files(view: ExportView) -> None:
    for name, text in view.files.items():
        with st.expander(name, expanded=len(view.files) == 1):
            st.code(
                text[:_SHOWN] + ("\n…" if len(text) > _SHOWN else ""),
                language="json" if name.endswith("json") else None,
                height=300,
            )
            st.download_button(
                f"Download {name}",
                text,
                name,
                on_click="ignore",
                key=f"file_{name}",
                icon=":material/download:",
            )
    if view.command:
        st.caption("Then run")
        st.code(view.command, language="bash", wrap_lines=True)


def _pack(study: Study, allocation: Allocation) -> None:
    """The packer: a job that writes bit-packed shards below the data folder, where a browser may write."""
    out = Home.default().root / "packed" / f"{study.index.name}-{allocation_id(allocation)[:12]}"

    def submit() -> None:
        try:
            st.session_state["job"] = tasks.submit_pack(study.index.path, allocation, out)
        except UserError as error:
            st.session_state["pack_error"] = error

    st.button(
        "Pack the checkpoint",
        type="primary",
        icon=":material/inventory_2:",
        on_click=submit,
        key="start_pack",
        help=f"Writes {out}",
    )
    error = st.session_state.pop("pack_error", None)
    if error is not None:
        error_box(error)
    cli_twin(
        command("pack", study.index.path, "allocation.json", output=out)
        + f" && bitatlas generate {out} 'Once upon a time'"
    )
