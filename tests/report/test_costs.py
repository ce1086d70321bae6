"""The ledger on the page and in the terminal: sums that are right, and nothing where nothing was asked."""

import dataclasses
from pathlib import Path

from rich.console import Console

from fac_jax.config.file import load_config
from fac_jax.config.llm import LlmConfig
from fac_jax.llm.client import Reply, Request
from fac_jax.llm.ledger import Ledger
from fac_jax.report.costs import costs, said
from fac_jax.report.page import page
from fac_jax.report.products import RunView, read_view
from fac_jax.report.terminal import render
from tests.report.sample_run import write_run


def view_with_answers(folder: Path, **prices: float) -> RunView:
    write_run(folder)
    config = load_config(folder / "config.yaml")
    config = dataclasses.replace(config, llm=LlmConfig(url="http://h/v1", **prices))
    ledger = Ledger(folder, config.llm, "toxicity")
    request = Request(({"role": "user", "content": "x"},), 20)
    for feature, cached in ((3, False), (3, False), (5, False), (5, True)):
        ledger.add(f"explain:{feature}", request, Reply("x", "stop", 1000, 100, "m"), cached)
    ledger.add("probe", request, Reply("x", "stop", 10, 1, "m"), False)
    return read_view(folder, config)


def terminal(view: RunView) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(render(view))
    return captured.get()


def test_sums_by_purpose_and_by_feature(tmp_path: Path) -> None:
    view = view_with_answers(tmp_path / "run", price_in=1.0, price_out=10.0)
    (section,) = costs(view)
    cost = 3 * (1000 * 1 + 100 * 10) / 1e6
    assert f"{cost:.4f}" in section.body and "3,000" in section.body
    covered = sum((missing.kept_peak or 0) > view.threshold for missing in view.missing)
    total = cost + (10 + 10) / 1e6
    each = (
        f"{3311 / covered:,.0f} tokens at a cost of {total / covered:,.4f} for each of {covered} newly covered features"
    )
    assert covered and each in said(view)
    assert "4 answers were paid for and 1 came from the cache" in said(view)
    assert section.body in page(view) and said(view) in terminal(view)
    first = section.body.index("The features that took most")
    assert section.body.index(">3<", first) < section.body.index(">5<", first), "the dearest first"


def test_without_prices_no_money_is_named(tmp_path: Path) -> None:
    view = view_with_answers(tmp_path / "run")
    assert "cost of" not in said(view) and "Cost</th>" not in costs(view)[0].body


def test_a_run_that_asked_nobody_has_no_such_section(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    view = read_view(tmp_path / "run", load_config(tmp_path / "run/config.yaml"))
    assert costs(view) == [] and "paid for" not in terminal(view) and 'id="costs"' not in page(view)
