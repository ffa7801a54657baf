"""Verify: was the prediction right?"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import UserError
from bitatlas.app import tasks
from bitatlas.app.charts import verify as charts
from bitatlas.app.studies import Study, open_store
from bitatlas.app.views import verify as views
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command, downloads

__all__ = ["page"]


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.allocations:
        title("There is nothing to verify yet")
        empty_state(
            "Verify runs an allocation for real on held-out text and compares it with the prediction.",
            "Make an allocation",
            screen="fit",
        )
        return
    known = {a.id: a for a in study.allocations}
    view = views.build_verify(known, study.verifications, _kl_metrics())
    title(view.title, view.detail)
    if view.rows:
        _charts(view)
        _table(view)
    _start(study)
    _answers(study)


def _kl_metrics() -> frozenset[str]:
    """Metrics whose values are nats per token and add up: only their sums can be compared with a measured KL."""
    from bitatlas.analysis.metrics import METRICS

    return frozenset(
        name for m in METRICS.values() if m.ADDITIVE and m.UNIT.startswith("nats") for name in m.EMITS
    )


def _charts(view: views.VerifyView) -> None:
    palette = current_palette()
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("**Predicted against measured**")
        st.plotly_chart(
            charts.predicted_chart(view, palette),
            key="predicted",
            theme=None,
            config={"displayModeBar": False},
            alt=view.title,
        )
    with right:
        st.markdown("**Measured KL over size**")
        st.plotly_chart(
            charts.size_chart(view, palette),
            key="size",
            theme=None,
            config={"displayModeBar": False},
            alt=view.detail,
        )


def _table(view: views.VerifyView) -> None:
    frame = pd.DataFrame(
        [
            {"allocation": r.label, "quantizer": r.quantizer + (" (packed)" if r.packed else ""), "bits": r.bits_per_weight, "predicted": r.predicted if r.predicts_kl else None, "KL": r.kl_mean,
             "± s.e.": r.kl_stderr, "p50": r.kl_p50, "p99": r.kl_p99, "flips": r.flips, "perplexity before": r.ppl_before,
             "after": r.ppl_after, "floor": r.floor, "tokens": r.tokens, "text": r.text, "id": r.allocation, "folder": r.packed}
            for r in view.rows
        ]
    )  # fmt: skip
    number = {
        c: st.column_config.NumberColumn(format="%.4g")
        for c in ("predicted", "KL", "± s.e.", "p50", "p99", "floor")
    }
    number |= {
        c: st.column_config.NumberColumn(format="%.2f") for c in ("bits", "perplexity before", "after")
    }
    st.dataframe(
        frame,
        hide_index=True,
        column_config={**number, "flips": st.column_config.NumberColumn(format="percent")},
    )
    st.caption(
        "KL(original || quantised) in nats per token. Flips: share of positions whose most likely next token changed."
    )
    downloads("verify", lambda: frame, view.to_dict, "verify")


def _start(study: Study) -> None:
    """Verify one more allocation: the cost is a forward pass of both models over the text."""
    with st.container(border=True):
        st.markdown("##### Verify an allocation")
        names = {a.label: a for a in study.allocations}
        with st.container(horizontal=True, vertical_alignment="bottom"):
            chosen = st.selectbox("Allocation", list(names), key="verify_allocation", width=420)
            text = st.text_input(
                "Held-out text (file)", key="verify_text", placeholder="the demo brings its own", width=320
            )
            tokens = st.number_input("Tokens", 256, 1 << 20, 8192, step=1024, key="verify_tokens")
            quantizer = st.selectbox("Quantiser", tasks.quantizers(), key="verify_quantizer")
            calibration = st.text_input(
                "Its calibration text (file)",
                key="verify_calibration",
                placeholder="for gptq and awq",
                width=240,
            )

        def submit() -> None:
            try:
                file = tasks.confine(text) if text else None
                st.session_state["job"] = tasks.submit_verify(
                    study.index.path, open_store().allocation(names[chosen].id), text=file, tokens=int(tokens),
                    quantizer=quantizer, calibration=tasks.confine(calibration) if calibration else None,
                )  # fmt: skip
            except UserError as error:
                st.session_state["verify_error"] = error

        st.button("Verify", type="primary", icon=":material/fact_check:", on_click=submit, key="start_verify")
        error = st.session_state.pop("verify_error", None)
        if error is not None:
            error_box(error)
        cli_twin(
            command(
                "verify",
                study.index.path,
                "allocation.json",
                text=text or None,
                tokens=int(tokens),
                quantizer=None if quantizer == "rtn" else quantizer,
                calibration=calibration or None,
            )  # fmt: skip
        )


def _answers(study: Study) -> None:
    """Original and packed model on the same prompts, as a job: pages load no models."""
    with st.container(border=True):
        st.markdown("##### Side by side: the original and a packed folder")
        folder = st.text_input(
            "Packed folder", key="answers_folder", placeholder="what `bitatlas pack` wrote", width=420
        )
        prompts = st.text_area("Prompts, one a line", key="answers_prompts", height=100)

        def submit() -> None:
            try:
                st.session_state["answers_job"] = tasks.submit_answers(
                    study.index.path, tasks.confine(folder), prompts.splitlines()
                )
            except UserError as error:
                st.session_state["answers_error"] = error

        st.button(
            "Ask both", icon=":material/forum:", on_click=submit, key="start_answers", disabled=not folder
        )
        error = st.session_state.pop("answers_error", None)
        if error is not None:
            error_box(error)
        asked = [p for p in prompts.splitlines() if p.strip()]
        cli_twin(command("answers", study.index.path, folder or "DIR", prompt=asked or ["..."]))
        if "answers_job" in st.session_state:
            _show_answers(str(st.session_state["answers_job"]))


@st.fragment(run_every=2.0)
def _show_answers(job: str) -> None:
    """The job's progress, then both answers to every prompt."""
    status = tasks.jobs_show(job)
    if status["state"] != "done":
        st.caption(f"{status['state']}: {status['done']} of {status['total']} answers")
        return
    view = views.build_answers(tasks.answers_of(job))
    st.markdown(f"**{view.title}**")
    st.caption(view.detail)
    st.dataframe(pd.DataFrame(view.rows), hide_index=True)
