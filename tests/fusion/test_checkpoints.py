"""Checkpoints fused on disk equal the models fused in memory, and no mistake or kill leaves half a model."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from emorl.cli import main
from emorl.config import UserError
from emorl.config.fuse import CheckpointsFile
from emorl.fusion import checkpoints
from emorl.fusion.checkpoints import CheckpointFusion, FusedTensor, fuse_checkpoints, open_checkpoint
from emorl.fusion.operators import Fusion, fuse_tensor
from emorl.fusion.recipe import RECIPE_NAME, fuse

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert(seed=0, labels=3):
    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=labels, **SMALL)).eval()


def vit(seed=0):
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **SMALL)).eval()


@pytest.fixture(scope="module")
def folders(make_causal_model, make_seq2seq_model, tokenizer, tmp_path_factory):
    """family -> folders of three models"""
    makers = {"llama": make_causal_model, "t5": make_seq2seq_model, "bert": bert, "vit": vit}
    found = {}
    for family, make in makers.items():
        found[family] = [tmp_path_factory.mktemp(f"{family}{seed}") for seed in range(3)]
        for seed, folder in enumerate(found[family]):
            make(seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(found["llama"][0])
    return found


def file_of(paths, output, **settings):
    base, *models = paths
    return CheckpointsFile(output=output, models=dict(zip("ab", models, strict=True)), base=base, **settings)


def state(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["llama", "t5", "bert", "vit"])
@pytest.mark.parametrize(
    ("method", "settings"),
    [("linear", {}), ("slerp", {"space": "task_vectors"}), ("ties", {"density": 0.3}), ("dare_ties", {"density": 0.5})],
)
def test_every_tensor_is_fused_as_in_memory(folders, family, method, settings, tmp_path):
    paths = folders[family]
    found = state(
        fuse(file_of(paths, tmp_path / "out", method=method, settings=settings, weights={"a": 0.7, "b": 0.3}, seed=5))
    )
    base, *models = [state(path) for path in paths]
    assert found.keys() == base.keys()
    for name, tensor in found.items():
        expected = fuse_tensor(
            Fusion(method, (0.7, 0.3), settings), [model[name] for model in models], base[name], name=name, seed=5
        )
        assert torch.equal(tensor, expected), name


def test_the_result_is_an_ordinary_model_with_its_tokenizer(folders, tokenizer, tmp_path):
    output = fuse(file_of(folders["llama"], tmp_path / "out", dtype="bfloat16"))
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == torch.bfloat16
    assert (output / "tokenizer_config.json").is_file()
    assert "emorl fuse fusion.yaml" in (output / "README.md").read_text()
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[0] == 1
    assert AutoModelForSeq2SeqLM.from_pretrained(fuse(file_of(folders["t5"], tmp_path / "t5"))).dtype == torch.float32


def test_all_weight_on_one_model_gives_that_model(folders, tmp_path):
    output = fuse(file_of(folders["vit"], tmp_path / "out", weights={"a": 1}))
    expected = state(folders["vit"][1])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(output).items())


def test_shards_are_read_and_written(folders, monkeypatch, tmp_path):
    sharded = []
    for number, path in enumerate(folders["llama"]):
        AutoModelForCausalLM.from_pretrained(path).save_pretrained(tmp_path / str(number), max_shard_size="20KB")
        sharded.append(tmp_path / str(number))
    assert (sharded[0] / "model.safetensors.index.json").is_file()
    monkeypatch.setattr(checkpoints, "_SHARD_SIZE", 20_000)
    output = fuse(file_of(sharded, tmp_path / "out"))
    assert len(list(output.glob("model-0*.safetensors"))) > 3
    whole = state(fuse_whole := fuse_in_one(folders, tmp_path))
    again = AutoModelForCausalLM.from_pretrained(output).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items()), fuse_whole


def fuse_in_one(folders, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_SHARD_SIZE", 1 << 40)
        return fuse(file_of(folders["llama"], tmp_path / "whole"))


def test_global_trim_keeps_the_largest_entries_of_the_whole_model(folders, tmp_path):
    base, one, _ = folders["bert"]
    file = CheckpointsFile(
        output=tmp_path / "out", models={"a": one}, base=base, method="ties", settings={"density": 0.1, "trim": "global"}
    )
    found, start, end = state(fuse(file)), state(base), state(one)
    deltas = {name: end[name] - start[name] for name in found}
    everything = torch.cat([delta.flatten() for delta in deltas.values()]).abs()
    threshold = everything.sort(descending=True).values[int(0.1 * len(everything)) - 1]
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, start[name] + deltas[name] * (deltas[name].abs() >= threshold), atol=1e-7, rtol=0)


def test_tied_embeddings_meet_untied_ones(make_causal_model, tmp_path):
    make_causal_model("llama", seed=0, tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    make_causal_model("llama", seed=1).save_pretrained(tmp_path / "untied")
    file = CheckpointsFile(output=tmp_path / "out", models={"a": tmp_path / "untied", "b": tmp_path / "tied"})
    tied, untied, found = state(tmp_path / "tied"), state(tmp_path / "untied"), state(fuse(file))
    assert "lm_head.weight" not in tied
    torch.testing.assert_close(found["lm_head.weight"], (tied["model.embed_tokens.weight"] + untied["lm_head.weight"]) / 2)


def test_heads_are_kept_of_one_model(folders, tmp_path):
    bert(seed=7, labels=5).save_pretrained(tmp_path / "five")
    models = {"three": folders["bert"][0], "five": tmp_path / "five"}
    with pytest.raises(UserError, match=r"'classifier.bias' is \[3\] in .* and \[5\] in .*keep that tensor"):
        fuse(CheckpointsFile(output=tmp_path / "out", models=models))
    kept = fuse(CheckpointsFile(output=tmp_path / "out", models=models, keep={"classifier": "three"}))
    assert torch.equal(state(kept)["classifier.weight"], state(models["three"])["classifier.weight"])
    BertForSequenceClassification.from_pretrained(kept)


def test_a_part_of_no_name_and_files_that_changed_are_told(folders, tmp_path):
    models = {"a": folders["bert"][1], "b": tmp_path / "b"}
    shutil.copytree(folders["bert"][2], tmp_path / "b")
    with pytest.raises(UserError, match="keep: no tensor's name contains 'clasifier'"):
        fuse(CheckpointsFile(output=tmp_path / "out", models=models, keep={"clasifier": "a"}))
    fuse(CheckpointsFile(output=tmp_path / "out", models=models))
    with pytest.raises(UserError, match=r"made with other settings \(method: 'linear' -> 'slerp'\)"):
        fuse(CheckpointsFile(output=tmp_path / "out", models=models, method="slerp"))
    os.utime(tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match="made of other weights"):
        fuse(CheckpointsFile(output=tmp_path / "out", models=models))


def test_a_recipe_works_from_any_folder(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["vit"][0].parent)
    output = fuse(CheckpointsFile(output=tmp_path / "out", models={"a": folders["vit"][0].name, "b": folders["vit"][1].name}))
    monkeypatch.chdir(tmp_path)
    assert main(["fuse", str(output / RECIPE_NAME), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()


def test_layers_may_move(folders, tmp_path):
    model = open_checkpoint(folders["llama"][0])
    twice = [
        FusedTensor(name.replace("layers.1", "layers.2"), Fusion("linear", (1.0,)), (name,), name) for name in model.entries
    ]
    middle = [
        FusedTensor(name.replace("layers.0", "layers.1"), Fusion("keep", (1.0,)), (name,), name)
        for name in model.entries
        if "layers.0" in name
    ]
    fusion = CheckpointFusion((model,), None, (*twice, *middle), config_changes={"num_hidden_layers": 3})
    deeper = AutoModelForCausalLM.from_pretrained(fuse_checkpoints(fusion, tmp_path / "out", {}))
    layers = deeper.model.layers
    assert len(layers) == 3
    assert torch.equal(layers[0].mlp.up_proj.weight, layers[1].mlp.up_proj.weight)


def test_mistakes_are_one_line(folders, make_causal_model, tmp_path):
    llama, other = folders["llama"], folders["bert"][0]
    with pytest.raises(UserError, match=r"is a llama and .* a bert; fuse models of one architecture"):
        fuse(CheckpointsFile(output=tmp_path / "out", models={"a": llama[0], "b": other}))
    make_causal_model("llama", vocab_size=300).save_pretrained(tmp_path / "wide")
    with pytest.raises(UserError, match=r"'lm_head.weight' is \[261, 32\] in .* and \[300, 32\]"):
        fuse(CheckpointsFile(output=tmp_path / "out", models={"a": llama[0], "b": tmp_path / "wide"}))
    make_causal_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "deep")
    with pytest.raises(UserError, match=r"has no tensor 'model.layers.2.*others have"):
        fuse(CheckpointsFile(output=tmp_path / "out", models={"a": llama[0], "b": tmp_path / "deep"}))
    with pytest.raises(UserError, match="not a transformers checkpoint"):
        open_checkpoint(tmp_path)
    shutil.copytree(llama[0], tmp_path / "torn")
    os.truncate(tmp_path / "torn" / "model.safetensors", 5000)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        open_checkpoint(tmp_path / "torn")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        fuse(file_of(llama, tmp_path / "full"))


def test_the_same_recipe_is_not_fused_twice_and_its_file_makes_it_again(folders, tmp_path, capsys):
    file = file_of(folders["llama"], tmp_path / "out", method="task_arithmetic", settings={"scale": 0.4})
    output = fuse(file)
    before = (output / "model.safetensors").stat().st_mtime_ns
    fuse(file)
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    assert main(["fuse", str(output / RECIPE_NAME), f"output={tmp_path / 'again'}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == str(tmp_path / "again")
    assert state(tmp_path / "again").keys() == state(output).keys()
    assert all(torch.equal(tensor, state(output)[name]) for name, tensor in state(tmp_path / "again").items())


def test_a_killed_fusion_leaves_no_half_model(folders, tmp_path):
    paths = []
    for name in "abc":
        paths.append(tmp_path / name)
        shutil.copytree(folders["llama"][0], paths[-1])
        tensors = {**state(folders["llama"][0]), **{f"big.{number}": torch.zeros(1_000_000) for number in range(16)}}
        save_file(tensors, paths[-1] / "model.safetensors", metadata={"format": "pt"})
    settings = {"output": str(tmp_path / "out"), "models": {p.name: str(p) for p in paths[1:]}, "base": str(paths[0])}
    (tmp_path / "fuse.yaml").write_text(yaml.safe_dump({**settings, "method": "ties"}))
    command = [sys.executable, "-m", "emorl", "fuse", str(tmp_path / "fuse.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".out.partial" / "model.safetensors"
    while not (partial.exists() and partial.stat().st_size > 1_000_000) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert partial.exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert state(tmp_path / "out").keys() == tensors.keys()
    assert not partial.parent.exists()


# --- mergekit's files


def mergekit(method, paths, **more):
    base, *models = map(str, paths)
    return {"merge_method": method, "models": [{"model": model} for model in models], "base_model": base, **more}


CASES = {
    "linear": {"models": [0.7, 0.2], "parameters": {"normalize": True}},
    "ties": {"models": [0.7, 0.2], "parameters": {"density": 0.4, "lambda": 0.8}},
    "task_arithmetic": {"models": [0.7, -0.2], "parameters": {"normalize": False}},
    "slerp": {"t": [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.3]}, {"value": 0.4}]},
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("as_slices", [False, True])
def test_a_mergekit_file_gives_what_mergekit_gives(folders, method, as_slices, tmp_path):
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options").MergeOptions(quiet=True, write_model_card=False)
    base, one, two = map(str, folders["llama"])
    if method == "slerp":
        models, parameters = [{"model": base}, {"model": one}], {"t": CASES["slerp"]["t"]}
    else:
        weights, parameters = CASES[method]["models"], CASES[method]["parameters"]
        models = [{"model": path, "parameters": {"weight": w}} for path, w in zip([one, two], weights, strict=True)]
    content = {"merge_method": method, "parameters": parameters, "dtype": "float32"}
    if method != "linear":
        content["base_model"] = base
    if as_slices:
        content["slices"] = [{"sources": [{**model, "layer_range": [0, 2]} for model in models]}]
        if method in ("ties", "task_arithmetic"):
            content["slices"][0]["sources"].append({"model": base, "layer_range": [0, 2]})
    else:
        content["models"] = models
    merge.run_merge(config.MergeConfiguration.model_validate(content), str(tmp_path / "theirs"), options)
    ours = state(fuse({**content, "output": str(tmp_path / "ours")}))
    theirs = state(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize("ranges", [[(0, 1), (1, 2)], [(0, 2), (2, 2)], [(0, 1), (0, 2)]])
def test_what_lies_behind_the_layers_goes_with_the_last_slice(folders, ranges, tmp_path):
    """The final norm and the head; also behind a last slice of no layers, which keeps one model's."""
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options").MergeOptions(quiet=True, write_model_card=False)
    base, one, _ = map(str, folders["llama"])
    slices = [
        {"sources": [{"model": name, "layer_range": list(layers)} for name in (base, one)], "parameters": {"t": share}}
        for layers, share in zip(ranges, (0.2, 0.9), strict=True)
    ]
    content = {"merge_method": "slerp", "base_model": base, "dtype": "float32", "slices": slices}
    merge.run_merge(config.MergeConfiguration.model_validate(content), str(tmp_path / "theirs"), options)
    ours, theirs = state(fuse({**content, "output": str(tmp_path / "ours")})), state(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=1e-6, rtol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": []}, "models: expected at least 1"),
        ({"models": None}, "either models or slices"),
        ({"models": [{"parameters": {"weight": 1}}]}, "models.0.model"),
        ({"models": [{"model": 7}]}, "models.0.model: expected a text"),
        ({"models": "base"}, "models: expected a list"),
        ({"models": [{"model": "A+B"}, {"model": "C"}]}, "fuse an adapter into its base first"),
        ({"models": [{"model": "A"}, {"model": "A"}]}, "'A' is listed twice"),
        ({"models": None, "slices": []}, "slices: expected at least 1"),
        ({"models": None, "slices": [{"sources": []}]}, "sources: expected at least 1"),
        ({"models": None, "slices": [{"sources": [{"model": "A"}]}]}, "layer_range of A: expected"),
        ({"models": None, "slices": [{"sources": [{"model": "A", "layer_range": [2, 1]}]}]}, "layer_range of A: expected"),
        ({"models": None, "slices": [{"sources": [{"model": "A", "layer_range": [0, -1]}]}]}, "at least 0"),
        ({"models": None, "slices": [{"sources": [{"model": "A", "layer_range": [0]}]}]}, "layer_range: expected at least 2"),
        ({"parameters": {"weight": "half"}}, "weight: expected a number, or a list of them"),
        ({"parameters": {"weight": True}}, "weight: expected a number"),
        ({"parameters": {"weight": float("nan")}}, "weight: expected a number"),
        ({"parameters": {"weight": [1, "two"]}}, "weight: expected a number"),
        ({"parameters": {"weight": [{"filter": "mlp"}]}}, "weight: expected a number"),
        ({"parameters": {"normalize": "no"}}, "normalize: expected true or false"),
        ({"parameters": {"normalize": 1}}, "normalize: expected true or false"),
        ({"parameters": {"lambda": "0.5"}}, "lambda: expected a number"),
        ({"parameters": {"weight": 0.5, "density": 2}}, "density"),
        ({"parameters": {"weight": 0.5, "density": 0.5, "rescale": True}}, "ties with rescale: true is not supported"),
        ({"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.5, "rescale": False}}, "rescale: false"),
        ({"tokenizer": {"source": "base"}}, "'tokenizer' is not supported; the base's own is kept"),
        ({"chat_template": "auto"}, "'chat_template' is not supported; the base's own is kept"),
        ({"dtype": "float23"}, "expected float32, float16 or bfloat16"),
        ({"merge_method": "passthrough"}, "'passthrough' of mergekit is not supported"),
        ({"modules": {}}, "'modules' is not supported"),
        ({"parameters": {"densty": 1}}, "parameter 'densty' is not supported; did you mean 'density'"),
        ({"base_model": None}, "needs a base_model"),
        ({"tokenizer_source": "union"}, "tokenizer_source"),
        ({}, "has no weight for"),
    ],
)
def test_what_is_not_supported_in_mergekit_s_files_is_refused(folders, change, message, tmp_path):
    content = {**mergekit("ties", folders["llama"]), "output": str(tmp_path / "out"), **change}
    with pytest.raises(UserError, match=message):
        fuse(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_attention_heads", 4, "num_attention_heads=2 and .* 4"),
        ("hidden_act", "gelu", "hidden_act='silu' and .* 'gelu'"),
        ("model_type", "mistral", "is a llama and .* a mistral"),
    ],
)
def test_models_of_equal_shapes_and_another_meaning_are_refused(folders, key, value, message, tmp_path):
    base, one, _ = folders["llama"]
    other = shutil.copytree(one, tmp_path / "other")
    settings = json.loads((other / "config.json").read_text())
    if key == "num_attention_heads":
        value, message = settings[key] * 2, f"num_attention_heads={settings[key]} and .* {settings[key] * 2}"
    (other / "config.json").write_text(json.dumps({**settings, key: value}))
    content = mergekit("ties", [base, one, other])
    content["parameters"] = {"weight": 0.5, "density": 0.5}
    with pytest.raises(UserError, match=message):
        fuse({**content, "output": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_tokens_that_are_numbered_differently_are_refused(folders, tokenizer, tmp_path):
    base, one, two = (shutil.copytree(folder, tmp_path / folder.name) for folder in folders["llama"])
    for folder in (base, one, two):
        tokenizer.save_pretrained(folder)
    file = json.loads((two / "tokenizer.json").read_text())
    words = list(file["model"]["vocab"])
    file["model"]["vocab"] = dict(zip(words, reversed(range(len(words))), strict=True))
    (two / "tokenizer.json").write_text(json.dumps(file))
    content = {**mergekit("ties", [base, one, two]), "parameters": {"weight": 0.5}, "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="number their tokens differently"):
        fuse(content)


@pytest.mark.parametrize("broken", ["nan", "inf", "too large for float16"])
def test_numbers_that_are_none_stop_a_fusion_before_its_folder_appears(folders, broken, tmp_path):
    base, one, two = folders["llama"]
    bad = shutil.copytree(two, tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    tensors[name].view(-1)[3] = {"nan": float("nan"), "inf": float("inf")}.get(broken, 1e6)
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    content = {**mergekit("ties", [base, one, bad]), "parameters": {"weight": 0.5}, "output": str(tmp_path / "out")}
    if broken.startswith("too"):
        content["dtype"] = "float16"
    with pytest.raises(UserError, match=f"'{name}' would hold NaN or infinity"):
        fuse(content)
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_beside_tied_models_is_refused(make_causal_model, tmp_path):
    folders = []
    for number, tied in enumerate((True, True, False)):
        model = make_causal_model("llama", seed=number, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path / str(number))
        folders.append(tmp_path / str(number))
    content = {**mergekit("ties", folders), "parameters": {"weight": 0.5}, "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match="2 has an output head of its own and the others none"):
        fuse(content)
