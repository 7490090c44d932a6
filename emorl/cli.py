"""The command line: a table of commands, each importing only what it runs."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emorl.config import UserError

_EXPERIMENT_HELP = """\
EXPERIMENT is a YAML file; any key can be set on the command line as dotted.key=value, for example
  emorl {command} experiment.yaml train.grpo.max_steps=50 search.levels=3
Its keys (with defaults):
"""

_REWARD_HELP = """\
FILE is YAML, for example
  output: runs/politeness
  model: sentence-transformers/all-MiniLM-L6-v2
  data: {path: graded.jsonl, labels: [grade], label_range: [0, 2]}    # columns prompt, response, grade
  loss: ranking
The model is then an objective, {function: classifier, model: runs/politeness/model}.
"""
_FUSE_HELP = """\
An experiment's trained policies become one policy in OUTPUT/fuse/policy, by its block `fuse` (emorl train --help):
  emorl fuse experiment.yaml fuse.method=ties
  emorl fuse experiment.yaml --proposer q_learning              # RL-Fusion: settings searched on the validation prompts
Whole checkpoints are fused by a FILE of their own, for example
  output: runs/fused
  base: models/base
  models: {maths: models/maths, code: models/code}
  weights: {maths: 0.6, code: 0.4}
  method: ties
  settings: {density: 0.2}
A file of mergekit (linear, slerp, ties, task_arithmetic, dare_linear, dare_ties) is taken as it is, with --output FOLDER.
Any key can be set on the command line as dotted.key=value. Keys (with defaults):
"""
_REFRESH_HELP = """\
FILE is YAML, for example
  reward: {output: runs/politeness, model: …, data: …, loss: ranking}    # as for train-reward
  policy:                                                                # as for train, with one objective
    output: runs/politeness-refresh
    base: {model: Qwen/Qwen3-0.6B}
    data: {path: prompts.jsonl}
    objectives: {polite: classifier}
    train: {grpo: {beta: 0.01, max_steps: 100}}                          # a weak anchor finds more to refuse
  retraining: {num_train_epochs: 1}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. A user's mistake is one line on standard error and exit code 2, never a traceback; a check that fails
    exits with 1."""
    _quiet_libraries()
    sys.path.append(os.getcwd())  # objectives named package.module:attribute may lie beside the experiment
    parser = _parser()
    options = _parse(parser, arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        return options.run(options) or 0
    except UserError as error:
        print(f"emorl {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nemorl {options.command}: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides may also stand behind an option, which argparse alone does not take."""
    options, rest = parser.parse_known_args(arguments)
    strange = [word for word in rest if word.startswith("-") or "=" not in word]
    if strange or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _quiet_libraries() -> None:
    """Their progress bars and advice would tear ours apart; what a user must know, our own lines say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)  # TRL's use of names that transformers has renamed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emorl", description="Fine-tune a language model towards several objectives and steer between them."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary, run, add_options in _COMMANDS:
        command = commands.add_parser(
            name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        command.set_defaults(run=run)
        add_options(command, name)
    return parser


def _add_experiment(command: argparse.ArgumentParser, name: str) -> None:
    from emorl.config.experiment import Experiment
    from emorl.config.yaml import describe

    command.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="experiment.yaml")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace those of the file"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    if name == "search":
        command.add_argument("--storage", metavar="URL", help="an Optuna storage, the same as search.storage=URL")
    if name == "train":
        command.add_argument("--objective", action="append", metavar="NAME", help="train only this one's policy (repeatable)")
    if "--help" in sys.argv or "-h" in sys.argv:
        command.epilog = _EXPERIMENT_HELP.format(command=name) + describe(Experiment)


def _add_reward(command: argparse.ArgumentParser, name: str) -> None:
    from emorl.config.reward import RefreshExperiment, RewardExperiment
    from emorl.config.yaml import describe

    kind, example, what = {
        "train-reward": (RewardExperiment, _REWARD_HELP, "one reward model"),
        "refresh-reward": (RefreshExperiment, _REFRESH_HELP, "a reward model and the policy that tests it"),
    }[name]
    command.add_argument("experiment", type=Path, metavar="FILE", help=f"YAML file of {what}")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace those of the file"
    )
    command.add_argument("--json", action="store_true", help="print the measured figures as JSON instead of a table")
    if "--help" in sys.argv or "-h" in sys.argv:
        command.epilog = (
            f"{example}Any key can be set on the command line as dotted.key=value. Keys (with defaults):\n{describe(kind)}"
        )


def _add_fuse(command: argparse.ArgumentParser, name: str) -> None:
    from emorl.config.fuse import CheckpointsFile
    from emorl.config.yaml import describe

    command.add_argument(
        "file", type=Path, metavar="FILE", help="experiment.yaml, or a YAML of checkpoints to fuse, ours or mergekit's"
    )
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that replace those of the file"
    )
    command.add_argument("--output", metavar="FOLDER", help="of the fused model, the same as output=FOLDER")
    command.add_argument("--proposer", metavar="NAME", help="search the fusion of policies, the same as fuse.proposer=NAME")
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    if "--help" in sys.argv or "-h" in sys.argv:
        command.epilog = _FUSE_HELP + describe(CheckpointsFile)


def _add_run(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("directory", type=Path, metavar="RUN", help="output directory of an experiment")
    command.add_argument("--json", action="store_true", help="print the result as JSON")


def _add_generate(command: argparse.ArgumentParser, name: str) -> None:
    where = "output directory of an experiment, or a policy: an adapter (OUTPUT/fuse/policy) or a whole model (of `emorl fuse`)"
    command.add_argument("directory", type=Path, metavar="RUN", help=where)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add_argument(
        "--prefer", default="", metavar="NAME=NUMBER,…", help="what matters to you, e.g. reflection=0.7,empathy=0.3"
    )
    command.add_argument("--prompt", action="append", help="answer this (repeatable); standard input, a line each, otherwise")


def _add_objectives(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    summary = "Score edge cases with every objective of an experiment; exit code 1 if any of its checks fails."
    actions = command.add_subparsers(metavar="check")
    check = actions.add_parser("check", help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_experiment(check, f"{name} check")
    check.set_defaults(run=_check_objectives, command=f"{name} check")


def _add_quickstart(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="where it goes (%(default)s)")
    command.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    command.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")


def _load(options: argparse.Namespace) -> Any:
    """The experiment of the file and overrides."""
    from emorl.config.experiment import load_experiment

    storage = [f"search.storage={options.storage}"] if getattr(options, "storage", None) else []
    return load_experiment(options.experiment, [*options.overrides, *storage])


def _keep_config(experiment: Any) -> None:
    """Writes the resolved experiment beside its results, after a stage has accepted it: a refused one changes nothing."""
    from emorl.config.yaml import to_yaml
    from emorl.runs.run import write_text

    write_text(experiment.output / "experiment.yaml", to_yaml(experiment))


def _train(options: argparse.Namespace) -> None:
    experiment = _load(options)
    _train_policies(experiment, options.objective)
    if options.json:
        from emorl.runs.run import read_json

        names = options.objective or experiment.policy_names
        results = {name: read_json(experiment.training_of(name) / "result.json") for name in names}
        print(json.dumps({name: {k: v for k, v in r.items() if k != "log"} for name, r in results.items()}, indent=2))


def _train_policies(experiment: Any, names: Sequence[str] | None) -> None:
    from emorl.objectives.loading import check_objectives
    from emorl.runs.console import Console
    from emorl.training.policy import train

    check_objectives(experiment.objectives)
    for name in names or experiment.policy_names:
        train(experiment, name, Console())
    if not (experiment.output / "experiment.yaml").exists():
        _keep_config(experiment)


def _train_reward(options: argparse.Namespace) -> None:
    from emorl.config.reward import load_reward_experiment
    from emorl.runs.console import Console
    from emorl.training.reward.card import figures_table
    from emorl.training.reward.model import read_figures, train_reward

    experiment = load_reward_experiment(options.experiment, options.overrides)
    figures = read_figures(train_reward(experiment, Console()))
    print(json.dumps(figures, indent=2) if options.json else figures_table(figures))


def _refresh_reward(options: argparse.Namespace) -> None:
    from emorl.config.reward import load_refresh_experiment
    from emorl.reporting.reward_tables import refresh_table
    from emorl.runs.console import Console
    from emorl.training.reward.refresh import read_rounds, refresh

    rounds = read_rounds(refresh(load_refresh_experiment(options.experiment, options.overrides), Console()))
    print(json.dumps(rounds, indent=2) if options.json else refresh_table(rounds))


def _search(options: argparse.Namespace) -> None:
    experiment = _load(options)
    _search_weights(experiment)
    from emorl.search.weight_search import read_result

    result = read_result(experiment)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    from emorl.reporting.tables import print_front

    print_front(result)


def _search_weights(experiment: Any) -> None:
    from emorl.runs.console import Console
    from emorl.search.weight_search import search, silence_optuna

    silence_optuna()
    search(experiment, Console())
    _keep_config(experiment)


def _evaluate(options: argparse.Namespace) -> None:
    experiment = _load(options)
    searched = (experiment.output / "search" / "result.json").exists()
    if not searched and (experiment.output / "dynamic" / "comparison" / "result.json").exists():
        _print_dynamic(experiment.output, options.json)  # whose comparison is on the test prompts already
        return
    _compare(experiment)
    _print_comparison(experiment.output, options.json)


def _compare(experiment: Any) -> None:
    from emorl.reporting.comparison import compare
    from emorl.runs.console import Console

    compare(experiment, Console())
    _keep_config(experiment)


def _print_comparison(output: Path, as_json: bool) -> None:
    from emorl.reporting.tables import comparison_json, print_comparison

    if as_json:
        print(json.dumps(comparison_json(output), indent=2))
    else:
        print_comparison(output)


def _compare_methods(options: argparse.Namespace) -> None:
    from emorl.reporting.method_comparison import compare_methods, read_comparison
    from emorl.reporting.method_tables import method_tables
    from emorl.runs.console import Console
    from emorl.search.weight_search import silence_optuna

    experiment = _load(options)
    silence_optuna()
    compare_methods(experiment, Console())
    _keep_config(experiment)
    result = read_comparison(experiment)
    print(json.dumps(result, indent=2) if options.json else method_tables(result))


def _run(options: argparse.Namespace) -> None:
    experiment = _load(options)
    _run_all(experiment, options.json)


def _run_all(experiment: Any, as_json: bool) -> None:
    from emorl.evaluation.perplexity import check_language_model
    from emorl.reporting.report import write_report
    from emorl.runs.console import Console
    from emorl.search.weight_search import check_mode, check_proposer

    check_mode(experiment)
    check_proposer(experiment.search)
    check_language_model(experiment.evaluate.perplexity_model)
    _train_policies(experiment, None)
    _search_weights(experiment)
    _compare(experiment)
    report = write_report(experiment.output)
    _print_comparison(experiment.output, as_json)
    Console().say(f"report: {report}")


def _report(options: argparse.Namespace) -> None:
    from emorl.reporting.report import write_report
    from emorl.runs.console import Console

    report = write_report(options.directory)
    if options.json:
        print(json.dumps({"report": str(report)}))
    else:
        Console().say(f"report: {report}")


def _fuse(options: argparse.Namespace) -> None:
    from emorl.config.fuse import is_experiment, load_checkpoints_file
    from emorl.config.yaml import read_yaml
    from emorl.runs.console import Console

    output = [] if options.output is None else [f"output={options.output}"]
    overrides = [*options.overrides, *output]
    if sum(override.startswith("output=") for override in overrides) > 1:
        raise UserError("the output is given twice; give --output FOLDER or output=FOLDER")
    if is_experiment(read_yaml(options.file)):
        _fuse_policies(options, overrides)
        return
    from emorl.fusion.recipe import fuse

    if options.proposer is not None:
        raise UserError(f"--proposer searches the fusion of an experiment's policies; {options.file} is a file of checkpoints")
    folder = fuse(load_checkpoints_file(options.file, overrides), Console())
    if options.json:
        print(json.dumps({"model": str(folder)}))
    else:
        Console().say(f"fuse: {folder}")


def _fuse_policies(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from emorl.config.experiment import load_experiment
    from emorl.reporting.fusion_lines import fusion_lines
    from emorl.runs.console import Console
    from emorl.search.fusion_result import finished_fusion, read_fusion

    proposer = [] if options.proposer is None else [f"fuse.proposer={options.proposer}"]
    experiment = load_experiment(options.file, [*overrides, *proposer])
    run = finished_fusion(experiment)
    if run is None:
        run = _searched_fusion(experiment)
    else:
        Console().say(f"fuse: finished before, in {run}")
    result = read_fusion(experiment)
    if options.json:
        print(json.dumps({**result, "policy": str(run / "policy")}, indent=2))
    else:
        print("\n".join(fusion_lines(result)))


def _searched_fusion(experiment: Any) -> Path:
    from emorl.runs.console import Console
    from emorl.search.fusion_search import fuse_policies
    from emorl.search.weight_search import silence_optuna

    silence_optuna()
    run = fuse_policies(experiment, Console())
    _keep_config(experiment)
    return run


def _dynamic(options: argparse.Namespace) -> None:
    experiment = _load(options)  # a wrong file fails before torch is imported
    from emorl.dynamic.comparison import run_dynamic
    from emorl.dynamic.processes import this_process
    from emorl.runs.console import Console

    run_dynamic(experiment, Console())
    if this_process().is_main_process:
        _keep_config(experiment)
        _print_dynamic(experiment.output, options.json)


def _print_dynamic(output: Path, as_json: bool) -> None:
    from emorl.dynamic.comparison import read_dynamic
    from emorl.reporting.dynamic_table import dynamic_table

    result = read_dynamic(output)
    print(json.dumps(result, indent=2) if as_json else dynamic_table(result))


def _generate(options: argparse.Namespace) -> None:
    from emorl.objectives.preference import parse_preferences
    from emorl.reporting.generation import generate_lines

    preferences = parse_preferences(options.prefer) if options.prefer else {}
    prompts = options.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    for line in generate_lines(options.directory, preferences, prompts, as_json=options.json):
        print(line, flush=True)


def _objectives(options: argparse.Namespace) -> None:
    from emorl.objectives.catalogue import catalogue
    from emorl.reporting.objective_tables import catalogue_json, print_catalogue

    if options.json:
        print(json.dumps(catalogue_json(catalogue()), indent=2))
    else:
        print_catalogue(catalogue())


def _check_objectives(options: argparse.Namespace) -> int:
    from emorl.data import load_prompts
    from emorl.objectives.check import check_objective
    from emorl.objectives.loading import check_objectives, load_objective
    from emorl.policies.base import load_tokenizer
    from emorl.policies.prompts import is_chat
    from emorl.reporting.objective_tables import checks_json, print_checks

    experiment = _load(options)
    check_objectives(experiment.objectives)
    prompts = load_prompts(experiment.data, experiment.seed, is_chat(load_tokenizer(experiment.base.model)))
    results = [
        check_objective(load_objective(name, config), prompts.train[0]) for name, config in experiment.objectives.items()
    ]
    if options.json:
        print(json.dumps(checks_json(results), indent=2, ensure_ascii=False))
    else:
        print_checks(results)
    return 0 if all(result.passed for result in results) else 1


def _quickstart(options: argparse.Namespace) -> None:
    from emorl.quickstart.experiment import quickstart_experiment
    from emorl.runs.console import Console

    experiment = quickstart_experiment(options.output, options.seed, Console())
    _run_all(experiment, options.json)


_Command = tuple[str, str, Callable[[argparse.Namespace], int | None], Callable[[argparse.ArgumentParser, str], None]]
_COMMANDS: tuple[_Command, ...] = (
    ("quickstart", "The whole job on an embedded example: train, search, compare, report.", _quickstart, _add_quickstart),
    ("run", "All stages of an experiment; finished ones are skipped, an interrupted one continues.", _run, _add_experiment),
    ("train", "Train one LoRA policy per objective with GRPO or SCST, or one for all (train.mode).", _train, _add_experiment),
    ("train-reward", "Train a reward model on graded responses, to be used as an objective.", _train_reward, _add_reward),
    (
        "refresh-reward",
        "Train a policy against a reward model, and teach it to refuse what it fell for.",
        _refresh_reward,
        _add_reward,
    ),
    ("search", "Search the aggregation weights of the trained policies.", _search, _add_experiment),
    ("evaluate", "Compare what was found with its rivals on test prompts.", _evaluate, _add_experiment),
    (
        "compare",
        "Train the ensemble and its rivals at the same budget, once per seed, and compare them on test prompts.",
        _compare_methods,
        _add_experiment,
    ),
    ("fuse", "Fuse trained policies into one, or whole checkpoints tensor by tensor on disk.", _fuse, _add_fuse),
    (
        "dynamic",
        "Train controllers that set the ensemble's weights anew for every span of text, and compare them with fixed weights.",
        _dynamic,
        _add_experiment,
    ),
    ("report", "Write one self-contained HTML report of a run directory.", _report, _add_run),
    (
        "objectives",
        "List the registered objectives; `check` runs those of an experiment on edge cases.",
        _objectives,
        _add_objectives,
    ),
    (
        "generate",
        "Answer prompts with the point of the front that suits your preference, or with one policy.",
        _generate,
        _add_generate,
    ),
)
