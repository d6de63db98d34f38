"""Curves as text."""

from __future__ import annotations

from shoestring.cli.chart import curve


def test_a_falling_line() -> None:
    assert curve([4, 3, 2, 1], width=4, height=4, ascii_only=True) == [
        "   4.000 | *",
        "         |  *",
        "         |   *",
        "   1.000 |    *",
    ]


def test_braille_and_edges() -> None:
    assert curve([]) == ["(no values)"]
    assert len(curve([1.0], height=3)) == 3
    lines = curve([2.0, 1.0], width=2, height=1)
    assert lines == ["   2.000 | ⠉⣀"]
