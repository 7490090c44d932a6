"""One small finished run."""

from pathlib import Path

import pytest

from tests.reporting.synthetic_run import write_run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "three")
