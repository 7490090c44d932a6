"""The benchmark of agents runs, and every way writes as many tokens as it says."""

import json

import pytest

from benchmarks import dynamic


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_benchmark_of_agents_compares_all_ways(capsys: pytest.CaptureFixture[str]) -> None:
    dynamic.main(["--size", "tiny", "--batch", "2", "--tokens", "8", "--spans", "4", "--repeats", "1", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["way"] for row in rows][:3] == ["fixed", "generate()", "signals, span 4"]
    assert rows[0]["overhead"] == 0
    assert all(row["choosing"] > 0 for row in rows[2:])
