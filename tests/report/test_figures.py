"""Figures are well-formed, say what they show, and draw numbers where they belong."""

import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fac_jax.report.figures import Interval, Series, bar_figure, interval_figure, line_figure, number, ticks

SVG = "svg"


def drawing(figure: str) -> ElementTree.Element:
    root = ElementTree.fromstring(figure)
    found = root.find(SVG)
    assert found is not None
    return found


def test_lines_leave_out_what_is_not_finite() -> None:
    svg = drawing(line_figure("Loss", [Series("loss", [(0, 1.0), (10, math.nan), (20, 0.5)])], "step"))
    line = svg.find("polyline")
    assert line is not None and len(line.attrib["points"].split()) == 2
    assert "loss ends at 0.500" in svg.attrib["aria-label"]


def test_a_line_of_one_point_is_a_dot_and_of_none_a_sentence() -> None:
    assert drawing(line_figure("Loss", [Series("loss", [(3, 1.0)])], "step")).find("circle") is not None
    assert "no finite values" in line_figure("Loss", [Series("loss", [(0, math.inf)])], "step")


def test_lengths_of_bars_are_the_fractions() -> None:
    svg = drawing(bar_figure("FAC", ["> 0", "> 1"], [Series("seed", [(0, 0.25), (1, 0.5)], 0)], "threshold"))
    widths = [float(bar.attrib["width"]) for bar in svg.findall("rect") if bar.attrib["height"] == "13"]
    assert widths[1] == pytest.approx(2 * widths[0], rel=1e-2)
    assert "seed at > 1: 50.0%" in svg.attrib["aria-label"]


def test_intervals_hold_their_values_inside_the_frame() -> None:
    rows = [Interval("seed", 0.5, 0.3, [0.2, 0.8]), Interval("kept", 0.99, 0.2, [0.97, 1.0])]
    svg = drawing(interval_figure("AUPRC", rows, 0.1, "random scorer", "AUPRC"))
    xs = [float(line.attrib[end]) for line in svg.findall("line") for end in ("x1", "x2")]
    assert 92 <= min(xs) and max(xs) <= 340
    assert "seed 0.500 plus or minus 0.300" in svg.attrib["aria-label"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_span_the_range_with_round_steps(low: float, width: float) -> None:
    found = ticks(low, low + width, 4)
    assert len(found) >= 2 and len(found) <= 12
    assert found[0] <= low + 1e-6 * width and found[-1] >= low + width - 1e-6 * width


def test_numbers_as_one_reads_them() -> None:
    assert [number(x) for x in (12345.0, 0.3184, 1.2e-5, 41.72, 0.0)] == ["12,345", "0.318", "1.2e-05", "41.7", "0"]
