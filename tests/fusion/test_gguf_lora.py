"""A GGUF LoRA adds to llama.cpp's base what the policy adds to transformers'."""

import json
from copy import deepcopy

import gguf
import pytest
import torch
from peft import PeftModel

from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.fusion.export_card import Exported
from emorl.fusion.gguf_lora import SERVER_CARD, export_gguf_lora, write_gguf_lora
from emorl.fusion.one_rank import one_rank
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base
from tests.policies.test_gguf import NAMES, write_base


def tensors_of(file):
    """Tensors by name as (out, in), (out, r) or (r, in)."""
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(file).tensors}


def written(path, file, model, rank=None):
    write_gguf_lora(file, one_rank([read_adapter(path)], [1.0], rank), model.config, "kind")
    return gguf.GGUFReader(file)


def gguf_name(module):
    number, _, kind = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[kind]}.weight"


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_delta_is_the_policys_with_its_heads_rows_interleaved(heads, make_causal_model, write_adapter, tmp_path):
    model = make_causal_model("llama", num_key_value_heads=heads)
    path = write_adapter(model, tmp_path / "policy", rank=3, alpha=7)
    written(path, tmp_path / "kind.gguf", model)
    found = tensors_of(tmp_path / "kind.gguf")
    size, half = model.config.head_dim, model.config.head_dim // 2
    for module, (a, b) in read_adapter(path).factors.items():
        name = gguf_name(module)
        delta, expected = found.pop(f"{name}.lora_b") @ found.pop(f"{name}.lora_a"), (a @ b).T
        if module.endswith(("q_proj", "k_proj")):  # neighbours 2i and 2i + 1 of a head are i and i + half
            rows = [
                start + pair + side for start in range(0, len(expected), size) for pair in range(half) for side in (0, half)
            ]
            expected = expected[rows]
        torch.testing.assert_close(delta, expected, atol=1e-6, rtol=1e-6)
    assert not found


def test_alpha_is_the_one_rank_so_that_llama_cpp_scales_by_1(make_causal_model, write_adapter, tmp_path):
    model = make_causal_model("llama")
    path = write_adapter(model, tmp_path / "policy", rank=2, rank_pattern={"q_proj": 9})
    reader = written(path, tmp_path / "kind.gguf", model)
    said = {key: field.contents() for key, field in reader.fields.items()}
    assert said["adapter.lora.alpha"] == 16
    assert {tensor.shape[0] for tensor in reader.tensors if tensor.name.endswith(".lora_b")} == {16}
    assert (said["general.type"], said["adapter.type"], said["general.architecture"]) == ("adapter", "lora", "llama")
    assert said["general.name"] == "kind"


@torch.no_grad()
def test_a_gguf_base_with_the_deltas_added_is_the_adapted_model(make_causal_model, write_adapter, tokenizer, tmp_path):
    model = make_causal_model("llama", vocab_size=262)
    path = write_adapter(model, tmp_path / "policy")
    written(path, tmp_path / "kind.gguf", model)
    lora = tensors_of(tmp_path / "kind.gguf")
    deltas = {name: lora[f"{name}.lora_b"] @ lora[f"{name}.lora_a"] for name in {key.rpartition(".")[0] for key in lora}}
    summed = write_base(model, tokenizer, tmp_path / "summed.gguf", deltas)
    read = load_base(BaseConfig(model=str(summed))).model  # transformers undoes llama.cpp's order
    inputs = tokenizer(["say yes", "no"], return_tensors="pt", padding=True)
    adapted = PeftModel.from_pretrained(deepcopy(model), str(path)).eval()
    torch.testing.assert_close(read(**inputs).logits, adapted(**inputs).logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "name"), [("mistral", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3"), ("gemma3_text", "gemma3")]
)
def test_other_families_have_their_own_order(family, name, make_causal_model, write_adapter, tmp_path):
    model = make_causal_model(family)
    path = write_adapter(model, tmp_path / "policy")
    reader = written(path, tmp_path / "kind.gguf", model)
    found, [a, b] = tensors_of(tmp_path / "kind.gguf"), read_adapter(path).factors["model.layers.1.self_attn.q_proj"]
    delta = found["blk.1.attn_q.weight.lora_b"] @ found["blk.1.attn_q.weight.lora_a"]
    assert reader.fields["general.architecture"].contents() == name
    assert torch.allclose(delta, (a @ b).T, atol=1e-5) == (name != "llama")
    torch.testing.assert_close(delta.sort(0).values, (a @ b).T.sort(0).values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi"])
def test_an_architecture_that_nobody_has_compared_is_refused(family, make_causal_model, write_adapter, tmp_path):
    model = make_causal_model(family)
    path = write_adapter(model, tmp_path / "policy")
    with pytest.raises(UserError, match=f"a GGUF LoRA of a {family} is not known here, only of llama, mistral"):
        written(path, tmp_path / "kind.gguf", model)


def test_the_servers_card_holds_the_scales_of_every_trade_off(make_causal_model, write_adapter, tmp_path):
    model = make_causal_model("llama")
    policies = {name: read_adapter(write_adapter(model, tmp_path / name, seed=len(name))) for name in ("kind", "brief")}
    out, weights = tmp_path / "out", {"kind": 1.5, "brief": -0.25, "base": -0.25}
    out.mkdir()
    front = [{"weights": {"kind": 0.25, "brief": 0.75, "base": 0.0}, "scores": {"kind": 0.5}, "value": 0.5}]
    facts = export_gguf_lora(Exported(policies, weights, "models/base", model.config, "emorl export"), out, out, front)
    assert facts == json.loads((out / SERVER_CARD).read_text())
    assert facts["lora"] == [{"id": 0, "scale": 1.5}, {"id": 1, "scale": -0.25}]
    assert facts["front"][0]["lora"] == [{"id": 0, "scale": 0.25}, {"id": 1, "scale": 0.75}]
    assert facts["command"] == f"cd {out} && llama-server -m base.gguf --lora-scaled kind.gguf:1.5,brief.gguf:-0.25"
    card = (out / "README.md").read_text()
    assert facts["command"] in card
    assert json.dumps({"lora": facts["lora"]}) in card
    assert "convert_hf_to_gguf.py models/base" in card
