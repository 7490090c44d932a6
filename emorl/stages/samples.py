"""Samples stage: the base answers every training prompt a few times, once for all objectives (`emorl samples experiment.yaml`).

Policies that are trained offline (method dpo) make their pairs of these answers; `emorl train` samples them where they are
missing. The run directory holds `samples.parquet` and the scores that objectives have given. It depends on no objective: one
that is added later needs no sampling.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path

from emorl.config import UserError
from emorl.config.experiment import Experiment
from emorl.config.objects import shown_name
from emorl.runs.console import Console
from emorl.runs.layout import SAMPLES, Layout
from emorl.runs.progress import Progress
from emorl.runs.results import SamplesResult, as_json
from emorl.runs.run import Run, only_process
from emorl.stages.materials import Materials
from emorl.stages.options import add_experiment, load
from emorl.stages.stage import BASE_KEYS, Stage, finished_run, identity, is_main_process, perform


def check(experiment: Experiment) -> None:
    """Refuses settings of decoding that are none, and a base that answers by an encoder."""
    from emorl.policies.base import is_encoder_decoder
    from emorl.policies.generation import check_generation
    from emorl.training.samples import sampling

    check_generation(sampling(experiment.generation, experiment.train.samples))
    if is_encoder_decoder(experiment.base):
        model = shown_name(experiment.base.model)
        raise UserError(f"samples are for method dpo, which trains decoders; base.model {model!r} is an encoder-decoder")


def work(materials: Materials, run: Run, progress: Progress) -> SamplesResult:
    """Samples the parts that are missing."""
    from emorl.evaluation.text_metrics import distinct_share, mean_words
    from emorl.training.samples import sample_answers

    experiment, prompts = materials.experiment, list(materials.splits.train["prompt"])
    config = experiment.train.samples
    progress.say(
        f"samples: {config.per_prompt} answers of the base to each of {len(prompts)} training prompts, for all objectives"
    )
    samples, _ = sample_answers(
        materials.own_base().model,  # which is gone when a trainer loads its own
        materials.tokenizer,
        prompts,
        experiment.generation,
        config,
        seed=experiment.seed,
        folder=run.path,
        run=run,
        progress=progress,
        title="samples",
    )
    texts = samples["completion"].tolist()
    return SamplesResult(len(prompts), config.per_prompt, mean_words(texts), distinct_share(texts))


_DEPENDS_ON = (
    *BASE_KEYS, "data", "generation", "seed", "train.samples.per_prompt", "train.samples.temperature", "train.samples.top_p",
    "train.samples.batch",
)  # fmt: skip
STAGE = Stage("samples", SamplesResult, check, _DEPENDS_ON, work, is_shared=True, leaves=[SAMPLES])


def samples_folder(experiment: Experiment) -> Path:
    """Where the samples that an experiment uses lie: its own, or another's."""
    return Layout(experiment.train.samples.reuse or experiment.output).samples


def performed(experiment: Experiment, progress: Progress, materials: Materials) -> SamplesResult:
    """The stage; a second process that needs the same samples waits for the first one. Another experiment's are only read."""
    if not any(map(experiment.makes_pairs, experiment.policy_names)):
        raise UserError("no policy of this experiment makes pairs of samples; train.method=dpo does")
    folder = samples_folder(experiment)
    if experiment.train.samples.reuse is not None:
        return _reused(experiment, folder)
    with only_process(folder, waits=True) if is_main_process() else nullcontext():
        return perform(STAGE, experiment, progress, materials)


def _reused(experiment: Experiment, folder: Path) -> SamplesResult:
    """What another experiment has sampled.

    Raises:
        UserError: nothing, or with other settings.
    """
    try:
        result = finished_run(folder, STAGE.name, identity(experiment, STAGE.depends_on), SamplesResult)
    except UserError as error:
        raise UserError(f"train.samples.reuse: those samples are other ones; {str(error).partition(';')[0]}") from None
    if result is None:
        raise UserError(f"train.samples.reuse: no finished samples in {folder}; run `emorl samples` there first")
    return result


def add_options(parser: argparse.ArgumentParser) -> None:
    add_experiment(parser, "seed", "generation", "train")


def command(options: argparse.Namespace) -> None:
    experiment = load(options)
    result = performed(experiment, Console(), Materials(experiment))
    if options.json and is_main_process():
        print(json.dumps(as_json(result), indent=2))
    elif is_main_process():
        print(f"{samples_folder(experiment) / SAMPLES}: {result.per_prompt} answers to each of {result.prompts} prompts, of")
        print(f"{result.words:.1f} words on average; {result.distinct_share:.2f} of them are distinct")
