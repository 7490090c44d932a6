"""An exported adapter has one rank and one alpha, and adds exactly the weighted sum to the base."""

import json
from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig

from emorl.aggregation.ensemble import ParameterAverage
from emorl.config import UserError
from emorl.fusion.adapters import concatenate_adapters
from emorl.fusion.export_card import Exported
from emorl.fusion.one_rank import RANKS, declared_rank, export_adapter, one_rank
from emorl.policies.adapters import read_adapter


def exported(folder, adapters, weights, rank=None):
    what = Exported(adapters, weights, "models/base", LlamaConfig(), "emorl export runs/mine --format=adapter")
    folder.mkdir()
    return export_adapter(what, folder, folder, rank)


@pytest.fixture(params=["llama", "gpt2"])
def mixed(request, make_causal_model, write_adapter, tmp_path):
    """Policies of different rank, scaling and modules: what PEFT writes as a `rank_pattern`."""
    base = make_causal_model(request.param)
    few = ["c_attn"] if request.param == "gpt2" else ["q_proj", "down_proj"]
    pattern = {few[0]: 7}
    return base, {
        "kind": read_adapter(write_adapter(base, tmp_path / "kind", rank=2, rank_pattern=pattern, seed=1)),
        "brief": read_adapter(write_adapter(base, tmp_path / "brief", rank=3, rslora=True, target_modules=few, seed=2), 1.5),
    }


@torch.no_grad()
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.5), (0.0, 1.0)])
def test_peft_gives_the_logits_of_the_parameter_average(mixed, tokenizer, tmp_path, weights):
    base, policies = mixed
    facts = exported(tmp_path / "out", policies, dict(zip(policies, weights, strict=True)))
    inputs = tokenizer(["a prompt", "another one"], return_tensors="pt", padding=True)
    found = PeftModel.from_pretrained(deepcopy(base), str(tmp_path / "out")).eval()(**inputs).logits
    average = ParameterAverage(deepcopy(base), policies, include_base=True, weights=[*weights, 0.0])
    torch.testing.assert_close(found, average(**inputs).logits, atol=2e-4, rtol=1e-4)
    assert not torch.allclose(found, base(**inputs).logits, atol=0.1)
    assert facts["kept"] == 1


def test_engines_that_read_one_rank_and_one_alpha_scale_every_module_by_1(mixed, tmp_path):
    _, policies = mixed
    before = json.loads(
        (concatenate_adapters(list(policies.values()), [1, 1], tmp_path / "mixed") / "adapter_config.json").read_text()
    )
    facts = exported(tmp_path / "out", policies, {"kind": 0.5, "brief": 0.5})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert before["rank_pattern"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (16, 16, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == "models/base"
    assert {a.shape[1] for a, _ in read_adapter(tmp_path / "out").factors.values()} == {16} == {facts["rank"]}
    assert facts["command"].endswith(f"emorl={tmp_path / 'out'} --max-lora-rank 16")


@torch.no_grad()
def test_padding_changes_no_delta(mixed):
    _, policies = mixed
    [policy] = [policies["kind"]]
    for rank in (7, 9, 64):
        for name, (a, b, kept) in one_rank([policy], [1.0], rank).items():
            first, second = policy.factors[name]
            assert torch.equal(a @ b, first @ second) or torch.allclose(a @ b, first @ second, atol=1e-6)
            assert a.shape[1] == b.shape[0] == rank
            assert kept == 1


def test_a_rank_below_the_exact_one_is_the_best_approximation_and_said(mixed, tmp_path):
    _, policies = mixed
    facts = exported(tmp_path / "out", policies, {"kind": 1.0, "brief": 1.0}, rank=3)
    assert facts["rank"] == 3
    assert 0.3 < facts["kept"] < 1
    assert "--max-lora-rank 8" in facts["command"]
    assert f"keeps {facts['kept']:.4%}" in (tmp_path / "out" / "README.md").read_text()


def test_the_card_holds_the_command_and_the_policies(mixed, tmp_path):
    _, policies = mixed
    facts = exported(tmp_path / "out", policies, {"kind": 0.25, "brief": 0.75})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "emorl export runs/mine --format=adapter" in card
    assert facts["command"] in card
    assert f"| brief | 0.75 | 1.5 | {policies['brief'].path} |" in card
    assert "base_model: models/base" in card


def test_declared_ranks_are_those_that_vllm_knows():
    assert [declared_rank(rank) for rank in (1, 8, 9, 48, 64, 257, 321, 512)] == [8, 8, 16, 64, 64, 320, 512, 512]
    assert RANKS == (8, 16, 32, 64, 128, 256, 320, 512)
    with pytest.raises(UserError, match="rank 513, and engines load 512 at most: give --rank 512"):
        declared_rank(513)


def test_weights_that_leave_only_the_base_are_refused(mixed):
    _, policies = mixed
    with pytest.raises(UserError, match="leave nothing of the policies"):
        one_rank(list(policies.values()), [0.0, 0.0])
