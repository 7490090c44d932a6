"""Finished runs of three and of two objectives."""

from pathlib import Path

import pytest

from tests.reporting.synthetic_run import write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "three")


@pytest.fixture(scope="session")
def run_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "two", ("short", "diverse"))
