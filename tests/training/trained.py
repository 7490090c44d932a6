"""Training as the stage does it, of one policy."""

from emorl.runs.layout import Layout
from emorl.runs.progress import Silent
from emorl.stages.materials import Materials
from emorl.stages.train import performed
from emorl.training.modes import plan_of
from emorl.training.trainers import training_method


def train(experiment, name, progress=None):
    """The run directory of a policy, trained where it was not."""
    performed(experiment, progress or Silent(), Materials(experiment), [name])
    return Layout(experiment.output, experiment.policies).training(name)


def policy_folders(experiment):
    return Layout(experiment.output, experiment.policies).trained(experiment.policy_names)


def plan(experiment, name):
    method = training_method(experiment.method_of(name), experiment.train, experiment.base)
    return plan_of(experiment.train, list(experiment.objectives), name, method)
