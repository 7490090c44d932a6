"""The server's benchmark on a tiny base: real servers in processes of their own, every text of its full length."""

import re
import sys

import pytest

from benchmarks import serve
from benchmarks.serve import Measured, bound, table


def test_two_servers_are_measured_at_one_and_two_clients(tiny_base_dir, monkeypatch, capsys):
    words = ["--base", str(tiny_base_dir), "--policies", "2", "--clients", "1", "2", "--requests", "2", "--new-tokens", "4"]
    monkeypatch.setattr(sys, "argv", ["serve", *words, "--repeats", "1", "--port", "8931"])
    serve.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| K")]
    assert [line.split(" | ")[0] for line in lines] == ["| K = 2"] * 2 + ["| K = 1"] * 2
    numbers = [[float(number) for number in re.findall(r"[\d.]+", line)] for line in lines]
    assert all(min(row) > 0 for row in numbers)
    assert [row[4] for row in numbers if row[1] == 1] == [1.0, 1.0]  # one after the other against itself
    assert [row[5] for row in numbers[2:]] == [1.0, 1.0]  # one policy against itself


def test_ratios_are_medians_of_those_inside_a_repeat():
    found = {
        "K = 3": {
            1: [Measured(10, 0.1), Measured(30, 0.2), Measured(20, 0.3)],
            4: [Measured(20, 1), Measured(90, 2), Measured(80, 3)],
        },
        "K = 1": {
            1: [Measured(20, 0.1), Measured(30, 0.1), Measured(30, 0.1)],
            4: [Measured(40, 1), Measured(90, 1), Measured(160, 1)],
        },
    }
    assert table(found)[2:] == [
        "| K = 3 | 1 | 20.0 | 0.20 | 1.00 | 1.50 |",
        "| K = 3 | 4 | 80.0 | 2.00 | 3.00 | 2.00 |",
        "| K = 1 | 1 | 30.0 | 0.10 | 1.00 | 1.00 |",
        "| K = 1 | 4 | 90.0 | 1.00 | 3.00 | 1.00 |",
    ]


@pytest.mark.parametrize("rows", [[1, 6]])
def test_the_bound_is_of_every_number_of_rows(tiny_base_dir, rows):
    assert list(bound(str(tiny_base_dir), rows, repeats=2)) == rows
