"""The README's picture of a front: what a run offers in two of its objectives on the test prompts, as a plain SVG.

    python -m benchmarks.front_picture runs/quickstart docs/front.svg --objectives reflection empathy

Nothing is filled behind it, and what is written has a grey that can be read on a white and on a dark page.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from emorl.config import UserError, nearest
from emorl.evaluation.pareto import front
from emorl.evaluation.systems import OFFERS
from emorl.reporting.figures import MARKERS, short_name
from emorl.reporting.results import load_run
from emorl.runs.results import Kind
from emorl.runs.run import write_text

INK = "#747c85"
_WIDTH, _HEIGHT = 760, 500
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 744, 44, 420  # of the frame
_LETTER, _LINE = 7.0, 15  # width and height of what is written
_NEAR = 8  # pixels within which two systems share a label
_SYMBOLS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0Z",
    "x": "M-5 -5L5 5M-5 5L5 -5",
    "square": "M-5 -5H5V5H-5Z",
    "triangle-up": "M0 -6L6 5H-6Z",
    "star": "M0 -8L2 -2.6L7.6 -2.5L3.1 1L4.7 6.5L0 3.2L-4.7 6.5L-3.1 1L-7.6 -2.5L-2 -2.6Z",
    "diamond": "M0 -7L6 0L0 7L-6 0Z",
}


@dataclass(frozen=True)
class Scale:
    """Scores of one objective as pixels, from `low` at `start` to `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, score: float) -> float:
        return self.start + (self.end - self.start) * (score - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round scores, three to eight."""
        power = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        step = max(width * power for width in (1, 2, 5) if width * power <= (self.high - self.low) / 3)
        return [step * count for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def front_picture(run: Path, names: Sequence[str] = ()) -> str:
    """The evaluated systems of a run in two objectives, the first two by default; what the ensemble offers is joined by a line.

    Raises:
        UserError: the run has no finished evaluation, or no such objectives.
    """
    results = load_run(run)
    evaluated, known = results.evaluated, results.objectives
    x, y = [*(names or known), ""][:2]
    for name in (x, y):
        if name not in known:
            raise UserError(f"no objective {name!r} in {run}; {nearest(name, known)}" if name else f"{run} has one objective")
    table = evaluated.summary.sort_values("kind", key=lambda kinds: kinds == Kind.FRONT, kind="stable")  # labelled last
    across, up = (
        _scale((table[name] - table[f"{name}_error"]).min(), (table[name] + table[f"{name}_error"]).max(), start, end)
        for name, start, end in ((x, _LEFT, _RIGHT), (y, _BOTTOM, _TOP))
    )
    size = {"viewBox": f"0 0 {_WIDTH} {_HEIGHT}", "width": str(_WIDTH), "height": str(_HEIGHT)}
    picture = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": "sans-serif"})
    title = f"What the run offers: {y} against {x}, {evaluated.test_prompts} test prompts"
    _add(picture, "title", title)
    _text(picture, title, _LEFT, 24, size=16)
    _draw_axes(picture, across, up, x, y)
    offered = table[table["kind"].isin(OFFERS["ensemble"])]
    best = offered[front(offered[[x, y]])].sort_values(x)
    corners = "".join(f"V{up(down):.1f}H{across(right):.1f}" for right, down in zip(best[x], best[y], strict=True))
    _line(picture, f"M{across(best[x].iloc[0]):.1f} {up(best[y].iloc[0]):.1f}{corners}", stroke_dasharray="4 4")
    groups: dict[tuple[float, float], list[str]] = {}
    for system in table.to_dict("records"):
        point = (across(system[x]), up(system[y]))
        symbol, colour, _ = MARKERS[system["kind"]]
        wide, high = (scale(system[f"{name}_error"]) - scale(0) for scale, name in ((across, x), (up, y)))
        left, top = point
        _line(picture, f"M{left - wide:.1f} {top:.1f}h{2 * wide:.1f}M{left:.1f} {top - high:.1f}v{2 * high:.1f}", colour)
        _add(_marker(picture, symbol, colour, *point), "title", system["system"])
        place = next((place for place in groups if math.dist(place, point) < _NEAR), point)
        name = system["system"] if system["kind"] == Kind.FRONT else short_name(system["system"], system["kind"])
        groups.setdefault(place, []).append(name)
    _draw_labels(picture, {place: " · ".join(labels) for place, labels in groups.items()})
    _draw_legend(picture, [kind for kind in MARKERS if kind in set(table["kind"])])
    ElementTree.indent(picture)
    return ElementTree.tostring(picture, encoding="unicode") + "\n"


def _scale(low: float, high: float, start: float, end: float) -> Scale:
    margin = 0.06 * (high - low) or 0.1
    return Scale(low - margin, high + margin, start, end)


def _draw_axes(picture: Element, across: Scale, up: Scale, x: str, y: str) -> None:
    for score in across.ticks():
        _line(picture, f"M{across(score):.1f} {_TOP}V{_BOTTOM}", stroke_opacity="0.25")
        _text(picture, f"{score:.4g}", across(score), _BOTTOM + 18, "middle")
    for score in up.ticks():
        _line(picture, f"M{_LEFT} {up(score):.1f}H{_RIGHT}", stroke_opacity="0.25")
        _text(picture, f"{score:.4g}", _LEFT - 8, up(score) + 4, "end")
    _line(picture, f"M{_LEFT} {_TOP}V{_BOTTOM}H{_RIGHT}")
    _text(
        picture,
        f"{x} → (higher is better; bars ± one standard error; dashed: the ensemble's front)",
        (_LEFT + _RIGHT) / 2,
        _BOTTOM + 40,
        "middle",
    )
    middle = (_TOP + _BOTTOM) / 2
    _text(picture, f"{y} → (higher is better)", 18, middle, "middle").set("transform", f"rotate(-90 18 {middle:g})")


def _draw_labels(picture: Element, labels: dict[tuple[float, float], str]) -> None:
    """Each beside its place, where it covers no marker and no other label; where there is no such spot, above to the right."""
    taken = [(left - 6, top - 6, left + 6, top + 6) for left, top in labels]
    for (left, top), label in labels.items():
        width, spots = _LETTER * len(label), []
        for drop, side in product((-11, 11, -26, 26, -41, 41, -56, 56), (1, -1)):
            start, middle = left + 9 if side > 0 else left - 9 - width, top + drop
            spots.append((start, middle - _LINE / 2, start + width, middle + _LINE / 2))
        inside = [spot for spot in spots if spot[0] > _LEFT and spot[1] > _TOP and spot[2] < _WIDTH and spot[3] < _BOTTOM]
        free = [(a, b, c, d) for a, b, c, d in inside if not any(a < g and e < c and b < h and f < d for e, f, g, h in taken)]
        chosen = [*free, *inside, *spots][0]
        taken.append(chosen)
        at, anchor = (left + 9, "start") if chosen[0] > left else (left - 9, "end")
        _text(picture, label, at, chosen[3] - 3.5, anchor)


def _draw_legend(picture: Element, kinds: Sequence[Kind]) -> None:
    left = _LEFT + 6.0
    for symbol, colour, name in (MARKERS[kind] for kind in kinds):
        _marker(picture, symbol, colour, left, _HEIGHT - 18)
        _text(picture, name, left + 12, _HEIGHT - 14)
        left += _LETTER * len(name) + 38


def _line(picture: Element, path: str, colour: str = INK, **attributes: str) -> None:
    _add(picture, "path", d=path, fill="none", stroke=colour, **attributes)


def _marker(picture: Element, symbol: str, colour: str, left: float, top: float) -> Element:
    where = f"translate({left:.1f} {top:.1f})"
    return _add(picture, "path", d=_SYMBOLS[symbol], fill=colour, stroke=colour, stroke_width="2", transform=where)


def _text(picture: Element, text: str, left: float, top: float, anchor: str = "start", size: int = 13) -> Element:
    return _add(picture, "text", text, x=f"{left:.1f}", y=f"{top:.1f}", fill=INK, text_anchor=anchor, font_size=str(size))


def _add(parent: Element, tag: str, text: str | None = None, **attributes: str) -> Element:
    child = ElementTree.SubElement(parent, tag, {name.replace("_", "-"): value for name, value in attributes.items()})
    child.text = text
    return child


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="output of an experiment that was evaluated")
    parser.add_argument("file", type=Path, metavar="OUT.svg")
    parser.add_argument("--objectives", nargs=2, default=(), metavar=("X", "Y"), help="the first two by default")
    options = parser.parse_args(arguments)
    try:
        write_text(options.file, front_picture(options.run, options.objectives))
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
