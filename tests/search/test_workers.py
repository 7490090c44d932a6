"""Several workers on one study: none dies, no candidate is lost or evaluated twice; whoever dies is replaced."""

import collections
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from emorl.config import UserError
from emorl.config.secrets import masked
from emorl.search import study as studies
from emorl.search import worker as workers
from emorl.search.storage import check_storage, open_storage
from emorl.search.study import Scored, finished_trials, open_study, search
from emorl.search.worker import Worker
from tests.search.test_study import ALL, DISTRIBUTIONS, evaluate, in_levels

optuna.logging.set_verbosity(optuna.logging.WARNING)

SCRIPT = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from emorl.search import worker
    from emorl.search.study import open_study, search
    from tests.search.test_study import DISTRIBUTIONS, evaluate, in_levels
    worker.STALE_SECONDS, worker._SIGN_SECONDS = 3.0, 0.5
    def slowly(candidates):
        time.sleep(0.05)
        return evaluate(candidates)
    place = sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1])
    search(open_study(place, ["a", "b"], "s"), in_levels, slowly, DISTRIBUTIONS)
    """
)


def start(place, host="here"):
    root = Path(__file__).parents[2]
    surroundings = {**os.environ, "PYTHONPATH": str(root), "EMORL_HOST": host, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(place)], env=surroundings, cwd=root, stderr=subprocess.PIPE, text=True
    )


def end(process, seconds=120):
    _, error = process.communicate(timeout=seconds)
    assert process.returncode == 0, error[-2000:]


def finished_in(place):
    """The finished trials; Optuna closes no connection by itself."""
    study = open_study(place, ["a", "b"], "s")
    finished = finished_trials(study)
    if "://" in str(place):
        study._storage._backend.scoped_session.remove()
        study._storage._backend.engine.dispose()
    return finished


def check_all_is_there_once(place):
    counts = collections.Counter(trial.params["x"] for trial in finished_in(place))
    assert counts == {params["x"]: 1 for params in ALL}


def test_a_worker_that_finds_everything_done_meanwhile_proposes_on(tmp_path, monkeypatch):
    """Between its look at the finished trials and its proposal, another worker has finished them all."""
    study = open_study(tmp_path / "j.log", ["a", "b"], "s")
    looks = 0
    real = studies.finished_trials

    def late(study):
        nonlocal looks
        looks += 1
        seen = real(study)
        if looks == 1:  # the other worker's whole level comes behind this look
            other = open_study(tmp_path / "j.log", ["a", "b"], "s")
            for params in ALL[:5]:
                other.enqueue_trial(dict(params), user_attrs={"candidate": dict(params)})
                trial = other.ask(dict(DISTRIBUTIONS))
                other.tell(trial, list(evaluate([params])[0].scores))
        return seen

    monkeypatch.setattr(studies, "finished_trials", late)
    finished = search(study, in_levels, evaluate, DISTRIBUTIONS)
    assert sorted(trial.params["x"] for trial in finished) == [params["x"] for params in ALL]


def test_a_worker_of_another_host_that_gives_no_sign_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(workers, "STALE_SECONDS", 2.0)
    monkeypatch.setattr(workers, "_SIGN_SECONDS", 0.3)
    study = open_study(tmp_path / "j.log", ["a", "b"], "s")
    study.enqueue_trial({"x": 0.0}, user_attrs={"candidate": {"x": 0.0}})
    trial = study.ask(dict(DISTRIBUTIONS))
    trial.set_user_attr("worker", {"host": "gone", "pid": os.getpid(), "started": 0.0, "id": "lost"})
    finished = search(study, in_levels, evaluate, DISTRIBUTIONS)
    assert sorted(trial.params["x"] for trial in finished) == [params["x"] for params in ALL]
    assert "a worker on gone has a candidate and gives no sign of life; it is taken over after 2 s" in caplog.text


def test_a_worker_of_another_host_that_lives_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(workers, "_SIGN_SECONDS", 0.1)
    study = open_study(tmp_path / "j.log", ["a", "b"], "s")
    monkeypatch.setattr(workers, "host_name", lambda: "far")
    far = Worker(open_study(tmp_path / "j.log", ["a", "b"], "s"))
    monkeypatch.setattr(workers, "host_name", lambda: "near")
    near = Worker(study)
    study.enqueue_trial({"x": 0.0}, user_attrs={"candidate": {"x": 0.0}})
    study.ask(dict(DISTRIBUTIONS)).set_user_attr("worker", far.named)
    with far:
        for _ in range(15):
            near.return_orphans()
            time.sleep(0.1)
        assert [trial.state for trial in study.trials] == [TrialState.RUNNING]
    for _ in range(15):
        near.return_orphans()
        time.sleep(0.1)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_a_result_that_comes_after_its_takeover_changes_nothing(tmp_path):
    study = open_study(tmp_path / "j.log", ["a", "b"], "s")

    def slow(candidates):
        for trial in study.get_trials(states=(TrialState.RUNNING,)):  # taken over while this one was away
            study.tell(trial.number, [0.0, 0.0])
        return [Scored((1.0, 1.0)) for _ in candidates]

    finished = search(study, lambda finished: None if finished else ALL[:1], slow, DISTRIBUTIONS)
    assert [trial.scores for trial in finished] == [(0.0, 0.0)]


@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_four_workers_on_an_empty_study_at_once_lose_nothing(tmp_path, kind):
    place = tmp_path / "j.log" if kind == "journal" else f"sqlite:///{tmp_path}/study.db"
    for process in [start(place) for _ in range(4)]:
        end(process)
    check_all_is_there_once(place)


def test_a_database_that_is_locked_while_a_result_is_recorded_is_waited_for(tmp_path):
    study = open_study(f"sqlite:///{tmp_path}/study.db", ["a", "b"], "s")
    locked = []

    def locking(candidates):
        """Another process holds the database for six seconds from here on."""
        if not locked:
            code = (
                "import sqlite3, sys, time; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN EXCLUSIVE'); print(flush=True)"
            )
            holder = subprocess.Popen(
                [sys.executable, "-c", f"{code}; time.sleep(6)", str(tmp_path / "study.db")], stdout=subprocess.PIPE
            )
            holder.stdout.readline()
            locked.append(holder)
        return evaluate(candidates)

    start = time.monotonic()
    assert [trial.params for trial in search(study, in_levels, locking, DISTRIBUTIONS)] == ALL
    assert time.monotonic() - start > 5
    locked[0].communicate()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql://emorl:hunter2@host/studies", r"emorl:\*\*\*@host/studies: a password in a URL would be written"),
        ("mysql+pymysql://u:p%40ss@h:3306/d", "give it by the environment"),
        ("no url at all", "expected such as sqlite"),
    ],
)
def test_a_password_is_refused_and_never_shown(url, message):
    with pytest.raises(UserError, match=message) as caught:
        check_storage(url)
    assert "hunter2" not in str(caught.value)
    assert "p%40ss" not in str(caught.value)


def test_passwords_of_urls_are_masked_wherever_they_stand():
    text = "cannot open 'postgresql://me:s3cret@h/d' nor http://a:b@c/d, but user@host stays"
    assert masked(text) == "cannot open 'postgresql://me:***@h/d' nor http://a:***@c/d, but user@host stays"


def test_a_storage_that_cannot_be_opened_is_one_line(tmp_path):
    for url in ("nosql://x", f"sqlite:///{tmp_path}/nowhere/deep/study.db"):
        with pytest.raises(UserError, match=r"search\.storage") as caught:
            open_storage(url)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A private PostgreSQL: (URL, restart)."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(p).parent for p in [shutil.which("initdb")] if p]
    if not programs or (os.geteuid() == 0 and shutil.which("su") is None):
        pytest.skip("no PostgreSQL server here (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the extra postgresql")
    folder = Path(f"/tmp/emorl-postgresql-{os.getpid()}")
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def run(command):
        line = f"export PATH={programs[-1]}:$PATH; cd {folder}; {command}"
        asked = ["su", "postgres", "-c", line] if os.geteuid() == 0 else ["bash", "-c", line]
        subprocess.run(asked, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    options = f'-o "-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off" -l {folder}/log'
    try:
        run(f"initdb -D {folder}/data -A trust -U emorl")
    except (subprocess.CalledProcessError, OSError):
        shutil.rmtree(folder)
        pytest.skip("PostgreSQL is installed, but a private server cannot be made here")
    run(f"pg_ctl -w -D {folder}/data {options} start")
    yield lambda name: _database(run, port, folder, name), lambda: run(f"pg_ctl -w -m fast -D {folder}/data {options} restart")
    run(f"pg_ctl -m immediate -D {folder}/data stop")
    shutil.rmtree(folder, ignore_errors=True)


def _database(run, port, folder, name):
    run(f"createdb -h 127.0.0.1 -p {port} -U emorl {name}")
    return f"postgresql+psycopg://emorl@127.0.0.1:{port}/{name}"


@pytest.mark.postgresql
def test_four_workers_on_an_empty_postgresql_lose_nothing(server):
    place = server[0]("together")
    for process in [start(place) for _ in range(4)]:
        end(process)
    check_all_is_there_once(place)


@pytest.mark.postgresql
def test_a_killed_worker_a_restarted_database_and_another_host_lose_nothing(server):
    place = server[0]("faults")
    killed, *others = [start(place, host) for host in ("first", "second", "second", "third")]
    while not (done := len(finished_in(place))):
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    server[1]()
    late = start(place, "fourth")
    for process in (*others, late):
        end(process)
    assert done
    check_all_is_there_once(place)


@pytest.mark.slow
@pytest.mark.postgresql
@pytest.mark.parametrize("repetition", range(20))
def test_twenty_times_nothing_is_lost(server, repetition):
    place = server[0](f"repetition{repetition}")
    killed, *others = [start(place, f"host{number % 2}") for number in range(4)]
    time.sleep(2.0 + 0.15 * repetition)
    killed.kill()
    killed.communicate()
    if repetition % 2:
        server[1]()
    for process in (*others, start(place, "another")):
        end(process)
    check_all_is_there_once(place)
