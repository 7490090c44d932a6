"""The search loop over one Optuna study: propose, enqueue, evaluate, record; continues after a kill, shared by workers.

The study is the only memory. Candidates wait in its own queue; a worker claims some, evaluates them and records the vector
of scores. A proposer is a function of the finished trials, so what was killed is proposed, or claimed, again.
"""

import fcntl
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import optuna
import psutil
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from emorl.config import UserError

logger = logging.getLogger(__name__)

Params = Mapping[str, Any]
"""one candidate: parameter name -> value"""


@dataclass(frozen=True)
class Scored:
    """What evaluating one candidate gave: one score per objective (maximised), and anything worth keeping beside it."""

    scores: tuple[float, ...]
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """One finished trial."""

    number: int
    params: Params
    scores: tuple[float, ...]
    notes: Mapping[str, Any]


@dataclass(frozen=True)
class Budget:
    """What a search may spend; None: without limit. Seconds and tokens are those in the trials' notes."""

    trials: int | None = None
    seconds: float | None = None
    tokens: int | None = None

    def room(self, finished: Sequence[Finished]) -> int | None:
        """How many more candidates fit, judged by what the finished ones cost on average; None: any number."""
        rooms = [] if self.trials is None else [self.trials - len(finished)]
        for kind, limit in (("seconds", self.seconds), ("tokens", self.tokens)):
            if limit is None:
                continue
            spent = sum(trial.notes["cost"][kind] for trial in finished)
            rooms.append(int((limit - spent) * len(finished) / spent) if spent else 1)  # one, to see what it costs
        return min(rooms, default=None)

    def is_spent(self, finished: Sequence[Finished]) -> bool:
        """Whether no further candidate fits."""
        room = self.room(finished)
        return room is not None and room < 1


Proposer = Callable[[Sequence[Finished]], Sequence[Params] | None]
"""The finished trials, in order of number -> the next candidates, or None when the search is over. What it proposes may
already be known or running: only new candidates are enqueued. While it waits for others' results it repeats itself."""

Evaluate = Callable[[Sequence[Params]], Sequence[Scored]]
"""Some candidates -> their scores, in the same order."""

Valuation = Callable[[Sequence[Finished]], Sequence[float]]
"""The finished trials -> one value each, to be maximised."""


class Space(Protocol):
    """What candidates there are; proposers know no more of them."""

    @property
    def distributions(self) -> Mapping[str, BaseDistribution]:
        """Of every parameter, for Optuna."""
        ...

    def canonical(self, params: Params) -> Params | None:
        """The one candidate that stands for all that are the same; None for what is none."""
        ...

    def corners(self) -> Sequence[Params]:
        """Candidates that every search begins with."""
        ...

    def vector(self, params: Params) -> Sequence[float]:
        """Numbers that tell candidates apart."""
        ...


_POLL_SECONDS = 1.0
_CLAIM_SECONDS = 30.0  # between popping a trial and signing it there are milliseconds


def open_study(
    storage: str | Path, objectives: Sequence[str], name: str, settings: Mapping[str, Any] | None = None
) -> optuna.Study:
    """The study called `name`, made if it is not there; one maximised value per objective.

    Args:
        storage: path of a journal file, or an Optuna storage URL (`sqlite:///…`, `postgresql://…`).
        settings: of the run that the study belongs to; they are kept in it, and another run's are refused.

    Raises:
        UserError: a damaged journal, a URL that cannot be opened, a study of other objectives.
    """
    try:
        opened = _journal(storage) if isinstance(storage, Path) else optuna.storages.get_storage(storage)
        study = _create(opened, objectives, name)
    except (SQLAlchemyError, StorageInternalError, ImportError) as error:
        raise UserError(f"search.storage {storage}: {str(error).splitlines()[0]:.200}") from None
    if study.user_attrs.get("objectives", list(objectives)) != list(objectives):
        raise UserError(
            f"{storage} holds a study of the objectives {study.user_attrs['objectives']}, not {list(objectives)}; "
            "give another output or storage"
        )
    if "objectives" not in study.user_attrs:
        study.set_user_attr("objectives", list(objectives))
    if settings is not None:
        if study.user_attrs.get("settings", settings) != settings:
            raise UserError(f"{storage} holds the study of a run with other settings; give another output or storage")
        study.set_user_attr("settings", dict(settings))
    return study


def _create(storage: BaseStorage, objectives: Sequence[str], name: str) -> optuna.Study:
    try:
        return optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[StudyDirection.MAXIMIZE] * len(objectives),
            sampler=optuna.samplers.RandomSampler(),  # never asked: all candidates are enqueued
            load_if_exists=True,
        )
    except ValueError as error:  # another number of objectives
        raise UserError(f"study {name!r} cannot be continued: {error}; give another output or storage") from None


def _journal(path: Path) -> BaseStorage:
    """Optuna's journal storage on `path`; a line cut short by a kill is moved aside, any other damage is refused."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: Any = _KernelLock(path.with_name(f"{path.name}.lock"))
    if path.exists():
        lock.acquire()  # nobody is in the middle of writing a line
        _set_torn_line_aside(path)
        lock.release()
    try:
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
    except (AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged and cannot be read as an Optuna journal ({type(error).__name__}: {error}); restore it from "
            "a copy, or move it away to start the search again"
        ) from None


class _KernelLock:
    """Optuna's journal lock as one that the kernel releases when its holder is killed; Optuna's own then waits 30 s."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def acquire(self) -> bool:
        self._file = self._path.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()


def _set_torn_line_aside(path: Path) -> None:
    content = path.read_bytes()
    whole, newline, torn = content.rpartition(b"\n")
    if not torn:
        return
    aside = path.with_name(f"{path.name}.torn")
    aside.write_bytes(torn)
    os.truncate(path, len(whole) + len(newline))
    logger.warning("%s ended in the middle of a line; its %d bytes are in %s", path, len(torn), aside)


def finished_trials(study: optuna.Study) -> list[Finished]:
    """The finished trials in order of number."""
    return [
        Finished(trial.number, trial.params, tuple(trial.values), trial.user_attrs.get("notes", {}))
        for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ]


def search(
    study: optuna.Study,
    propose: Proposer,
    evaluate: Evaluate,
    distributions: Mapping[str, BaseDistribution],
    *,
    batch: int = 1,
    budget: Budget = Budget(),
    on_finished: Callable[[Sequence[Finished]], None] = lambda finished: None,
) -> list[Finished]:
    """Runs until the proposer or the budget ends it; returns all finished trials.

    Args:
        distributions: of every parameter, for Optuna's records and dashboard.
        batch: candidates claimed and evaluated together.
        budget: what all runs of this search may spend together.
        on_finished: called with all finished trials after each batch, and once at the start.
    """
    _return_orphans(study)
    while True:
        finished = finished_trials(study)
        on_finished(finished)
        if budget.is_spent(finished):
            return finished
        room = budget.room(finished)
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting:
            proposed = propose(finished)
            if proposed is None:
                return finished
            if not _enqueue(study, proposed, budget.trials):
                running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
                assert running, "a proposer may repeat itself only while it waits for running trials"
                time.sleep(_POLL_SECONDS)  # all of it is with other workers
                _return_orphans(study)
                continue
        claimed = _claim(study, distributions, batch if room is None else min(batch, room))
        if claimed:
            _evaluate_claimed(study, claimed, evaluate)


def _key(params: Params) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))


def _params_of(trial: FrozenTrial) -> Params:
    """The parameters of a trial in any state (those still waiting are not set in Optuna's `params`)."""
    return trial.user_attrs.get("candidate", trial.params)


def _enqueue(study: optuna.Study, proposed: Sequence[Params], trials: int | None) -> int:
    """Enqueues what no trial has yet, at most up to `trials`; how many."""
    live = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    known = {_key(_params_of(trial)) for trial in study.get_trials(deepcopy=False, states=live)}
    new = list({_key(params): params for params in proposed if _key(params) not in known}.values())
    room = len(new) if trials is None else max(0, trials - len(known))
    for params in new[:room]:
        study.enqueue_trial(dict(params), user_attrs={"candidate": dict(params)})
    return len(new[:room])


def _claim(study: optuna.Study, distributions: Mapping[str, BaseDistribution], batch: int) -> list[Trial]:
    """Takes up to `batch` waiting trials for this worker, leaving out what another worker enqueued at the same moment."""
    claimed = []
    while len(claimed) < batch and study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        trial = study.ask(dict(distributions))
        if "candidate" not in trial.user_attrs:  # another worker took the last one first: this one was made up
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr("worker", _this_worker())
        if _is_repeated(study, trial):
            study.tell(trial, state=TrialState.FAIL)
            continue
        claimed.append(trial)
    return claimed


def _is_repeated(study: optuna.Study, trial: Trial) -> bool:
    """Whether a trial with a lower number has, or will have, the same candidate."""
    live = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
    key = _key(trial.user_attrs["candidate"])
    others = study.get_trials(deepcopy=False, states=live)
    return any(other.number < trial.number and _key(_params_of(other)) == key for other in others)


def _evaluate_claimed(study: optuna.Study, claimed: Sequence[Trial], evaluate: Evaluate) -> None:
    """Evaluates and records; if that fails, the trials fail too and the error goes on to the user."""
    try:
        scored = evaluate([trial.params for trial in claimed])
    except BaseException:
        for trial in claimed:
            study.tell(trial, state=TrialState.FAIL)
        raise
    for trial, result in zip(claimed, scored, strict=True):
        if result.notes:
            trial.set_user_attr("notes", dict(result.notes))
        study.tell(trial, list(result.scores))


def _this_worker() -> dict[str, Any]:
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "started": process.create_time()}


def _return_orphans(study: optuna.Study) -> None:
    """Fails the running trials of dead workers of this machine and enqueues their candidates again."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "candidate" in trial.user_attrs and _is_orphan(trial):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # another worker was faster
                continue
            candidate = trial.user_attrs["candidate"]
            study.enqueue_trial(candidate, user_attrs={"candidate": candidate})
            logger.info("trial %d was interrupted; its candidate is enqueued again", trial.number)


def _is_orphan(trial: FrozenTrial) -> bool:
    worker = trial.user_attrs.get("worker")
    if worker is None:
        started = trial.datetime_start
        return started is not None and time.time() - started.timestamp() > _CLAIM_SECONDS
    if worker["host"] != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1.0
    except psutil.NoSuchProcess:
        return True
