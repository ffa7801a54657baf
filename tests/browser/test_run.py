"""A real measurement, started in one browser and watched in two."""

from __future__ import annotations

import pytest


@pytest.fixture
def tiny_study(home, tiny_checkpoint):
    """A real checkpoint in the library; its label in the study picker."""
    from bitatlas.analysis.model_index import index_model
    from bitatlas.cache.paths import Home
    from bitatlas.cache.store import Store

    index = index_model(tiny_checkpoint("llama", num_hidden_layers=6))
    Store(Home(home)).put_model(index)
    return f"{index.name}@{index.digest[:8]}"


@pytest.mark.slow
def test_measure_watch_and_open_the_map(browser, tiny_study):
    b = browser()
    b.goto(f"/run?study={tiny_study}&metrics=weight_error")
    b.page.locator(".st-key-start button").click()
    b.page.wait_for_url("**job=*")
    b.page.wait_for_selector("[data-testid=stProgress]")

    other = browser()
    other.goto(b.page.url.removeprefix(b.base))
    for window in (b, other):
        window.page.get_by_text("done in", exact=False).first.wait_for(timeout=180_000)
        assert "weight_error of llama" in window.page.locator(".stMain").inner_text()

    b.page.get_by_role("link", name="Open the map", exact=True).click()
    b.page.wait_for_url("**/map*")
    b.settle()
    b.chart()
    assert "carry half the damage" in b.page.locator("h2").first.inner_text()
    assert "squared weight" in b.page.locator(".js-plotly-plot").inner_text()
