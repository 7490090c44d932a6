"""Where the trained policies of an experiment are, and which of its settings they depend on. Kept free of torch."""

from pathlib import Path
from typing import Any

from emorl.config import UserError
from emorl.config.yaml import as_mapping
from emorl.config.experiment import Experiment, TrainConfig

POLICY_DIRECTORY = "policy"
_POLICY_FILES = ("policy.json", "adapter_config.json")  # ours, or an adapter that something else trained
_LATER_SETTINGS = ("mode", "preferences", "tuning", "scst", "dynaopt")  # runs from before them are the same at their defaults


def policy_directories(experiment: Experiment) -> dict[str, Path]:
    """Name -> directory of each finished policy, in the objectives' order.

    Raises:
        UserError: a policy has not been trained yet.
    """
    directories = {name: experiment.training_of(name) / POLICY_DIRECTORY for name in experiment.policy_names}
    missing = [
        name for name, directory in directories.items() if not any((directory / file).is_file() for file in _POLICY_FILES)
    ]
    if missing:
        where = experiment.policies or experiment.output
        raise UserError(
            f"no trained policy for {', '.join(missing)} in {where}; run `emorl train` first, or give `policies`, the output "
            "of the experiment that trained them"
        )
    return directories


def training_settings(experiment: Experiment) -> dict[str, Any]:
    """What trained policies depend on beside their objectives: search and report settings do not matter."""
    whole, defaults = as_mapping(experiment), as_mapping(TrainConfig())
    train = {key: value for key, value in whole["train"].items() if key not in _LATER_SETTINGS or value != defaults[key]}
    if experiment.train.mode != "dynaopt":
        train.pop("dynaopt", None)
    return {**{key: whole[key] for key in ("base", "data", "generation", "seed")}, "train": train}
