"""The search loop: what a kill, a second worker or a damaged file may and may not do."""

import json
import signal
import subprocess
import sys
import textwrap
import time

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from emorl.config import UserError
from emorl.search.study import Budget, Finished, Scored, finished_trials, open_study, search

DISTRIBUTIONS = {"x": FloatDistribution(0.0, 1.0)}
ALL = [{"x": i / 20} for i in range(21)]
optuna.logging.set_verbosity(optuna.logging.WARNING)


def in_levels(finished):
    """Proposes five at a time; a level waits for the one before."""
    done = [trial.params for trial in finished]
    for start in range(0, len(ALL), 5):
        missing = [params for params in ALL[start : start + 5] if params not in done]
        if missing:
            return missing
    return None


def evaluate(candidates):
    return [Scored((params["x"], 1 - params["x"]), {"note": params["x"]}) for params in candidates]


def opened(path):
    return open_study(path, ["a", "b"], "s")


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_every_candidate_is_evaluated_once_and_recorded_with_its_scores(tmp_path, batch):
    finished = search(opened(tmp_path / "j.log"), in_levels, evaluate, DISTRIBUTIONS, batch=batch)
    assert [trial.params for trial in finished] == ALL
    assert [trial.scores for trial in finished] == [(p["x"], 1 - p["x"]) for p in ALL]
    assert [trial.notes["note"] for trial in finished] == [p["x"] for p in ALL]


def test_a_finished_search_evaluates_nothing_again(tmp_path):
    first = search(opened(tmp_path / "j.log"), in_levels, evaluate, DISTRIBUTIONS)

    def never(candidates):
        raise AssertionError("evaluated again")

    assert search(opened(tmp_path / "j.log"), in_levels, never, DISTRIBUTIONS) == first


def test_the_number_of_trials_is_respected_over_restarts(tmp_path):
    assert len(search(opened(tmp_path / "j.log"), in_levels, evaluate, DISTRIBUTIONS, batch=4, budget=Budget(trials=7))) == 7
    assert len(search(opened(tmp_path / "j.log"), in_levels, evaluate, DISTRIBUTIONS, batch=4, budget=Budget(trials=9))) == 9


def test_an_error_while_evaluating_reaches_the_user_and_loses_nothing(tmp_path):
    def fails_at_six(candidates):
        if any(params["x"] == 0.3 for params in candidates):
            raise UserError("objective 'a' returned nan")
        return evaluate(candidates)

    with pytest.raises(UserError, match="returned nan"):
        search(opened(tmp_path / "j.log"), in_levels, fails_at_six, DISTRIBUTIONS)
    study = opened(tmp_path / "j.log")
    assert len(finished_trials(study)) == 6
    assert not study.get_trials(states=(TrialState.RUNNING,))
    finished = search(study, in_levels, evaluate, DISTRIBUTIONS)
    assert sorted(trial.params["x"] for trial in finished) == [params["x"] for params in ALL]


WORKER = textwrap.dedent(
    """
    import sys, time, importlib.util
    from pathlib import Path
    from emorl.search.study import search
    spec = importlib.util.spec_from_file_location("t", sys.argv[1]); t = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(t)
    def slowly(candidates):
        with open(sys.argv[3], "a") as log:
            for params in candidates:
                log.write(f"{params['x']}\\n"); log.flush(); time.sleep(float(sys.argv[4]))
        return t.evaluate(candidates)
    t.search(t.opened(Path(sys.argv[2])), t.in_levels, slowly, t.DISTRIBUTIONS, batch=2)
    """
)


def start_worker(journal, log, seconds):
    return subprocess.Popen([sys.executable, "-c", WORKER, __file__, str(journal), str(log), str(seconds)])


def test_killed_at_any_moment_the_search_continues_without_loss_or_repetition(tmp_path):
    journal, log = tmp_path / "j.log", tmp_path / "evaluated"
    before = []
    for seconds in (0.35, 0.6, 0.2):
        worker = start_worker(journal, log, 0.05)
        while not log.exists() or len(log.read_text().splitlines()) < len(before) + 3:
            assert worker.poll() is None or worker.returncode == 0
            time.sleep(0.01)
        time.sleep(seconds / 10)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        finished = finished_trials(opened(journal))
        assert finished[: len(before)] == before
        before = finished
    finished = search(opened(journal), in_levels, evaluate, DISTRIBUTIONS)
    assert finished[: len(before)] == before
    assert sorted(trial.params["x"] for trial in finished) == [params["x"] for params in ALL]
    evaluated = log.read_text().split()
    complete = {str(trial.params["x"]) for trial in before}
    assert len(evaluated) - len(set(evaluated)) <= 3 * 2, "a kill repeats at most the batch it interrupted"
    assert all(evaluated.count(value) >= 1 for value in complete)


def test_several_workers_share_one_study_without_evaluating_anything_twice(tmp_path):
    journal, log = tmp_path / "j.log", tmp_path / "evaluated"
    opened(journal)
    workers = [start_worker(journal, log, 0.02) for _ in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    evaluated = log.read_text().split()
    assert sorted(map(float, evaluated)) == [params["x"] for params in ALL]
    assert len(finished_trials(opened(journal))) == len(ALL)


def test_a_line_cut_short_is_set_aside_and_said(tmp_path, caplog):
    journal = tmp_path / "j.log"
    first = search(opened(journal), in_levels, evaluate, DISTRIBUTIONS, budget=Budget(trials=5))
    with journal.open("ab") as file:
        file.write(b'{"op_code": 6, "wor')
    assert finished_trials(opened(journal)) == first
    assert "ended in the middle of a line" in caplog.text
    assert (tmp_path / "j.log.torn").read_bytes() == b'{"op_code": 6, "wor'
    assert len(search(opened(journal), in_levels, evaluate, DISTRIBUTIONS)) == len(ALL)


@pytest.mark.parametrize("damage", [b"garbage\n", b'{"op_code": 6}\n', b"[1, 2]\n", b"\x00\x01\n"])
def test_a_damaged_journal_is_refused_and_left_as_it_is(tmp_path, damage):
    journal = tmp_path / "j.log"
    search(opened(journal), in_levels, evaluate, DISTRIBUTIONS, budget=Budget(trials=3))
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:4]) + damage + b"".join(lines[4:]))
    content = journal.read_bytes()
    with pytest.raises(UserError, match=r"is damaged and cannot be read as an Optuna journal.*restore it") as caught:
        opened(journal)
    assert "\n" not in str(caught.value)
    assert journal.read_bytes() == content


def test_a_study_of_other_objectives_is_refused(tmp_path):
    opened(tmp_path / "j.log")
    with pytest.raises(UserError, match=r"holds a study of the objectives \['a', 'b'\], not \['b', 'a'\]"):
        open_study(tmp_path / "j.log", ["b", "a"], "s")
    with pytest.raises(UserError, match=r"cannot be continued|holds a study of the objectives"):
        open_study(tmp_path / "j.log", ["a"], "s")


@pytest.mark.parametrize("url", ["nonsense", "sqlite:////no/such/directory/x.db", "postgresql://nobody@127.0.0.1:1/x"])
def test_a_storage_that_cannot_be_opened_is_one_line(url):
    with pytest.raises(UserError, match=r"search\.storage") as caught:
        open_study(url, ["a"], "s")
    assert "\n" not in str(caught.value)


def test_a_database_is_a_storage_too(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    finished = search(open_study(url, ["a", "b"], "s"), in_levels, evaluate, DISTRIBUTIONS)
    assert [trial.params for trial in finished] == ALL
    assert len(json.dumps(finished[0].notes)) > 0


def costing(seconds, tokens):
    def evaluate(candidates):
        return [Scored((p["x"], 0.0), {"cost": {"seconds": seconds, "tokens": tokens}}) for p in candidates]

    return evaluate


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(seconds=10.0), 6),  # 1.5 s each
        (Budget(tokens=75), 3),  # 25 each
        (Budget(seconds=10.0, tokens=75), 3),
        (Budget(trials=2, seconds=10.0), 2),
        (Budget(seconds=0.1), 1),  # one tells what they cost
        (Budget(), 21),
    ],
)
def test_a_budget_is_not_exceeded_whatever_the_batch(tmp_path, budget, expected):
    for batch in (1, 4, 100):
        study = opened(tmp_path / f"{batch}.log")
        assert len(search(study, in_levels, costing(1.5, 25), DISTRIBUTIONS, batch=batch, budget=budget)) == expected


def test_a_budget_counts_what_former_runs_spent(tmp_path):
    for seconds, expected in ((5.0, 3), (9.0, 6)):
        study = opened(tmp_path / "j.log")
        assert len(search(study, in_levels, costing(1.5, 25), DISTRIBUTIONS, budget=Budget(seconds=seconds))) == expected


def test_room_is_judged_by_the_average_cost():
    finished = [Finished(i, {}, (0.0,), {"cost": {"seconds": s, "tokens": 10}}) for i, s in enumerate((1.0, 3.0))]
    assert Budget(seconds=11.0).room(finished) == 3
    assert Budget(tokens=19).room(finished) == 0
    assert Budget(trials=10, seconds=11.0).room(finished) == 3
    assert Budget().room(finished) is None
