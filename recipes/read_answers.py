"""Twenty greedy answers of the base and of each trained policy to test prompts, with the openings that they share.

python -m recipes.read_answers recipes/counselling/offline.yaml --run runs/counselling_offline/seed-0/ensemble_dpo
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from emorl.config.experiment import load_experiment
from emorl.evaluation.scoring import generate
from emorl.evaluation.text_metrics import distinct_2, distinct_share, mean_words
from emorl.runs.layout import Layout
from emorl.stages.materials import Materials

_OPENING = 3  # words


def told(name: str, texts: Sequence[str], shown: int) -> str:
    """The figures of one policy's answers, and the first ones."""
    openings = Counter(" ".join(text.split()[:_OPENING]) for text in texts).most_common(3)
    figures = f"words {mean_words(texts):.1f}, distinct {distinct_share(texts):.2f}, distinct-2 {distinct_2(texts):.2f}"
    return "\n".join(
        [f"== {name}: {figures}, openings {openings}", *(f"   {' '.join(text.split())}" for text in texts[:shown])]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, metavar="EXPERIMENT", help="whose prompts, base and settings of decoding")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--run", type=Path, metavar="DIR", help="output with the policies (the experiment's)")
    parser.add_argument("--shown", type=int, default=20, help="answers of each (%(default)s)")
    options = parser.parse_args(arguments)
    experiment = load_experiment(options.experiment, options.overrides)
    materials, layout = Materials(experiment), Layout(options.run or experiment.output)
    prompts = list(materials.splits.test["prompt"])
    for name, folder in {"base": None, **layout.trained(experiment.policy_names)}.items():
        model = materials.own_base().model
        policy = model if folder is None else PeftModel.from_pretrained(model, str(folder)).eval()
        answers = generate(policy, materials.tokenizer, prompts, experiment.generation)
        print(told(name, answers["completion"].tolist(), options.shown))


if __name__ == "__main__":
    main()
