"""KV cache: what may K and V of each layer lose, and how much memory should the cache get?"""

from __future__ import annotations

import pandas as pd
import streamlit as st

from bitatlas.analysis.schema import KL_DAMAGES, KV_DAMAGES, KvTable, UserError
from bitatlas.app.charts import kv as charts
from bitatlas.app.studies import Study, open_store
from bitatlas.app.tasks.joint import joint_front
from bitatlas.app.views import fit_controls
from bitatlas.app.views import kv as views
from bitatlas.app.widgets import fit_cache
from bitatlas.app.widgets.boxes import empty_state, error_box
from bitatlas.app.widgets.data import the_study
from bitatlas.app.widgets.frame import title
from bitatlas.app.widgets.kept import kept
from bitatlas.app.widgets.look import current_palette
from bitatlas.app.widgets.twin import cli_twin, command, downloads
from bitatlas.solvers import get_solver

__all__ = ["page"]


def page() -> None:
    """Draw the page."""
    study = the_study()
    if study is None or not study.kv:
        title("The KV cache has not been measured yet")
        empty_state("The page shows how much K and V of every layer are hurt by fewer bits (metric kv_output, kv_flip or kv_error).",
                    "Measure a model", screen="run")  # fmt: skip
        return
    head = st.container()
    names = sorted(study.kv, key=lambda n: KV_DAMAGES.index(n) if n in KV_DAMAGES else len(KV_DAMAGES))
    metric = st.selectbox("Metric", names, key="kv_map_metric", bind="query-params", width=220)
    table = study.kv[metric]
    view = kept(study, "kv_view", table.run, metric, make=lambda: views.build_map(table))
    with head:
        title(view.title, view.subtitle)
    config = {"displaylogo": False}
    palette = current_palette()
    figure = kept(
        study, "kv_map", table.run, metric, palette.dark, make=lambda: charts.map_chart(view, palette)
    )
    st.plotly_chart(figure, key="kv_map", theme=None, config=config, alt=view.title)
    downloads(f"{study.index.name}-{metric}", lambda: pd.DataFrame(view.columns()), view.to_dict, "kv")
    if metric in KV_DAMAGES:
        _split(study, table)


def _split(study: Study, table: KvTable) -> None:
    """One memory for weights and cache."""
    geometry = study.index.kv
    weights = [m for m in KL_DAMAGES if m in study.damage_metrics]
    if geometry is None or not weights:
        st.caption(
            "Measure a damage of the weights in nats per token (fisher) to see how one memory should be split."
        )
        return
    bounds = fit_controls.bounds(study.index)
    st.markdown("#### One memory for weights and KV cache")
    with st.container(horizontal=True, vertical_alignment="bottom"):
        metric = st.selectbox(
            "Damage of the weights", weights, key="kv_weights", bind="query-params", width=190
        )
        memory = st.slider(f"Memory ({bounds.word})", bounds.low, bounds.high * 2, bounds.start, step=bounds.step,
                           key="kv_memory", bind="query-params", help="For weights and KV cache.")  # fmt: skip
        context = st.number_input(
            "Context (tokens)", 1, 1 << 20, 8192, step=1024, key="kv_context", bind="query-params"
        )
        batch = st.number_input("Batch", 1, 1024, 1, key="kv_batch", bind="query-params")
    formats = tuple(fit_controls.usual(study.tables[metric].formats))
    _, front = fit_cache.front(study, metric, formats, {})
    total = int(memory * bounds.scale)
    try:
        view = views.build_split(front, table, geometry, memory=total - study.index.kept_bytes, context=int(context),
                                 batch=int(batch))  # fmt: skip
    except UserError as error:
        error_box(error)
        return
    st.markdown(f"**{view.title}.** {view.detail}")
    st.plotly_chart(charts.split_chart(view, current_palette()), key="kv_split", theme=None,
                    config={"displayModeBar": False}, alt=view.title)  # fmt: skip
    st.dataframe(
        pd.DataFrame({"layer": list(view.plan), "K/V": list(view.plan.values())}), hide_index=True, height=220
    )
    cli_twin(command("solve", study.index.path, metric=metric, fit=total, context=int(context), batch=int(batch), kv=True,
                     kv_metric=table.metric, reserve=1, formats=",".join(formats), output="allocation.json"))  # fmt: skip
    _every_memory(study, table, metric, formats, int(context), int(batch), total)


def _every_memory(
    study: Study, table: KvTable, metric: str, formats: tuple[str, ...], context: int, batch: int, memory: int
) -> None:
    """The front of weights and cache together: stored, and the command line's own."""
    problem, _ = fit_cache.front(study, metric, formats, {})
    asked = (metric, formats, table.metric, table.run, context, batch)
    found = kept(study, "joint_front", *asked, make=lambda: joint_front(
        open_store(), study.index, problem, table, get_solver("hull"), run=study.tables[metric].run, context=context, batch=batch
    ))  # fmt: skip
    view = views.build_joint_front(found, study.index.kept_bytes, memory)
    st.markdown("#### Every memory")
    st.markdown(f"**{view.title}.** {view.detail}")
    st.plotly_chart(charts.joint_chart(view, current_palette()), key="kv_front", theme=None,
                    config={"displayModeBar": False}, alt=view.title)  # fmt: skip
    downloads(
        f"{study.index.name}-{metric}-{table.metric}-front", lambda: pd.DataFrame(view.columns()), view.columns, "kv_front"
    )  # fmt: skip
    cli_twin(command("frontier", study.index.path, metric=metric, formats=",".join(formats), kv=True, kv_metric=table.metric,
                     context=context, batch=batch))  # fmt: skip
