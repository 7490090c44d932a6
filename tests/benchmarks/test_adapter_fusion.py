"""The benchmark of adapter fusion compares what it says; its timings are not tested."""

import json

import pytest

from benchmarks.adapter_fusion import main


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_way_is_measured_and_only_the_exact_ones_are_exact(tmp_path, capsys):
    options = ["--size", "tiny", "--rank", "4", "--repeats", "1", "--threads", "1", "--peft-svd"]
    assert main([*options, "--json", str(tmp_path / "rows.json")]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())
    errors = {row["way"]: row["error"] for row in rows}
    assert list(errors) == ["ours, concatenated", "ours, compressed to rank 4", "peft linear", "peft cat", "peft svd"]
    assert max(errors["ours, concatenated"], errors["peft cat"]) < 1e-6
    assert 0.1 < errors["ours, compressed to rank 4"] < errors["peft linear"]
    assert errors["ours, compressed to rank 4"] == pytest.approx(errors["peft svd"], rel=1e-5)
    assert "| peft linear |" in capsys.readouterr().out
