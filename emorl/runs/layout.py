"""Every file name of a run directory, once: what lies where in an experiment's output. Kept free of torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from emorl.config import UserError

STAGES = ("train", "search", "evaluate", "compare", "fuse", "dynamic", "distill")
"""stages of an experiment, in the order in which they use each other"""

EXPERIMENT = "experiment.yaml"
MANIFEST = "run.json"
RESULT = "result.json"
COST = "cost.json"
TRIALS = "trials.csv"
JOURNAL = "journal.log"
SCORES = "scores.sqlite"
POLICY = "policy"
POLICY_CARD = "policy.json"
ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKPOINTS = "checkpoints"
SAMPLES, PARTS, PAIRS = "samples.parquet", "parts", "pairs.parquet"
ROUNDS, KEPT = "rounds", "kept"
MODEL = "model"
ENSEMBLE, ENSEMBLE_CARD, FRONT = "ensemble", "ensemble.json", "front.json"
DYNAMIC_CARD, ANSWERS = "dynamic.json", "answers.parquet"
COMPLETIONS = "completions.parquet"
SUMMARY = "summary.csv"
ATTACKS = "hacking.json"
SEEDS, POINTS, DECODE = "seeds.csv", "points.csv", "decode.json"


@dataclass(frozen=True)
class Layout:
    """Where the results of one experiment lie: each stage's in a folder that is named after it.

    Args:
        output: the experiment's.
        policies: another experiment's output, whose trained policies are used, or the adapter's folder of each.
    """

    output: Path
    policies: Path | Mapping[str, Path] | None = None

    @property
    def experiment(self) -> Path:
        """The resolved experiment file."""
        return self.output / EXPERIMENT

    @property
    def report(self) -> Path:
        return self.output / "report" / "report.html"

    def stage(self, name: str) -> Path:
        """A stage's run directory."""
        return self.output / name

    def has_result(self, stage: str) -> bool:
        """Whether a stage has come to a result here, be it that a larger budget would go on."""
        return (self.stage(stage) / RESULT).is_file()

    def seed(self, seed: int | str) -> Path:
        """Where `emorl compare` trains and searches with one seed; with * the pattern of all."""
        return self.output / f"seed-{seed}"

    def training(self, policy: str) -> Path:
        """A policy's run directory; of an adapter that was named, the folder it lies in."""
        if isinstance(self.policies, Mapping):
            return self.policies[policy].parent
        return (self.policies or self.output) / "train" / policy

    def policy(self, policy: str) -> Path:
        """A policy's adapter, or its whole model where all of it was tuned."""
        return self.policies[policy] if isinstance(self.policies, Mapping) else self.training(policy) / POLICY

    def is_ours(self, policy: str) -> bool:
        """Whether emorl has trained a policy, and so said how it went; any other adapter may be used too."""
        return not isinstance(self.policies, Mapping) and (self.training(policy) / RESULT).is_file()

    def trained(self, policies: Sequence[str]) -> dict[str, Path]:
        """Name -> folder of each policy, in order.

        Raises:
            UserError: a policy has not been trained yet.
        """
        folders = {name: self.policy(name) for name in policies}
        kinds = (POLICY_CARD, ADAPTER)
        is_there = {name: any((folder / file).is_file() for file in kinds) for name, folder in folders.items()}
        if missing := [name for name in policies if not is_there[name]]:
            if isinstance(self.policies, Mapping):
                raise UserError(f"policies.{missing[0]}: no adapter in {folders[missing[0]]} (no {ADAPTER} there)")
            raise UserError(
                f"no trained policy for {', '.join(missing)} in {self.policies or self.output}; run `emorl train` "
                "first, or give `policies`: the output of the experiment that trained them, or {name: folder of its adapter}"
            )
        return folders

    @property
    def samples(self) -> Path:
        """The base's answers to the training prompts, of which pairs are made."""
        return self.stage("samples")

    @property
    def search(self) -> Path:
        return self.stage("search")

    @property
    def evaluation(self) -> Path:
        return self.stage("evaluate")

    @property
    def fusion(self) -> Path:
        return self.stage("fuse")

    @property
    def distillation(self) -> Path:
        return self.stage("distill")

    @property
    def comparison(self) -> Path:
        return self.stage("compare")

    @property
    def dynamic(self) -> Path:
        return self.stage("dynamic")
