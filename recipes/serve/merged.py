"""Does a merged export say what its policies' soup says? Greedy tokens in plain transformers, position by position.

emorl export RUN --format merged --what soup --weights harmless=0.7,concise=0.3 --dtype bfloat16 --output merged
python -m recipes.serve.merged RUN merged --weights harmless=0.7,concise=0.3
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from emorl.aggregation.ensemble import ParameterAverage
from emorl.config import UserError
from emorl.config.experiment import load_kept_experiment
from emorl.objectives.preference import parse_numbers
from emorl.policies.base import load_base, read_policies
from emorl.policies.prompts import token_ids
from emorl.runs.layout import Layout
from recipes.serve.llama_cpp import Agreement, greedy, prompts_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="output of an experiment whose policies are trained")
    parser.add_argument("merged", type=Path, help="the export; policies compute in the type that it is written in")
    parser.add_argument("--weights", required=True, metavar="NAME=NUMBER,…", help="that it was exported with")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=16)
    options = parser.parse_args(arguments)
    try:
        found = _compared(options)
    except UserError as error:
        print(f"merged: {error}", file=sys.stderr)
        return 2
    print(f"same tokens: {found.same} of {found.tokens}; same texts: {found.same_texts} of {found.texts}")
    return 0


@torch.no_grad()
def _compared(options: argparse.Namespace) -> Agreement:
    experiment, weights = load_kept_experiment(options.run), parse_numbers("--weights", options.weights)
    merged: Any = AutoModelForCausalLM.from_pretrained(options.merged)
    base = load_base(replace(experiment.base, dtype=str(merged.dtype).removeprefix("torch.")))
    folders = Layout(experiment.output, experiment.policies).trained(experiment.policy_names)
    policies = read_policies(folders, base, experiment.ensemble.adapter_scale)
    prompts = [token_ids(base.tokenizer, prompt) for prompt in prompts_of(experiment, options.prompts)]
    mixture = ParameterAverage(base.model, policies, include_base=True)
    scales = [weights.get(name, 0.0) for name in policies]
    ours = greedy(mixture, base.tokenizer, prompts, scales, options.tokens)
    rows = base.tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    written = merged.generate(**rows, max_new_tokens=options.tokens, do_sample=False)[:, rows["input_ids"].shape[1] :]
    theirs = [text[: len(own)] for text, own in zip(written.tolist(), ours, strict=True)]
    return Agreement.of(ours, theirs, ours)


if __name__ == "__main__":
    sys.exit(main())
