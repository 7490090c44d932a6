"""Folders of real models, where `python -m recipes.real_model.prepare` has put them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.real_model.prepare import models_folder


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Factory: the folder of a prepared model; skips where it is not there."""

    def folder(name: str) -> Path:
        path = models_folder() / name
        if not (path / "config.json").is_file():
            pytest.skip(f"no {path}: python -m recipes.real_model.prepare {name}, or EMORL_MODELS=DIR")
        return path

    return folder
