"""The search loop over one Optuna study: propose, enqueue, evaluate, record; continues after a kill, shared by workers.

The study is the only memory. Candidates wait in its own queue; a worker claims some, evaluates them and records the vector
of scores. A proposer is a function of the finished trials, so what was killed is proposed, or claimed, again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState

from emorl.config import UserError
from emorl.search.storage import open_storage
from emorl.search.worker import WORKER, Worker

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
    study = _create(open_storage(storage), objectives, name)
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
    with Worker(study) as worker:
        return _search(study, propose, evaluate, distributions, worker, batch, budget, on_finished)


def _search(
    study: optuna.Study,
    propose: Proposer,
    evaluate: Evaluate,
    distributions: Mapping[str, BaseDistribution],
    worker: Worker,
    batch: int,
    budget: Budget,
    on_finished: Callable[[Sequence[Finished]], None],
) -> list[Finished]:
    worker.return_orphans()
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
                open_trials = study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING))
                is_news = bool(open_trials) or len(finished_trials(study)) > len(finished)
                assert is_news, "a proposer may repeat itself only while it waits for trials"
                if open_trials:  # with other workers
                    time.sleep(_POLL_SECONDS)
                    worker.return_orphans()
                continue
        claimed = _claim(study, distributions, worker, batch if room is None else min(batch, room))
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


def _claim(study: optuna.Study, distributions: Mapping[str, BaseDistribution], worker: Worker, batch: int) -> list[Trial]:
    """Takes up to `batch` waiting trials for this worker, leaving out what another worker enqueued at the same moment."""
    claimed = []
    while len(claimed) < batch and study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        trial = study.ask(dict(distributions))
        if "candidate" not in trial.user_attrs:  # another worker took the last one first: this one was made up
            study.tell(trial, state=TrialState.FAIL)
            continue
        trial.set_user_attr(WORKER, worker.named)
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
        try:
            if result.notes:
                trial.set_user_attr("notes", dict(result.notes))
            study.tell(trial, list(result.scores))
        except (ValueError, UpdateFinishedTrialError):
            continue  # another worker took it over, or the database went away just behind the record
