"""A commented experiment file to begin with, which runs as it is (`emorl init`)."""

import argparse
import json
from pathlib import Path

from emorl.config import UserError
from emorl.runs.console import Console
from emorl.runs.run import write_text

_EXPERIMENT = """\
# An experiment of emorl: one policy for each objective, the weights between them, a comparison and a report.
#   emorl run {name}          does all of it; run it again and it goes on where it stopped
#   emorl keys                lists every key, `emorl objectives` what can be an objective
output: {output}

base:
  model: {model}  # a folder, or a hub id such as Qwen/Qwen3-0.6B
data:
  path: {data}  # csv, json, jsonl, parquet or a hub id; column `prompt`
  validation: 16  # prompts for validation while training and for the search
  test: 16  # prompts for the comparison; nothing else sees them

objectives:  # name: a registered function, a classifier's hub id, or package.module:function
  concise: {{function: length, minimum: 3, maximum: 10}}
  varied: distinct_2
  # polite: my_rewards:politeness          # (prompts, completions, **columns) -> list of numbers, higher is better
  # helpful: {{function: classifier, model: org/helpfulness-reward-model}}

generation: {{max_new_tokens: 32, do_sample: false}}  # as the policies will be used

train:
  grpo:  # straight to trl.GRPOConfig
    max_steps: {steps}
    eval_steps: {eval_steps}
    learning_rate: 1.0e-4
    per_device_train_batch_size: 32  # completions a step
    num_generations: 8  # completions of one prompt
"""
_TRYOUT = {"steps": 8, "eval_steps": 4}
_REAL = {"steps": 400, "eval_steps": 20}


def add_options(parser: argparse.ArgumentParser) -> None:
    where = "the experiment file to write (%(default)s)"
    parser.add_argument("file", nargs="?", type=Path, default=Path("experiment.yaml"), metavar="FILE", help=where)
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="your base: a hub id or folder; the quickstart's tiny policy by default",
    )
    parser.add_argument("--data", metavar="PATH", help="your prompts; by default those of the quickstart")


def command(options: argparse.Namespace) -> None:
    if options.file.exists():
        raise UserError(f"{options.file} is there already; give another FILE")
    progress = Console()
    settings = {"model": options.model, "data": options.data}
    if options.model is None or options.data is None:
        from emorl.quickstart.experiment import quickstart_parts

        parts = quickstart_parts(0, progress)
        settings = {"model": options.model or str(parts.base), "data": options.data or str(parts.prompts)}
    quoted = {key: json.dumps(value) for key, value in settings.items()}
    steps = _TRYOUT if options.model is None else _REAL
    text = _EXPERIMENT.format(name=options.file, output=f"runs/{options.file.stem}", **quoted, **steps)
    write_text(options.file, text)
    progress.say(f"init: {options.file}; edit it, then run `emorl run {options.file}`")
