"""Every stage that loads a base or a policy answers damaged ones in one line, with exit code 2."""

import json
import math
import re
import shutil

import pytest
from safetensors.torch import load_file, save_file

from emorl.cli import main
from emorl.config.experiment import load_experiment
from emorl.runs.layout import Layout
from emorl.stages.stage import identity
from emorl.stages.train import TRAINING


@pytest.fixture
def run(tmp_path, tiny_base_dir, make_causal_model, write_adapter, tokenizer):
    """An experiment's file, its base in `base`, and two policies that are there."""
    base = shutil.copytree(tiny_base_dir, tmp_path / "base")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    (tmp_path / "experiment.yaml").write_text(
        f"output: {tmp_path / 'out'}\nbase: {{model: {base}}}\n"
        f"data: {{path: {tmp_path / 'prompts.jsonl'}, validation: 4, test: 4}}\n"
        "objectives: {brief: length, varied: distinct_2}\n"
        "train: {grpo: {max_steps: 1, per_device_train_batch_size: 4, num_generations: 4}}\n"
        "generation: {max_new_tokens: 4}\n"
    )
    layout = Layout(tmp_path / "out")
    for seed, name in enumerate(("brief", "varied")):
        folder = write_adapter(make_causal_model("llama"), layout.policy(name), seed=seed)
        tokenizer.save_pretrained(folder)
    return tmp_path


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def settings(name, **content):
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | content))


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def nan(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, folder / "adapter_model.safetensors")


BASES = {
    "weights cut": (cut("model.safetensors"), "transformers cannot load it"),
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "transformers cannot load it .*added_tokens"),
    "template with a mistake": (text("chat_template.jinja", "{% for %}"), "TemplateSyntaxError"),
    "config of another family": (settings("config.json", model_type="nope"), "nope"),
}
POLICIES = {
    "config a list": (text("adapter_config.json", "[]"), r"of type \[\]; expected 'LORA'"),
    "no rank": (settings("adapter_config.json", r=None), "expected a number for r, got None"),
    "no alpha": (settings("adapter_config.json", lora_alpha=None), "expected a number for lora_alpha, got None"),
    "a bad pattern": (settings("adapter_config.json", rank_pattern={"q_proj(": 2}), "is no regular expression"),
    "values that are none": (nan, "holds values in 'base_model.* that are no finite numbers"),
    "tensors cut": (cut("adapter_model.safetensors"), "is not a readable safetensors file"),
}
TOKENIZERS = {
    "tokenizer of nothing": (text("tokenizer.json", "{}"), "policy 'brief': the tokenizer in .* transformers cannot load it"),
    "tokenizer settings cut": (text("tokenizer_config.json", "{nope"), "tokenizer_config.json is no valid JSON"),
    "tokenizer with code": (
        settings("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]}, tokenizer_class="Mine"),
        "it comes with code of its own; read that code, then say trust_remote_code: true",
    ),
}


def refused(capsys, *arguments):
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize("damage", BASES)
@pytest.mark.parametrize("stage", ["train", "search"])
def test_a_damaged_base(run, capsys, stage, damage):
    change, message = BASES[damage]
    change(run / "base")
    if stage == "train":
        shutil.rmtree(run / "out")
    line = refused(capsys, stage, run / "experiment.yaml")
    assert re.search(message, line), line
    assert line.startswith(f"emorl {stage}: base.model")


@pytest.mark.parametrize("damage", POLICIES | TOKENIZERS)
@pytest.mark.parametrize("stage", ["search", "fuse"])
def test_a_damaged_policy(run, capsys, stage, damage):
    if stage == "fuse" and damage in TOKENIZERS:
        pytest.skip("a fusion without a search reads no tokenizer")
    change, message = (POLICIES | TOKENIZERS)[damage]
    change(Layout(run / "out").policy("brief"))
    line = refused(capsys, stage, run / "experiment.yaml")
    assert re.search(message, line), line


@pytest.mark.parametrize("lora", ["use_dora=true", "bias=all", "init_lora_weights=pissa", "modules_to_save=[lm_head]", "r=x"])
def test_an_adapter_that_could_not_be_combined_is_refused_before_training(run, capsys, lora):
    shutil.rmtree(run / "out")
    line = refused(capsys, "train", run / "experiment.yaml", f"train.lora.{lora}")
    assert re.match(r"emorl train: train\.lora", line), line
    assert not (run / "out").exists()


def test_where_a_base_lies_and_whose_code_it_runs_make_no_other_run(run):
    def of(*overrides):
        return identity(load_experiment(run / "experiment.yaml", overrides), TRAINING)

    elsewhere = ("base.device_map=auto", "base.offload_folder=/tmp", "base.trust_remote_code=true")
    assert of(*elsewhere) == of()
    for other in ("base.dtype=bfloat16", "base.quantization.bits=4", "base.revision=main", "base.attn_implementation=eager"):
        assert of(other) != of()
