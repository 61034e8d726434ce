"""The charts: axes against numbers worked out by hand, marks as an XML parser reads them."""
import re
from math import log10
from xml.etree import ElementTree

import pytest

from sd.run.figure import axis, bar, document, interval, line, point, symlog, text, ticks

EVIL = '<script>alert(1)</script>&"]]>'
SPACE = "{http://www.w3.org/2000/svg}"


def test_axes_place_values_linearly_logarithmically_and_around_zero():
    y = axis(0, 100, 290, 30)
    assert (y(0), y(50), y(100)) == (290, 160, 30)
    x = axis(0.01, 1, 60, 460, log10)
    assert x(0.1) == pytest.approx(260) and x(0.01) == 60
    both = axis(-10, 10, 0, 200, symlog)
    assert both(0) == 100 and both(-3) + both(3) == pytest.approx(200) and both(10) == 200
    assert both(0.02) - 100 == pytest.approx(2 * (both(0.01) - 100), rel=0.05)          # linear about 0
    assert both(10) - both(5) == pytest.approx(both(5) - both(2.5), rel=0.05)           # logarithmic beyond


def chart(*marks):
    return ElementTree.fromstring(document("a chart", 600, 350, list(marks)))


def test_marks_are_where_they_belong():
    assert chart(point(10, 20.04, "blue")).find(SPACE + "circle").attrib == {
        "class": "blue", "cx": "10.0", "cy": "20.0", "r": "3"}
    for start, end in ((30, 80), (80, 30)):                 # a bar goes either way
        rect = chart(bar(start, end, 50, "orange")).findall(SPACE + "rect")[1]
        assert (rect.get("x"), rect.get("width"), rect.get("y"), rect.get("height")) == (
            "30.0", "50.0", "43.5", "13")
    assert chart(line([(0, 1), (2, 3), (4, 5)], "dashed")).find(SPACE + "path").attrib == {
        "class": "dashed", "d": "M0.0 1.0L2.0 3.0L4.0 5.0"}
    d = chart(interval(5, 8, 6)).find(SPACE + "path").get("d")
    caps = re.fullmatch(r"M5\.0 6\.0(\S+)L8\.0 6\.0\1", d)[1]
    assert caps == "v3.5v-7v3.5"                            # upright, across each end


def test_ticks_write_their_values_beside_the_lines_and_stress_zero():
    svg = chart(*ticks(axis(-1, 1, 0, 100), (-1, 0, 0.5), 10, 90, vertical=True),
                *ticks(axis(0, 1000, 90, 10), (1000,), 0, 100))
    assert [t.text for t in svg.iter(SPACE + "text")] == ["\u22121", "0", "0.5", "1000"]
    assert [(p.get("class"), p.get("d")) for p in svg.iter(SPACE + "path")] == [
        ("grid", "M0.0 10.0L0.0 90.0"), ("zero grey", "M50.0 10.0L50.0 90.0"),
        ("grid", "M75.0 10.0L75.0 90.0"), ("grid", "M0.0 10.0L100.0 10.0")]


def test_texts_stay_texts_and_both_schemes_are_there():
    svg = document(EVIL, 600, 350, [text(1, 2, EVIL, "bold")])
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == EVIL == root.find(SPACE + "text").text and "<script" not in svg
    assert root.get("viewBox") == "0 0 600 350"
    assert "prefers-color-scheme: dark" in root.find(SPACE + "style").text
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")          # nothing is fetched
