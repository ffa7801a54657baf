"""Experts, Metrics and Unit in a real browser, on 48 layers of 128 experts x 3 projections x 6 formats."""

from __future__ import annotations

MOE = "moe-48x128@6d6f652d"
TRACES = "[...document.querySelectorAll('.js-plotly-plot')].map(g => g._fullData.map(t => [t.type, t._length || 0]))"


def heading(b):
    return b.page.locator("h2").first.inner_text()


def test_the_pages_of_eighteen_thousand_experts(browser):
    b = browser("dark")
    b.goto(f"/experts?study={MOE}&quantity=damage")
    b.chart()
    box = b.page.locator(
        ".js-plotly-plot .nsewdrag"
    ).first.bounding_box()  # the map; below it is the profile of the layers
    kinds = [kind for kind, _ in b.page.evaluate(TRACES)[0]]
    assert kinds.count("heatmap") == 2  # ground and values
    assert "scattergl" not in kinds
    assert "carry half the damage" in heading(b)
    b.drag(box, (0.1, 0.1), (0.2, 0.2))
    b.page.wait_for_selector(".st-key-clear_selection")
    assert b.selected() % 3 == 0  # all projections of each expert
    assert b.selected() > 100
    b.page.get_by_text("alpha", exact=True).click()
    b.settle()
    assert "largest alpha" in heading(b)
    assert "quantity=alpha" in b.page.url

    b.goto(f"/metrics?study={MOE}&metric_x=fisher_projection&metric_y=alphaq_alpha")
    b.chart()
    [scatter] = b.page.evaluate(TRACES)
    assert {kind for kind, _ in scatter} == {
        "heatmap",
        "scatter",
    }  # eighteen thousand units as a density, the tops as marks
    box = b.page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    b.drag(box, (0.02, 0.02), (0.98, 0.98))
    assert 15_000 < b.selected() <= 48 * (4 + 3 * 128) + 2
    cells = b.page.locator(".st-key-agreement_matrix [title]")
    assert cells.count() >= 4
    assert "fisher_projection and fisher_projection: 1.00" in [c.get_attribute("title") for c in cells.all()]
    assert "rank correlation" in heading(b)

    b.goto(f"/unit?study={MOE}&unit=model.layers.3.mlp.experts.7.down_proj")
    b.chart()
    before = heading(b)
    assert "experts.7.down_proj" in before
    assert ["scatter", 6] in b.page.evaluate(TRACES)[0]
    b.page.get_by_role("button", name="Worse").click()
    b.page.wait_for_function("w => document.querySelector('h2').innerText != w", arg=before)
    assert "unit=" in b.page.url
