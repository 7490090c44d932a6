"""A run directory that was damaged: what can be made again is, all else is one line that says what to do."""

import json
import os
import shutil

import pandas as pd
import pytest
import yaml

from emorl import load_run
from emorl.cli import main
from emorl.config import UserError
from emorl.runs.faults import faults_as_lines
from emorl.runs.run import only_process
from emorl.training.checkpoints import last_complete_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def vowels(prompts, completions, **columns):
    return [sum(text.count(v) for v in "aeiou") / max(1, len(text)) for text in (c[0]["content"] for c in completions)]


def digits(prompts, completions, **columns):
    return [sum(map(str.isdigit, text)) / max(1, len(text)) for text in (c[0]["content"] for c in completions)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_base_dir):
    """An experiment and its finished run."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    content = {
        "output": str(folder / "run"),
        "base": {"model": str(tiny_base_dir)},
        "data": {"path": str(folder / "prompts.jsonl"), "validation": 4, "test": 4},
        "objectives": {"vowels": f"{__name__}:vowels", "digits": f"{__name__}:digits"},
        "generation": {"max_new_tokens": 4, "do_sample": False},
        "train": {
            "grpo": {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4},
            "collapse": {"share": 0.0},
        },
        "search": {"levels": 1},
        "evaluate": {"attacks": False},
    }  # fmt: skip
    (folder / "experiment.yaml").write_text(yaml.safe_dump(content))
    assert main(["run", str(folder / "experiment.yaml")]) == 0
    return folder


@pytest.fixture
def copied(whole, tmp_path):
    """A copy that may be damaged: the command's arguments for an experiment, and its run directory."""
    run = shutil.copytree(whole / "run", tmp_path / "run")
    return [str(whole / "experiment.yaml"), f"output={run}"], run


def said(capsys):
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("emorl ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "list": lambda file: file.write_text("[1, 2]"),
    "empty object": lambda file: file.write_text("{}"),
    "empty": lambda file: file.write_text(""),
    "cut": cut,
    "bytes": lambda file: file.write_bytes(bytes(range(256))),
    "number": lambda file: file.write_text("7"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "command"),
    [
        ("search/result.json", "evaluate"),
        ("search/result.json", "report"),
        ("search/run.json", "search"),
        ("evaluate/result.json", "report"),
        ("train/vowels/result.json", "train"),
        ("train/vowels/run.json", "train"),
        ("search/cost.json", "report"),
        ("evaluate/summary.csv", "report"),
        ("evaluate/completions.parquet", "report"),
        ("experiment.yaml", "report"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(copied, capsys, file, command, damage):
    arguments, run = copied
    if (file, damage) == ("search/cost.json", "empty object"):
        pytest.skip("says that nothing was spent")
    DAMAGES[damage](run / file)
    capsys.readouterr()
    assert main([command, *([str(run)] if command == "report" else arguments)]) == 2
    line = said(capsys)
    assert file.rpartition("/")[2] in line or "unknown key" in line or "key 'base'" in line


@pytest.mark.parametrize("damage", ["empty", "cut", "bytes", "gone", "a row less"])
@pytest.mark.parametrize("command", ["search", "evaluate", "report"])
def test_the_table_of_trials_is_written_again_from_the_study(whole, copied, command, damage):
    arguments, run = copied
    file = run / "search" / "trials.csv"
    before = file.read_text()
    if damage == "gone":
        file.unlink()
    elif damage == "a row less":
        file.write_text("".join(before.splitlines(keepends=True)[:-1]))
    else:
        DAMAGES[damage](file)
    assert main([command, *([str(run)] if command == "report" else arguments)]) == 0
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("stage", "leaf"),
    [
        ("train", "train/vowels/policy"),
        ("search", "search/ensemble"),
        ("evaluate", "evaluate/summary.csv"),
        ("evaluate", "evaluate/completions.parquet"),
    ],
)
def test_what_a_finished_stage_left_is_made_again_where_it_is_gone(whole, copied, stage, leaf, capsys):
    arguments, run = copied
    before = load_run(whole / "run")
    shutil.rmtree(run / leaf) if (run / leaf).is_dir() else (run / leaf).unlink()
    capsys.readouterr()
    assert main([stage, *arguments]) == 0
    assert f"{run / leaf} is gone; it is made again" in capsys.readouterr().err
    after = load_run(run)
    pd.testing.assert_frame_equal(before.trials.drop(columns="seconds"), after.trials.drop(columns="seconds"))
    assert before.search.best == after.search.best
    assert [result.reward for result in before.training.values()] == [result.reward for result in after.training.values()]


def test_a_study_knows_what_it_belongs_to(copied, capsys):
    arguments, run = copied
    for name in ("run.json", "result.json"):
        (run / "search" / name).unlink()
    capsys.readouterr()
    assert main(["search", *arguments, "value.scalarize=minimum"]) == 2
    assert "holds the study of a run with other settings" in said(capsys)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt"])
def test_a_cut_checkpoint_gives_way_to_the_older_one(whole, copied, file, caplog):
    arguments, run = copied
    folder = run / "train" / "vowels"
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "policy")
    manifest = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**manifest, "finished": False}))
    newest = max((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    cut(newest / file)
    assert main(["train", *arguments]) == 0
    assert f"{newest} cannot be gone on from" in caplog.text
    expected = (whole / "run" / "train" / "vowels" / "policy" / "adapter_model.safetensors").read_bytes()
    assert (folder / "policy" / "adapter_model.safetensors").read_bytes() == expected


def test_files_have_the_modes_that_the_user_wants(whole, tmp_path):
    before = os.umask(0o027)
    try:
        assert main(["search", str(whole / "experiment.yaml"), f"output={tmp_path / 'run'}", f"policies={whole / 'run'}"]) == 0
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and path.name != ".lock"]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}


def _files(run):
    return sorted(str(path) for path in run.rglob("*") if not path.name.endswith(".lock"))


class _Full:
    """A disk that takes nothing any more."""

    def __init__(self, number):
        self.number = number

    def __call__(self, *arguments, **options):
        raise OSError(self.number, os.strerror(self.number), "somewhere")


@pytest.mark.parametrize(
    ("number", "words"), [(28, "the disk is full"), (30, "only be read"), (13, "may not write"), (122, "quota")]
)
def test_a_disk_that_takes_nothing_is_said_and_all_is_kept(whole, copied, capsys, monkeypatch, number, words):
    arguments, run = copied
    (run / "evaluate" / "result.json").unlink()
    before = _files(run)
    monkeypatch.setattr("emorl.runs.run.os.replace", _Full(number))
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    line = said(capsys)
    assert words in line
    assert "the same command goes on" in line
    monkeypatch.undo()
    assert _files(run) == before
    assert main(["evaluate", *arguments]) == 0


def test_what_a_library_raises_is_one_line_with_its_traceback_kept(copied, capsys, monkeypatch):
    arguments, run = copied
    shutil.rmtree(run / "evaluate")

    def impossible(*arguments, **options):
        return pd.DataFrame({"a": [1]}).loc["nowhere"]

    monkeypatch.setattr("emorl.evaluation.systems.evaluate", impossible)
    capsys.readouterr()
    assert main(["evaluate", *arguments]) == 2
    assert f"pandas: KeyError: 'nowhere'; the traceback is in {run / 'evaluate' / 'traceback.txt'}" in said(capsys)
    assert "in impossible" in (run / "evaluate" / "traceback.txt").read_text()
    monkeypatch.undo()
    assert main(["evaluate", *arguments]) == 0


def test_a_bug_of_ours_still_shows_its_traceback(copied, monkeypatch):
    arguments, run = copied
    shutil.rmtree(run / "evaluate")

    def bug(*arguments, **options):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("emorl.evaluation.systems.evaluate", bug)
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["evaluate", *arguments])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("[enforce fail] PytorchStreamWriter failed: No space left on device"), "the disk is full"),
        (ValueError("(sqlite3.OperationalError) database or disk is full"), "the disk is full"),
        (RuntimeError("attempt to write a readonly database"), "only be read"),
    ],
)
def test_a_full_disk_is_known_by_its_words_too(error, words):
    with pytest.raises(UserError, match=words), faults_as_lines():
        raise error


def test_a_pickle_in_a_checkpoint_is_set_aside(tmp_path):
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-2" / "adapter_model.bin").write_bytes(b"pickled")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    assert (tmp_path / "damaged-checkpoint-2" / "adapter_model.bin").exists()


def test_a_run_may_be_moved_and_named_from_elsewhere(copied, monkeypatch, capsys):
    """Relative, absolute, moved: it is the same run."""
    arguments, run = copied
    monkeypatch.chdir(run.parent)
    for output in ("run", "./run", str(run)):
        capsys.readouterr()
        assert main(["run", arguments[0], f"output={output}"]) == 0
        assert "finished before" in capsys.readouterr().err
    moved = run.rename(run.with_name("elsewhere"))
    assert main(["run", arguments[0], f"output={moved}"]) == 0


@pytest.mark.parametrize("stage", ["fuse", "evaluate", "train/vowels"])
def test_two_of_one_command_at_once_do_not_both_write(copied, capsys, stage):
    arguments, run = copied
    shutil.rmtree(run / stage, ignore_errors=True)
    capsys.readouterr()
    with only_process(run / stage):
        assert main([stage.partition("/")[0], *arguments]) == 2
    assert "is being written by another process" in said(capsys)
    assert not [path for path in (run / stage).rglob("*") if path.name not in (".lock", "run.json")]


def test_a_password_in_a_storage_url_is_written_nowhere(whole, tmp_path, capsys):
    place = "postgresql+psycopg://me:hunter2@nowhere/studies"
    rest = [f"output={tmp_path / 'run'}", f"policies={whole / 'run'}"]
    assert main(["search", str(whole / "experiment.yaml"), *rest, "--storage", place]) == 2
    captured = capsys.readouterr()
    assert "me:***@nowhere" in captured.err
    assert "hunter2" not in captured.err + captured.out
    assert not any(b"hunter2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
