"""Run: what will measuring cost, and is it going?"""

from __future__ import annotations

from typing import Any

import pandas as pd
import streamlit as st

from bitatlas.analysis.context_length import check_length
from bitatlas.analysis.schema import UserError
from bitatlas.app import state
from bitatlas.app.studies import Study
from bitatlas.app.views import run as views
from bitatlas.app.views.words import duration
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.job_panel import job_panel
from bitatlas.app.widgets.twin import cli_twin, command

__all__ = ["page"]

_PROBLEM = "_run_problem"
_ASK_ABOVE_S = 600.0


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None:
        title("There is no model to measure yet")
        empty_state("Choose a model first: its cost estimate, progress and log will stand here.", "Go to the library", screen="library")  # fmt: skip
        return
    head = st.container()
    left, right = st.columns([5, 7], gap="large")
    with left:
        request = _request(study)
    estimate, problem = _estimate(study, request)
    with left:
        _start(study, request, estimate, problem)
    with right:
        job_panel(study.index)
    view = views.estimate_view(study.index.name, estimate)
    with head:
        title(view.title, view.subtitle)
    cli_twin(_line(study, request))


def _request(study: Study) -> views.RunRequest:
    table = _metrics()
    names = st.multiselect("Metrics", list(table), _default(list(table)), key="metrics", bind="query-params",
                           help="Each stands for one question; the cost of every one is below.")  # fmt: skip
    st.button("All that apply", key="all_metrics", icon=":material/select_all:", on_click=_choose_all, args=(study.index.path,),
              help="Every metric that this model has an answer for; mixture-of-experts metrics only where there are experts.")  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom"):
        bits = st.pills(
            "Bits", views.BITS, selection_mode="multi", default=views.BITS, key="bits", bind="query-params"
        )
        group = st.segmented_control("Group size", views.GROUPS, default="64", required=True, key="group", bind="query-params")  # fmt: skip
        symmetric = st.toggle(
            "Symmetric", key="symmetric", bind="query-params", help="No zero points are stored."
        )
    text, tokens, length, documents = "", 8192, 128, False
    reads_text = any(table[n]["needs"] != "weights" for n in names)
    if reads_text:
        text = st.text_input("Calibration text", key="calibration", bind="query-params", placeholder="a text or JSONL file, self, or datasets:NAME",
                             help="The demo model brings its own text; leave empty then. `self` is text sampled from the model, `datasets:NAME` a data set of the library that is on this machine.")  # fmt: skip
    with st.container(horizontal=True, vertical_alignment="bottom"):
        if reads_text:
            tokens = st.number_input("Tokens", 256, 10_000_000, tokens, 1024, key="tokens", bind="query-params", width=150)  # fmt: skip
            length = st.number_input("Tokens a sequence", 16, 8192, length, 16, key="seq_len", bind="query-params", width=150)  # fmt: skip
            documents = st.toggle("A document each", key="per_document", bind="query-params", help="Every sequence starts at a document's beginning; otherwise one stream of text is cut.")  # fmt: skip
        seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="seed", bind="query-params", width=110)
    known = sorted({pair.partition("=")[0] for n in names for pair in table[n]["settings"].split()})
    options = st.text_input("Options", key="options", bind="query-params", placeholder="NAME=VALUE NAME=VALUE",
                            help=f"Of the metrics chosen: {', '.join(known) or 'none'}.")  # fmt: skip
    return views.RunRequest(tuple(names), tuple(bits or ()), str(group), bool(symmetric), text or "", int(tokens), int(length), int(seed), bool(documents), options or "")  # fmt: skip


@st.cache_resource(show_spinner="Loading the metrics; the first time takes some seconds")
def _metrics() -> dict[str, dict[str, Any]]:
    from bitatlas.app import tasks

    return {m["name"]: m for m in tasks.metrics()}


def _default(names: list[str]) -> list[str]:
    return [n for n in names if n.startswith("fisher")][:1] or names[:1]


def _choose_all(path: str) -> None:
    from bitatlas.app import tasks

    names, _ = tasks.applicable_metrics(path, needs_text=False)
    st.session_state["metrics"] = list(names)


def _estimate(study: Study, request: views.RunRequest) -> tuple[list[dict[str, object]], UserError | None]:
    try:
        request.check()
        if any(_metrics()[n]["needs"] != "weights" for n in request.metrics):
            note = check_length(study.index, request.seq_len)
            if note:
                st.caption(f":material/info: {note}.")
        return _cost(study.index.path, study.index.digest, request), None
    except UserError as e:
        return [], e


@st.cache_data(max_entries=64, show_spinner="Estimating the cost")
def _cost(path: str, digest: str, request: views.RunRequest) -> list[dict[str, object]]:
    from bitatlas.app import tasks

    return tasks.estimate(
        path, request.metrics, formats=request.formats, tokens=request.tokens, seq_len=request.seq_len,
        settings=tasks.parse_settings(request.pairs), calibration="self" if request.calibration == "self" else None,
    )  # fmt: skip


def _start(study: Study, request: views.RunRequest, estimate: list[dict[str, object]], problem: UserError | None) -> None:  # fmt: skip
    if problem:
        error_box(problem)
        return
    rows = views.cost_table(estimate)
    heads = {n: st.column_config.NumberColumn(n, format="localized", help="tokens through the model") for n in ("forward", "backward")}  # fmt: skip
    st.dataframe(
        pd.DataFrame(dict(rows)), hide_index=True, height="content", key="cost_table", column_config=heads
    )
    seconds = views.total_seconds(estimate)
    if seconds > _ASK_ABOVE_S:
        if st.button(
            f"Measure, about {duration(seconds)}", type="primary", key="ask", icon=":material/play_arrow:"
        ):
            _ask(study, request, seconds)
    else:
        st.button("Measure", type="primary", key="start", icon=":material/play_arrow:",
                  on_click=_submit, args=(study.index.path, request))  # fmt: skip
    failed = st.session_state.pop(_PROBLEM, None)
    if failed:
        error_box(failed)


@st.dialog("Start a long measurement?")
def _ask(study: Study, request: views.RunRequest, seconds: float) -> None:
    st.markdown(f"About **{duration(seconds)}** on this machine. It can be cancelled at any time; what is finished is kept.")  # fmt: skip
    if st.button(
        "Start", type="primary", key="start_long", on_click=_submit, args=(study.index.path, request)
    ):
        st.rerun()


def _submit(path: str, request: views.RunRequest) -> None:
    """In a callback: a rerun cannot start a second job, and the same request is the same job anyway."""
    from bitatlas.app import tasks

    try:
        text = tasks.confine_text(request.calibration) if request.calibration else None
        job = tasks.submit_measure(
            path, request.metrics, formats=request.formats, calibration=text, tokens=request.tokens,
            seq_len=request.seq_len, seed=request.seed, settings=tasks.parse_settings(request.pairs), text_mode=request.text_mode,
        )  # fmt: skip
        state.set_job(job)
    except UserError as e:
        st.session_state[_PROBLEM] = e


def _pairs(r: views.RunRequest) -> tuple[str, ...]:
    try:
        return r.pairs
    except UserError:
        return ()  # the form says what is wrong with them


def _line(study: Study, r: views.RunRequest) -> str:
    return command(
        "measure", study.index.path, metric=",".join(r.metrics), formats=r.pattern, calibration=r.calibration,
        tokens=r.tokens, seq_len=r.seq_len, seed=r.seed, text_mode=r.text_mode if r.per_document else "", set=_pairs(r),
    )  # fmt: skip
