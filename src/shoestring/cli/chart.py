"""Curves as text: braille dots, or ASCII where the terminal cannot show them."""

from __future__ import annotations

from collections.abc import Sequence

# The eight dots of a braille cell, by (column, row): https://www.unicode.org/charts/PDF/U2800.pdf
_DOTS = {
    (0, 0): 0x01, (0, 1): 0x02, (0, 2): 0x04, (0, 3): 0x40,
    (1, 0): 0x08, (1, 1): 0x10, (1, 2): 0x20, (1, 3): 0x80,
}  # fmt: skip


def curve(
    values: Sequence[float],
    width: int = 56,
    height: int = 8,
    *,
    ascii_only: bool = False,
    bounds: tuple[float, float] | None = None,
) -> list[str]:
    """Lines of a chart of `values` over their index, with the scale at the left."""
    if not values:
        return ["(no values)"]
    low, high = bounds or (min(values), max(values))
    columns, rows = (1, 1) if ascii_only else (2, 4)
    points = _points(values, low, high, width * columns, height * rows)
    cells: dict[tuple[int, int], int] = {}
    for x, y in points:
        cell = (x // columns, y // rows)
        cells[cell] = cells.get(cell, 0) | _DOTS[(x % columns, y % rows)]
    lines: list[str] = []
    for row in range(height):
        text = "".join(_cell(cells.get((column, row), 0), ascii_only) for column in range(width))
        label = f"{high:8.3f}" if row == 0 else f"{low:8.3f}" if row == height - 1 else " " * 8
        lines.append(f"{label} | {text.rstrip()}")
    return lines


def _cell(bits: int, ascii_only: bool) -> str:
    if not bits:
        return " "
    return "*" if ascii_only else chr(0x2800 + bits)


def _points(
    values: Sequence[float], low: float, high: float, width: int, height: int
) -> list[tuple[int, int]]:
    """One point a column: the mean of the values that fall into it; row 0 is the top."""
    span = (high - low) or 1.0
    points: list[tuple[int, int]] = []
    for x in range(width):
        start = x * len(values) // width
        end = max(start + 1, (x + 1) * len(values) // width)
        mean = sum(values[start:end]) / (end - start)
        y = round((high - mean) / span * (height - 1))
        points.append((x, min(max(y, 0), height - 1)))
    return points
