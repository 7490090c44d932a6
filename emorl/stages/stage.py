"""The seam of all stages: what one is, and `perform`, which does what every one of them would repeat.

>>> perform("search", load_experiment(Path("experiment.yaml")))
"""

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from emorl.config import UserError, nearest
from emorl.config.experiment import Experiment
from emorl.config.places import check_places
from emorl.config.yaml import as_mapping, to_yaml
from emorl.runs.faults import faults_as_lines
from emorl.runs.layout import MANIFEST, RESULT, STAGES, Layout
from emorl.runs.progress import Progress, Silent
from emorl.runs.results import read_result, write_result
from emorl.runs.run import Run, only_process, open_run, write_text
from emorl.stages.materials import Materials, identity_of

Result = TypeVar("Result")

BASE_KEYS = ("base", "-base.device_map", "-base.offload_folder", "-base.trust_remote_code")
"""keys of an experiment that say which base it has, not where it lies"""


@dataclass(frozen=True)
class Stage(Generic[Result]):
    """One step of an experiment.

    Args:
        name: also the stage's run directory in the experiment's output.
        result: a frozen dataclass, written as `result.json`.
        check: refuses, with a `UserError`, what would fail later; cheap mistakes first.
        depends_on: dotted keys of the experiment whose change makes it another run; one with a `-` before it is left out again.
        work: does what is missing and returns the result; what it writes beside that goes into `run.path`.
        is_enough: whether a finished result is all that the experiment asks for now; one whose budget was raised goes on.
        is_shared: several workers may work on it at once.
        leaves: files and folders that its result is nothing without, in the run directory.
    """

    name: str
    result: type[Result]
    check: Callable[[Experiment], None]
    depends_on: Sequence[str]
    work: Callable[[Materials, Run, Progress], Result]
    is_enough: Callable[[Experiment, Result], bool] = lambda experiment, result: True
    is_shared: bool = False
    leaves: Sequence[str] = ()


def perform(
    stage: Stage[Result] | str,
    experiment: Experiment,
    progress: Progress | None = None,
    materials: Materials | None = None,
) -> Any:
    """Runs a stage of an experiment and returns its result: a finished one is only read, an interrupted one goes on.

    Args:
        stage: or its name: train (one result for each policy), search, evaluate, compare, fuse, dynamic, distill.
        materials: what stages before it have loaded.

    Raises:
        UserError: what the stage refuses, or a run directory that holds another run.
    """
    progress, materials = progress or Silent(), materials or Materials(experiment)
    if isinstance(stage, str):
        return _module(stage).performed(experiment, progress, materials)
    config, folder = identity(experiment, stage.depends_on), Layout(experiment.output).stage(stage.name)
    result = finished_run(folder, stage.name, config, stage.result)
    gone = [name for name in stage.leaves if not (folder / name).exists()]
    if result is not None and not gone and stage.is_enough(experiment, result):
        progress.say(f"{stage.name}: finished before, in {folder}")
        return result
    if result is not None and gone:
        progress.warn(f"{stage.name}: finished before, but {folder / gone[0]} is gone; it is made again")
    check_places(experiment)
    stage.check(experiment)

    def work(run: Run) -> Result:
        if run.is_main:
            keep_experiment(experiment)
        for line in materials.not_resumed():
            progress.warn(line)
        return stage.work(materials, run, progress)

    lock = only_process(folder) if is_main_process() and not stage.is_shared else nullcontext()
    with faults_as_lines(folder), lock:
        by_another = finished_run(folder, stage.name, config, stage.result) if result is None else None
        if by_another is not None and stage.is_enough(experiment, by_another):  # while this one was looking
            return by_another
        return work_on(open_run(folder, stage.name, config, is_main_process()), work)


def finished_run(folder: Path, name: str, config: Mapping[str, Any], kind: type[Result]) -> Result | None:
    """The result of a finished run directory, None where there is none. Waits for no library.

    Args:
        config: what makes the run this one and no other.

    Raises:
        UserError: the directory holds another run.
    """
    if not (folder / MANIFEST).exists() or not (folder / RESULT).exists():
        return None
    return read_result(kind, folder) if open_run(folder, name, config, is_main=False).finished else None


def work_on(run: Run, work: Callable[[Run], Result]) -> Result:
    """Works on an open run, writes its result and finishes it."""
    result = work(run)
    if run.is_main:
        write_result(run.path, result)
        run.finish()
    return result


def work_once(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    kind: type[Result],
    work: Callable[[Run], Result],
    progress: Progress,
) -> Result:
    """The result of a run directory that is no experiment's: read where it is finished, else worked for.

    Args:
        config: what makes the run this one and no other.
        kind: of the result.
    """
    with faults_as_lines(folder), only_process(folder):
        result = finished_run(folder, name, config, kind)
        if result is not None:
            progress.say(f"{name}: finished before, in {folder}")
            return result
        return work_on(open_run(folder, name, config), work)


def is_main_process() -> bool:
    """Whether this process writes; of those that `torchrun` or `accelerate launch` started, the first one does."""
    return int(os.environ.get("RANK", "0")) == 0


def _module(name: str) -> Any:
    if name not in STAGES:
        raise UserError(f"no stage is called {name!r}; {nearest(name, STAGES)}")
    return importlib.import_module(f"emorl.stages.{name}")


def keep_experiment(experiment: Experiment) -> None:
    """Writes the resolved experiment beside its results, once a stage has accepted it: a refused one changes nothing."""
    write_text(Layout(experiment.output).experiment, to_yaml(experiment, identity_of))


def identity(experiment: Experiment, depends_on: Sequence[str]) -> dict[str, Any]:
    """The part of an experiment that makes a run this run and no other, by dotted keys as in `Stage.depends_on`."""
    whole = as_mapping(experiment, identity_of)
    if "dpo" not in map(experiment.method_of, experiment.policy_names):  # nothing reads these blocks
        whole["train"] = {key: value for key, value in whole["train"].items() if key not in ("dpo", "samples")}
    picked: dict[str, Any] = {}
    for key in depends_on:
        *blocks, last = key.removeprefix("-").split(".")
        source, target = whole, picked
        for block in blocks:
            source, target = source[block], target.setdefault(block, {})
        if key.startswith("-"):
            target.pop(last, None)
        else:
            target[last] = deepcopy(source[last])
    return picked
