"""Workers of one study: which are alive, and whose candidates are to be evaluated by another.

A worker says that it lives by a number in the study that it moves on. On its own machine a dead one is known by its process; on
another machine by `STALE_SECONDS` without a sign of life, as measured by whoever waits: clocks need not agree.
"""

import logging
import os
import socket
import threading
import time
import uuid
from types import TracebackType
from typing import Any, Self

import optuna
import psutil
from optuna.trial import FrozenTrial, TrialState

logger = logging.getLogger(__name__)

WORKER = "worker"
"""attribute of a trial: who evaluates it"""
STALE_SECONDS = 120.0
_SIGN_SECONDS = 20.0
_CLAIM_SECONDS = 30.0  # between popping a trial and signing it there are milliseconds
_CANDIDATE = "candidate"


class Worker:
    """This process, which gives signs of life inside a `with` block."""

    def __init__(self, study: optuna.Study) -> None:
        process = psutil.Process()
        self.named = {
            "host": host_name(),
            "pid": process.pid,
            "started": process.create_time(),
            "id": uuid.uuid4().hex[:12],
        }
        """what marks its trials"""
        self._study = study
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._signs: dict[str, tuple[Any, float]] = {}  # worker -> its last sign of life, and when that was new here
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        self._study.set_user_attr(_sign(self.named["id"]), 0)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _live(self) -> None:
        count = 0
        while not self._ended.wait(_SIGN_SECONDS):
            count += 1
            self._study.set_user_attr(_sign(self.named["id"]), count)

    def return_orphans(self) -> None:
        """Fails the running trials of dead workers and enqueues their candidates again."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if _CANDIDATE not in trial.user_attrs or not self._is_orphan(trial):
                continue
            try:
                self._study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # another worker was faster
                continue
            candidate = trial.user_attrs[_CANDIDATE]
            self._study.enqueue_trial(candidate, user_attrs={_CANDIDATE: candidate})
            logger.info("trial %d was interrupted; its candidate is enqueued again", trial.number)

    def _is_orphan(self, trial: FrozenTrial) -> bool:
        worker = trial.user_attrs.get(WORKER)
        if worker is None:
            started = trial.datetime_start
            return started is not None and time.time() - started.timestamp() > _CLAIM_SECONDS
        if worker["host"] != self.named["host"]:
            return self._is_silent(worker)
        try:
            return abs(psutil.Process(worker["pid"]).create_time() - worker["started"]) > 1.0
        except psutil.NoSuchProcess:
            return True

    def _is_silent(self, worker: dict[str, Any]) -> bool:
        key, now = worker.get("id", str(worker)), time.monotonic()
        sign = self._study.user_attrs.get(_sign(key))
        if key not in self._signs or self._signs[key][0] != sign:
            self._signs[key] = (sign, now)
        silent = now - self._signs[key][1]
        if silent > 2 * _SIGN_SECONDS and key not in self._told:
            self._told.add(key)
            logger.warning(
                "a worker on %s has a candidate and gives no sign of life; it is taken over after %.0f s",
                worker["host"],
                STALE_SECONDS,
            )
        return silent > STALE_SECONDS


def host_name() -> str:
    """Of this machine; EMORL_HOST where a container's own says nothing."""
    return os.environ.get("EMORL_HOST") or socket.gethostname()


def _sign(worker: str) -> str:
    return f"alive {worker}"
