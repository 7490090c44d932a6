"""A pair of SmolLM2s, each with an adapter merged into it, is fused as mergekit fuses it: mergekit takes cosines in float32, so
that SLERP between such close models differs from ours in the sixth digit."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from emorl.fusion.recipe import fuse

pytestmark = [pytest.mark.realmodel, pytest.mark.filterwarnings("ignore")]  # of mergekit's and of its dependencies

METHODS = {
    "linear": ([0.7, 0.2], {"normalize": True}),
    "task_arithmetic": ([0.7, -0.2], {"normalize": False}),
    "slerp": (None, {"t": 0.3}),
}


@pytest.fixture(scope="module")
def pair(real_model, write_adapter, tmp_path_factory):
    """The base, then the two merged models, in float32."""
    base, folder = real_model("smollm2"), tmp_path_factory.mktemp("pair")
    for name in ("one", "two"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapter = write_adapter(model, folder / f"{name}-adapter", seed=len(name) + ord(name[0]), alpha=0.5)
        PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(folder / name)
    return [base, folder / "one", folder / "two"]


@pytest.mark.parametrize("method", METHODS)
def test_a_pair_of_merged_adapters_is_fused_as_mergekit_fuses_it(method, pair, tmp_path):
    config = pytest.importorskip("mergekit.config")
    merge = pytest.importorskip("mergekit.merge")
    options = pytest.importorskip("mergekit.options").MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    base, *models = map(str, pair)
    weights, parameters = METHODS[method]
    content = {
        "merge_method": method,
        "models": [
            {"model": path, "parameters": {"weight": weights[index]} if weights else {}} for index, path in enumerate(models)
        ],
        "parameters": parameters,
        "dtype": "float32",
    }
    if method != "linear":
        content["base_model"] = models[0] if method == "slerp" else base
    merge.run_merge(config.MergeConfiguration.model_validate(content), str(tmp_path / "theirs"), options)
    ours = load_file(fuse({**content, "output": str(tmp_path / "ours")}) / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    one = load_file(pair[1] / "model.safetensors")
    assert any(not torch.equal(tensor, one[name]) for name, tensor in ours.items())
    for name, tensor in ours.items():
        torch.testing.assert_close(
            tensor, theirs[name], atol=1e-6, rtol=1e-5, msg=lambda message, name=name: f"{name}: {message}"
        )
