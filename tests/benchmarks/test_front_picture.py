"""The picture is XML, names every system, and puts higher scores further right and up."""

from xml.etree import ElementTree

import pandas as pd
import pytest

from benchmarks.front_picture import main
from tests.reporting.synthetic_run import write_run

SVG = "{http://www.w3.org/2000/svg}"


def test_every_system_has_a_point_and_a_name(tmp_path):
    run = write_run(tmp_path / "run", ("short", "diverse"))
    main([str(run), str(tmp_path / "front.svg")])
    root = ElementTree.parse(tmp_path / "front.svg").getroot()
    names = [text.text for text in root.iter(f"{SVG}text")]
    summary = pd.read_csv(run / "evaluate" / "summary.csv").sort_values("diverse", ascending=False)
    assert set(summary["system"]) <= set(names)
    circles = list(root.iter(f"{SVG}circle"))
    assert len(circles) == len(summary)
    across = pd.Series([float(circle.get("cx")) for circle in circles])
    assert across.rank().tolist() == pytest.approx(summary["short"].round(12).rank().tolist())
    ups = [float(circle.get("cy")) for circle in circles]
    assert ups == sorted(ups)
