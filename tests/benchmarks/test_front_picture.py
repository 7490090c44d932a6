"""The picture of a front is a plain SVG that names and places every system, and can be read on any page."""

from itertools import combinations
from xml.etree import ElementTree

import pandas as pd
import pytest

from benchmarks.front_picture import INK, Scale, front_picture, main
from emorl.config import UserError
from tests.reporting.synthetic_run import write_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "three")


@pytest.fixture(scope="module")
def picture(run):
    return ElementTree.fromstring(front_picture(run, ["empathy", "fluency"]))


@pytest.fixture(scope="module")
def markers(picture):
    """System -> where its marker is."""
    paths = [path for path in picture.iter(f"{SVG}path") if path.find(f"{SVG}title") is not None]
    places = [path.get("transform").removeprefix("translate(").removesuffix(")").split() for path in paths]
    names = [path.find(f"{SVG}title").text for path in paths]
    return {name: (float(x), float(y)) for name, (x, y) in zip(names, places, strict=True)}


def test_every_system_has_a_marker_and_a_label(picture, markers, run):
    summary = pd.read_csv(run / "evaluate" / "summary.csv")
    assert set(markers) == set(summary["system"])
    written = {part for text in picture.iter(f"{SVG}text") for part in text.text.split(" · ")}
    fronts = set(summary.loc[summary["kind"] == "front", "system"])
    assert {"base", "reflection", "empathy", "fluency", "equal weights", "best found", "average", *fronts} <= written
    assert any("fluency against empathy, 6 test prompts" in text for text in written)


def test_higher_scores_lie_further_right_and_further_up(markers, run):
    summary = pd.read_csv(run / "evaluate" / "summary.csv").set_index("system")
    for a, b in combinations(markers, 2):
        assert (markers[a][0] - markers[b][0]) * (summary["empathy"][a] - summary["empathy"][b]) >= 0
        assert (markers[a][1] - markers[b][1]) * (summary["fluency"][a] - summary["fluency"][b]) <= 0
    assert markers["policy empathy"][0] > markers["base"][0]
    assert markers["policy fluency"][1] < markers["base"][1]


def test_a_scale_is_linear_and_has_round_ticks():
    scale = Scale(-0.1, 0.9, 0.0, 100.0)
    assert (scale(-0.1), scale(0.4), scale(0.9)) == (0.0, 50.0, 100.0)
    assert scale.ticks() == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert Scale(10, 17, 0, 1).ticks() == [10, 12, 14, 16]


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"])
def test_what_is_written_can_be_read_on_a_white_and_on_a_dark_page(picture, page):
    assert {text.get("fill") for text in picture.iter(f"{SVG}text")} == {INK}
    lighter, darker = sorted((_luminance(INK), _luminance(page)), reverse=True)
    assert (lighter + 0.05) / (darker + 0.05) > 4
    assert not list(picture.iter(f"{SVG}rect"))


def _luminance(colour):
    """Of WCAG 2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_command_draws_the_first_two_objectives(run, tmp_path):
    main([str(run), str(tmp_path / "docs" / "front.svg")])
    assert (tmp_path / "docs" / "front.svg").read_text() == front_picture(run, ["reflection", "empathy"])


def test_an_objective_that_is_none_is_one_line(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(run), str(tmp_path / "front.svg"), "--objectives", "reflection", "emphaty"])
    assert "no objective 'emphaty'" in capsys.readouterr().err
    with pytest.raises(UserError, match="has one objective"):
        front_picture(write_run(tmp_path / "one", ["short"], steps=1))
