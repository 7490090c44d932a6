"""The front of an evaluated run as an SVG for a page, readable on white and on dark:

python -m benchmarks.front_picture runs/quickstart docs/front.svg --objectives reflection empathy
"""

import argparse
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from emorl import load_run
from emorl.runs.results import BASE, BEST, Kind

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 70, 190, 46, 60
COLOURS = {Kind.BASE: "#8a8a8a", Kind.POLICY: "#e69f00", Kind.PARAMETER_AVERAGE: "#cc79a7", Kind.ENSEMBLE: "#d55e00",
           Kind.FRONT: "#009e73", Kind.DYNAMIC: "#0072b2"}  # fmt: skip
INK = "#7d8590"
"""between black and white: legible on both"""


def picture(summary: pd.DataFrame, x: str, y: str, title: str) -> str:
    """The systems of `summary` by their scores of two objectives, on the test prompts; higher is better."""
    low, high = ({name: edge(summary[name]) for name in (x, y)} for edge in (min, max))
    span = {name: max(high[name] - low[name], 1e-9) for name in (x, y)}

    def place(row: pd.Series) -> tuple[float, float]:
        across = LEFT + (row[x] - low[x]) / span[x] * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - BOTTOM - (row[y] - low[y]) / span[y] * (HEIGHT - TOP - BOTTOM)

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'font-size="13" fill="{INK}" role="img"><title>{escape(title)}</title>',
        f'<text x="{LEFT}" y="24" font-size="16">{escape(title)}</text>',
        f'<path d="M{LEFT - 14} {TOP - 8}V{bottom + 14}H{right + 14}" fill="none" stroke="{INK}"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{escape(x)} (higher is better)</text>',
        f'<text transform="translate(16 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
        *_ticks(low, high, x, y),
        _line(summary, place, x),
    ]
    heights: list[tuple[float, float]] = []
    for row in summary.sort_values(y, ascending=False).to_dict("records"):
        parts.append(_mark(pd.Series(row), *place(pd.Series(row)), heights))
    return "\n".join([*filter(None, parts), "</svg>"]) + "\n"


def _ticks(low: dict[str, float], high: dict[str, float], x: str, y: str) -> list[str]:
    ends = [(LEFT, low[x], "start"), (WIDTH - RIGHT, high[x], "end")]
    across = [f'<text x="{at}" y="{HEIGHT - BOTTOM + 30}" text-anchor="{side}">{value:.2f}</text>' for at, value, side in ends]
    ups = [(HEIGHT - BOTTOM, low[y]), (TOP, high[y])]
    return [*across, *(f'<text x="{LEFT - 20}" y="{at + 4}" text-anchor="end">{value:.2f}</text>' for at, value in ups)]


def _line(summary: pd.DataFrame, place, x: str) -> str:
    """Through what an ensemble offers and nothing else beats in both."""
    offers = summary[summary["kind"].isin([Kind.FRONT, Kind.POLICY, Kind.ENSEMBLE])].sort_values(x, ascending=False)
    best, kept = -float("inf"), []
    for _, row in offers.iterrows():
        across, up = place(row)
        if -up > best:
            best = -up
            kept.append(f"{across:.1f},{up:.1f}")
    colour = COLOURS[Kind.FRONT]
    return (
        f'<polyline points="{" ".join(kept)}" fill="none" stroke="{colour}" stroke-dasharray="4 4"/>' if len(kept) > 1 else ""
    )


def _mark(row: pd.Series, across: float, up: float, heights: list[tuple[float, float]]) -> str:
    """A point and its name, which moves down where another name stands."""
    level = up + 4
    while any(abs(level - other) < 14 and abs(across - there) < 190 for there, other in heights):
        level += 14
    heights.append((across, level))
    size, colour = (8 if row["system"] == BEST else 5), COLOURS[Kind(row["kind"])]
    name = escape(row["system"])
    weight = ' font-weight="bold"' if row["system"] in (BEST, BASE) else ""
    return (
        f'<circle cx="{across:.1f}" cy="{up:.1f}" r="{size}" fill="{colour}"/>'
        f'<text x="{across + 11:.1f}" y="{level:.1f}"{weight}>{name}</text>'
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output of an experiment that was evaluated")
    parser.add_argument("picture", type=Path, metavar="OUT.svg")
    parser.add_argument("--objectives", nargs=2, metavar="NAME", help="across and up (the first two of the experiment)")
    options = parser.parse_args(arguments)
    results = load_run(options.run)
    x, y = options.objectives or results.objectives[:2]
    title = f"{y} against {x} on {results.evaluated.test_prompts} test prompts"
    options.picture.write_text(picture(results.evaluated.summary, x, y, title), encoding="utf-8")


if __name__ == "__main__":
    main()
