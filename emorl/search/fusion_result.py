"""What a fusion of policies left in its run directory, and whether that is all that was asked for. Kept free of torch, so that
repeating a finished one takes no time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emorl.config.experiment import Experiment
from emorl.config.yaml import as_mapping
from emorl.runs.layout import training_settings
from emorl.runs.run import open_run, read_json

FUSE = "fuse"
"""the stage, and its directory in the experiment's output"""


def finished_fusion(experiment: Experiment) -> Path | None:
    """The run directory of this very fusion, if it is finished; a search with more trials than it was allowed is not.

    Raises:
        UserError: the directory holds another fusion.
    """
    path = experiment.output / FUSE
    if not (path / "run.json").exists():
        return None
    run = open_run(path, FUSE, fusion_identity(experiment))
    if not run.finished or (
        experiment.fuse.proposer is not None and _allowed(read_fusion(experiment)) < experiment.fuse.trials
    ):
        return None
    return path


def _allowed(result: Mapping[str, Any]) -> int:
    """Trials a search was allowed; it may have ended with fewer. Runs of earlier versions say only how many it had."""
    return result.get("budget", result["trials"])


def read_fusion(experiment: Experiment) -> dict[str, Any]:
    """What a finished fusion wrote to `result.json`."""
    return read_json(experiment.output / FUSE / "result.json")


def fusion_identity(experiment: Experiment) -> dict[str, Any]:
    """Settings that the result depends on; a budget may be raised."""
    whole = as_mapping(experiment)
    fuse = {key: value for key, value in whole["fuse"].items() if key != "trials"}
    what = {**training_settings(experiment), "objectives": whole["objectives"], "fuse": fuse}
    if experiment.fuse.proposer is not None:
        what["search"] = {key: whole["search"][key] for key in ("samples", "generation")}
        what["value"] = whole["value"]
    return {**what, "ensemble": whole["ensemble"], **({} if experiment.policies is None else {"policies": whole["policies"]})}
