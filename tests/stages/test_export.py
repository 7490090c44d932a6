"""`emorl export`: what a run found, in folders that other programs load; mistakes before any library."""

import json
import os
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from emorl.aggregation.ensemble import ParameterAverage
from emorl.cli import main
from emorl.config.experiment import BaseConfig, DataConfig, EnsembleConfig, Experiment, ObjectiveConfig
from emorl.fusion.adapters import fuse_adapters
from emorl.fusion.gguf_lora import SERVER_CARD
from emorl.fusion.operators import Fusion
from emorl.policies.adapters import base_fingerprint, read_adapter
from emorl.policies.preference_line import PreferenceLine
from emorl.policies.prompts import prepare_tokenizer
from emorl.runs.layout import DYNAMIC_CARD, ENSEMBLE, POLICY, POLICY_CARD, Layout
from emorl.runs.results import Point, SearchResult, write_result
from emorl.runs.run import write_json
from emorl.stages.materials import Materials
from emorl.stages.stage import keep_experiment
from tests.policies.test_gguf import write_base

FRONT = [
    Point({"brief": 0.0, "varied": 1.0}, {"brief": 0.2, "varied": 0.9}, 0.55),
    Point({"brief": 0.6, "varied": 0.4}, {"brief": 0.7, "varied": 0.5}, 0.6),
]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def make_run(output, base_dir, base, write_adapter, **experiment):
    """A run whose search has found the front, with a fused adapter of unequal ranks and a distilled one."""
    made = Experiment(
        output=output,
        base=BaseConfig(model=str(base_dir)),
        data=DataConfig(path=str(output / "prompts.jsonl"), validation=2, test=2, system_prompt="Be kind."),
        objectives={"brief": ObjectiveConfig(function="length"), "varied": ObjectiveConfig(function="distinct_2")},
        generation=GREEDY,
    )
    made = replace(made, **experiment)
    layout = Layout(output)
    card = {"base_fingerprint": base_fingerprint(base)}
    for seed, name in enumerate([*made.objectives, "distilled"]):
        folder = layout.policy(name) if name in made.objectives else layout.distillation / POLICY
        write_adapter(base, folder, seed=seed, rank=3 + seed)
        write_json(folder / POLICY_CARD, card)
    adapters = [read_adapter(layout.policy(name)) for name in made.objectives]
    fuse_adapters(adapters, Fusion("linear", (0.5, 0.5)), layout.fusion / POLICY, energy=0.8)
    keep_experiment(made)
    layout.search.mkdir(exist_ok=True)
    Materials(made).mixture().save_pretrained(layout.search / ENSEMBLE)
    write_result(layout.search, SearchResult("hierarchical_grid", "mean", {}, 2, None, best=FRONT[1], front=FRONT))
    for place in (layout.distillation, layout.fusion):
        write_json(place / "result.json", {})
    return layout


@pytest.fixture(scope="module")
def base(make_causal_model):
    return make_causal_model("llama")


@pytest.fixture(scope="module")
def layout(tmp_path_factory, tiny_base_dir, base, write_adapter):
    return make_run(tmp_path_factory.mktemp("export") / "run", tiny_base_dir, base, write_adapter)


@pytest.fixture
def export(capsys, tmp_path):
    def write(run, *options):
        """What was exported to a folder of its own, and what was said."""
        capsys.readouterr()
        words = ["export", str(run), "--output", str(tmp_path / "out"), "--json", *options]
        assert main(words) == 0, capsys.readouterr().err
        said = capsys.readouterr()
        return json.loads(said.out), said.err

    return write


@pytest.fixture
def inputs(tokenizer):
    return tokenizer(["say yes", "no"], return_tensors="pt", padding=True)


def soup(base, layout, weights):
    policies = {name: read_adapter(layout.policy(name)) for name in ("brief", "varied")}
    return ParameterAverage(deepcopy(base), policies, weights=weights)


def adapted(base, folder):
    return PeftModel.from_pretrained(deepcopy(base), str(folder)).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ([], [0.6, 0.4]),
        (["--prefer", "varied=1"], [0.0, 1.0]),
        (["--weights", "brief=1.5,varied=0.25"], [1.5, 0.25]),
    ],
)
def test_an_adapter_is_the_soup_of_the_point_that_is_asked_for(layout, base, export, inputs, tmp_path, options, weights):
    facts, said = export(layout.output, "--format", "adapter", "--what", "soup", *options)
    found = adapted(base, tmp_path / "out")(**inputs).logits
    torch.testing.assert_close(found, soup(base, layout, weights)(**inputs).logits, atol=2e-4, rtol=1e-4)
    assert facts["weights"] == dict(zip(("brief", "varied"), weights, strict=True))
    assert "a soup answers otherwise than the hidden-state ensemble" in said


def test_a_search_over_soups_is_exported_without_a_warning(tiny_base_dir, base, write_adapter, export, tmp_path):
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter, ensemble=EnsembleConfig(aggregate="parameters"))
    facts, said = export(layout.output, "--format", "adapter", "--what", "soup")
    assert facts["weights"] == FRONT[1].weights
    assert "warning" not in said
    assert "hidden-state" not in (tmp_path / "out" / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["distilled", "fused"])
def test_one_policy_is_exported_exactly_in_one_rank(layout, base, export, inputs, tmp_path, kind):
    source = {"distilled": layout.distillation, "fused": layout.fusion}[kind] / POLICY
    export(layout.output, "--format", "adapter", "--what", kind)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    before, after = (adapted(base, folder)(**inputs).logits for folder in (source, tmp_path / "out"))
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-4)
    assert read_adapter(tmp_path / "out").base_fingerprint == base_fingerprint(base)


def test_the_fused_adapter_would_have_been_misread(layout):
    config = json.loads((layout.fusion / POLICY / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 1  # else the test above shows nothing


@torch.no_grad()
def test_a_merged_checkpoint_reloads_with_the_adapters_tokens(layout, base, export, inputs, tmp_path, tokenizer):
    facts, _ = export(layout.output, "--format", "merged", "--what", "soup")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.generate(**inputs, **GREEDY), soup(base, layout, [0.6, 0.4]).generate(**inputs, **GREEDY))
    assert not torch.equal(model.generate(**inputs, **GREEDY), base.generate(**inputs, **GREEDY))
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert read.chat_template == tokenizer.chat_template
    assert read("say yes").input_ids == tokenizer("say yes").input_ids
    assert facts["dtype"] == "float32"
    export_again = ["export", str(layout.output), "--format", "merged", "--what", "soup", "--dtype", "bfloat16"]
    assert main([*export_again, "--output", str(tmp_path / "half")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16
    is_said = ["are rounded to bfloat16" in (tmp_path / name / "README.md").read_text() for name in ("half", "out")]
    assert is_said == [True, False]


@torch.no_grad()
def test_a_gguf_base_is_unpacked_and_merged(make_causal_model, tokenizer, write_adapter, export, inputs, tmp_path):
    model = make_causal_model("llama", vocab_size=262)
    file = write_base(model, tokenizer, tmp_path / "tiny.gguf")
    layout = make_run(tmp_path / "run", file, model, write_adapter)
    export(layout.output, "--format", "merged", "--what", "soup")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.generate(**inputs, **GREEDY), soup(model, layout, [0.6, 0.4]).generate(**inputs, **GREEDY))
    assert not list(tmp_path.glob(".base*"))
    assert main(["export", str(layout.output), "--format", "gguf-lora", "--output", str(tmp_path / "loras")]) == 0
    assert f"llama-server -m {file} --lora-scaled" in (tmp_path / "loras" / "README.md").read_text()


def test_each_policy_is_a_gguf_lora_and_the_server_gets_the_points_scales(layout, export, tmp_path):
    facts, _ = export(layout.output, "--format", "gguf-lora", "--what", "soup", "--prefer", "varied=1")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gguf")) == ["brief.gguf", "varied.gguf"]
    assert facts["lora"] == [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 1.0}]
    assert facts["command"].endswith("llama-server -m base.gguf --lora-scaled brief.gguf:0.0,varied.gguf:1.0")
    kept = json.loads((tmp_path / "out" / SERVER_CARD).read_text())
    assert [point["value"] for point in kept["front"]] == [0.6, 0.55]
    assert kept["front"][0]["lora"] == [{"id": 0, "scale": 0.6}, {"id": 1, "scale": 0.4}]


def test_what_was_distilled_comes_first_and_as_one_gguf_lora(layout, export, tmp_path):
    assert export(layout.output, "--format", "adapter")[0]["what"] == "distilled"
    shutil.rmtree(tmp_path / "out")
    facts, said = export(layout.output, "--format", "gguf-lora", "--what", "distilled")
    assert facts["lora"] == [{"id": 0, "scale": 1.0}]
    assert "answers otherwise" not in said
    assert "of the distilled" in said


def test_where_a_trade_off_is_chosen_a_soup_comes_first(layout, export, tmp_path):
    for options in (["--format=gguf-lora"], ["--format=adapter", "--prefer=brief=1"], ["--format=merged", "--weights=brief=1"]):
        assert export(layout.output, *options)[0]["what"] == "soup"
        shutil.rmtree(tmp_path / "out")


@torch.no_grad()
def test_a_strength_relative_to_the_base_is_a_sum_of_deltas(tiny_base_dir, base, write_adapter, export, inputs, tmp_path):
    ensemble = EnsembleConfig(adapter_scale=2.0, include_base=True)
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter, ensemble=ensemble)
    shutil.rmtree(layout.search)  # no search yet: weights are given
    facts, said = export(layout.output, "--format=adapter", "--what=soup", "--weights=brief=1.5,varied=-0.2,base=-0.3")
    found = adapted(base, tmp_path / "out")(**inputs).logits
    torch.testing.assert_close(found, soup_of_base(base, layout)(**inputs).logits, atol=1e-3, rtol=1e-3)
    assert facts["weights"] == {"brief": 1.5, "varied": -0.2, "base": -0.3}
    assert "that the search scored" not in said
    assert (tmp_path / "out" / "README.md").read_text().count("| 2 |") == 2


def soup_of_base(base, layout):
    policies = {name: read_adapter(layout.policy(name), 2.0) for name in ("brief", "varied")}
    return ParameterAverage(deepcopy(base), policies, include_base=True, weights=[1.5, -0.2, -0.3])


def test_a_policy_for_the_whole_front_is_exported_with_its_line(tiny_base_dir, base, write_adapter, export, tmp_path):
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter)
    card = layout.distillation / POLICY / POLICY_CARD
    line = PreferenceLine("Priorities: {weights}.", ("brief", "varied"))
    front = [{"weights": dict(one.weights), "scores": dict(one.scores), "value": one.value} for one in FRONT]
    write_json(card, {**json.loads(card.read_text()), **line.card(), "front": front, "weights": front[1]["weights"]})
    facts, said = export(layout.output, "--format", "adapter", "--prefer", "varied=1")
    assert "told: Priorities: brief 0 %, varied 100 %." in said
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "`Priorities: brief 0 %, varied 100 %.` (wording: `Priorities: {weights}.`, for brief, varied)" in readme
    assert PreferenceLine.read(tmp_path / "out") == line  # `emorl generate` and `serve` take the export as they took it
    assert main(["generate", str(tmp_path / "out"), "--prefer", "brief=1", "--prompt", "say yes"]) == 0
    assert facts["what"] == "distilled"


def test_the_card_says_how_it_was_made_and_what_engines_must_do(layout, export, tmp_path):
    facts, _ = export(layout.output, "--format", "adapter", "--what", "soup", "--prefer", "varied=1")
    card = (tmp_path / "out" / "README.md").read_text()
    command = f"emorl export {layout.output} --format=adapter --what=soup --prefer=varied=1.0 --output={tmp_path / 'out'}"
    assert command in card
    assert "Prompts had this system turn: `Be kind.`." in card
    assert "`{'max_new_tokens': 12, 'do_sample': False}`" in card
    assert "The search scored the hidden-state ensemble of these policies" in card
    assert facts["command"] in card
    shutil.move(tmp_path / "out", tmp_path / "before")
    assert main(command.split()[1:]) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "before" / "adapter_model.safetensors"
    ).read_bytes()


def test_the_tokenizer_asks_as_the_experiment_did(tiny_base_dir, base, write_adapter, export, tokenizer, tmp_path):
    data = DataConfig(path="prompts.jsonl", validation=2, test=2, chat_template_kwargs={"thinks": False}, after="<|so|>")
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter, data=data)
    export(layout.output, "--format", "gguf-lora", "--what", "soup")
    wanted = prepare_tokenizer(deepcopy(tokenizer), {"thinks": False}, None).chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == wanted
    card = (tmp_path / "out" / "README.md").read_text()
    assert "has these arguments set (an engine that has its own template needs them): `{'thinks': False}`" in card
    assert "An answer begins behind this mark: `<|so|>`" in card


def test_an_adapters_folder_is_exported_with_the_base_it_names(base, tiny_base_dir, write_adapter, tokenizer, export, tmp_path):
    path = write_adapter(base, tmp_path / "policy", rank=5)
    config = json.loads((path / "adapter_config.json").read_text())
    write_json(path / "adapter_config.json", {**config, "base_model_name_or_path": str(tiny_base_dir)})
    facts, _ = export(path, "--format", "adapter")
    assert (facts["what"], facts["rank"], facts["base"]) == ("policy", 8, str(tiny_base_dir))
    write_json(path / "adapter_config.json", {**config, "base_model_name_or_path": None})
    assert main(["export", str(path), "--format", "adapter", "--output", str(tmp_path / "other")]) == 2


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(layout, export, base, make_causal_model, tmp_path, capsys):
    export(layout.output, "--format", "adapter")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert main(["export", str(layout.output), "--format", "merged", "--output", str(tmp_path / "out")]) == 2
    assert "exists and is not empty; give another --output, or move it away" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    moved = tmp_path / "run"
    shutil.copytree(layout.output, moved)
    other = tmp_path / "other"
    make_causal_model("llama", seed=9).save_pretrained(other)
    shutil.copy(layout.output.parent / "run" / "experiment.yaml", moved / "experiment.yaml")
    text = (moved / "experiment.yaml").read_text()
    [named] = [line for line in text.splitlines() if line.strip().startswith("model: /")]
    AutoTokenizer.from_pretrained(named.split()[1]).save_pretrained(other)
    (moved / "experiment.yaml").write_text(text.replace(named, f"  model: {other}"))
    assert main(["export", str(moved), "--format", "merged"]) == 2
    assert "holds other weights than the base that the policies were trained on" in capsys.readouterr().err
    assert not list((moved / "export").iterdir())


MISTAKES = [
    (["--format", "onnx"], "--format: expected adapter, merged, gguf-lora, got 'onnx'"),
    (["--format", "gguf"], "did you mean 'gguf-lora'"),
    (["--format", "adapter", "--what", "soop"], "--what: expected soup, distilled, fused, got 'soop'; did you mean 'soup'"),
    (["--format", "adapter", "--what", "ensemble"], "Two ways out, from the output of its experiment: `emorl distill`"),
    (["--format", "merged", "--what", "hidden_states"], "--what soup sums the policies' parameters"),
    (["--format", "adapter", "--what", "dynamic"], "a dynamic ensemble is no sum of parameters"),
    (["--format", "adapter", "--rank", "0"], "--rank is of adapters, at least 1; got 0"),
    (["--format", "merged", "--rank", "8"], "--rank is of adapters"),
    (["--format", "adapter", "--dtype", "bfloat16"], "--dtype is of a merged checkpoint"),
    (["--format", "merged", "--dtype", "int8"], "--dtype: expected float32, bfloat16, float16, got 'int8'"),
    (
        ["--format", "adapter", "--what", "distilled", "--prefer", "brief=1"],
        "is one policy, made for one trade-off; leave --prefer out",
    ),
    (["--format", "adapter", "--prefer", "brief=1", "--weights", "brief=1"], "use one of both"),
    (["--format", "adapter", "--what", "soup", "--weights", "breif=1"], "no policy is called 'breif'; did you mean 'brief'"),
    (["--format", "adapter", "--what", "soup", "--weights", "brief=-1"], "none below 0"),
    (["--format", "adapter", "--what", "soup", "--prefer", "breif=1"], "preferences name breif; did you mean 'brief'"),
]


def test_cheap_mistakes_are_one_line_before_any_library(layout, tmp_path):
    lines = [[str(layout.output), *options] for options, _ in MISTAKES]
    lines += [[str(layout.output / place), "--format", "adapter"] for place in ("nowhere", "search/ensemble")]
    (tmp_path / DYNAMIC_CARD).write_text("{}")
    lines += [[str(tmp_path), "--format", "adapter"]]
    expected = [
        *(message for _, message in MISTAKES),
        "is not a run directory",
        "is a saved ensemble; give the output",
        "dynamic ensemble",
    ]
    code = (
        "import json, sys; from emorl.cli import main\n"
        "assert {main(['export', *words]) for words in json.loads(sys.argv[1])} == {2}\n"
        "assert not {'torch', 'transformers', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(lines)], capture_output=True, text=True, check=True)
    for line, message in zip(done.stderr.splitlines(), expected, strict=True):
        assert message in line


def test_what_is_not_there_yet_is_said_with_the_command_that_makes_it(tiny_base_dir, base, write_adapter, tmp_path, capsys):
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter)
    for place in (layout.distillation, layout.fusion, layout.search):
        shutil.rmtree(place)
    remedies = {"soup": "run `emorl search`, or give --weights", "distilled": "`emorl distill`", "fused": "`emorl fuse`"}
    for kind, remedy in remedies.items():
        assert main(["export", str(layout.output), "--format", "adapter", "--what", kind]) == 2
        assert f"there is no {kind} policy in {layout.output} yet: run {remedy.removeprefix('run ')}" in capsys.readouterr().err
    assert main(["export", str(layout.output), "--format", "adapter"]) == 2


def test_a_base_of_few_bits_is_not_merged(tiny_base_dir, base, write_adapter, tmp_path, capsys):
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter)
    file = layout.experiment
    assert "quantization: null" in file.read_text()
    file.write_text(file.read_text().replace("quantization: null", "quantization: {bits: 4}"))
    assert main(["export", str(layout.output), "--format", "merged", "--what", "soup"]) == 2
    assert "a base in 4 bits, and no file holds their sum with it; use --format adapter" in capsys.readouterr().err
    assert main(["export", str(layout.output), "--format", "adapter", "--what", "soup"]) == 0
    assert "over the base in so many bits: `4`" in (layout.output / "export" / "adapter" / "README.md").read_text()


@torch.no_grad()
def test_an_encoder_decoders_soup_is_exported_and_merged(
    tiny_seq2seq_dir, make_seq2seq_model, write_adapter, plain_tokenizer, tmp_path, capsys
):
    base, run = make_seq2seq_model(), tmp_path / "run"
    adapt = {"target_modules": ["q", "v", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    layout = make_run(run, tiny_seq2seq_dir, base, lambda *given, **options: write_adapter(*given, **options, **adapt))
    inputs = plain_tokenizer(["say yes"], return_tensors="pt")
    expected = soup(base, layout, [0.6, 0.4]).generate(**inputs, **GREEDY)
    for kind in ("adapter", "merged"):
        assert main(["export", str(run), "--format", kind, "--what", "soup", "--output", str(tmp_path / kind)]) == 0
        assert "vllm" not in capsys.readouterr().out  # which has no encoder-decoders
    merged = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.generate(**inputs, **GREEDY), expected)
    assert torch.equal(adapted(base, tmp_path / "adapter").generate(**inputs, **GREEDY), expected)
    assert main(["export", str(run), "--format", "gguf-lora", "--what", "soup", "--output", str(tmp_path / "loras")]) == 2
    assert not (tmp_path / "loras").exists()


def test_a_base_of_the_hub_is_merged_from_this_machines_copy(tiny_base_dir, base, write_adapter, tmp_path):
    stored = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(tiny_base_dir, stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    layout = make_run(tmp_path / "run", tiny_base_dir, base, write_adapter)
    layout.experiment.write_text(layout.experiment.read_text().replace(f"model: {tiny_base_dir}", "model: org/tiny"))
    command = [sys.executable, "-m", "emorl", "export", str(layout.output), "--format", "merged", "--json"]
    place = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=place, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["base"] == "org/tiny"
    assert AutoModelForCausalLM.from_pretrained(facts["output"]).num_parameters() == base.num_parameters()
