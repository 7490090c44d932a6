"""A walk through families of bases: one-hot weights are that policy, the trie is `generate()`, or one line says why not."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationMixin, PreTrainedModel

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.teacher import Asked, EnsembleTeacher
from emorl.aggregation.trie import TrieDecoder, plain_greedy
from emorl.policies.adapters import Adapter, read_adapter

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = SMALL | {"intermediate_size": 48}
GROUPED = PLAIN | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 4}
LAYERS = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": HEADS,
    "qwen2": GROUPED | {"use_sliding_window": True, "max_window_layers": 1} | WINDOW,
    "qwen3": HEADS,
    "mistral": HEADS | WINDOW,
    "gemma3_text": HEADS | LAYERS,
    "phi3": GROUPED | WINDOW,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": PLAIN,
    "olmo2": HEADS,
    "olmo3": HEADS | LAYERS,
    "granite": HEADS | {"logits_scaling": 4.0},
    "cohere": HEADS | {"logit_scale": 0.25},
    "cohere2": HEADS | WINDOW | {"logit_scale": 0.25},
    "smollm3": HEADS,
    "stablelm": HEADS,
    "starcoder2": GROUPED | WINDOW,
    "falcon": SMALL,
    "opt": SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 128},
    "qwen3_moe": HEADS | EXPERTS | {"moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen2_moe": GROUPED | EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "mixtral": HEADS | LOCAL | WINDOW,
    "olmoe": HEADS | EXPERTS,
    "granitemoe": HEADS | LOCAL | {"logits_scaling": 4.0},
    "gpt_oss": HEADS | LOCAL | WINDOW,
}
MIXTURES_OF_EXPERTS = ["qwen3_moe", "mixtral", "olmoe", "granitemoe"]
NOTHING = Adapter(Path(), {}, None, None)
WEIGHTS = torch.tensor([[1.0, 0, 0], [0.5, 0.3, 0.2], [0, 0.5, 0.5], [0.1, 0.1, 0.8]])
STEPS = 14
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}


def made(family: str, **settings: Any) -> PreTrainedModel:
    shared = {"vocab_size": 261, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "initializer_range": 0.15}
    config = CONFIG_MAPPING[family](**shared, tie_word_embeddings=False, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def attention_of(base: PreTrainedModel) -> list[str]:
    linear = ("Linear", "Conv1D", "FalconLinear")
    return [name for name, module in base.named_modules() if "att" in name and type(module).__name__ in linear]


@pytest.fixture(scope="module")
def make_policies(write_adapter, tmp_path_factory):
    """A base, three adapters on its attention, and the policies as PEFT loads them; scaled by 2, which rounds nothing."""
    known: dict[str, Any] = {}

    def make(family: str, **settings: Any):
        if family not in known:
            base, folder = made(family, **FAMILIES[family] | settings), tmp_path_factory.mktemp(family)
            options = {"rank": 3, "alpha": 6, "target_modules": attention_of(base)}
            paths = [write_adapter(base, folder / str(seed), seed=seed, **options) for seed in range(3)]
            adapters = {path.name: read_adapter(path) for path in paths}
            known[family] = base, adapters, [PeftModel.from_pretrained(deepcopy(base), str(path)).eval() for path in paths]
        return known[family]

    return make


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """Three prompts of 10, 6 and 3 tokens, padded on the left; longer than a window of 4."""
    ids = torch.randint(5, 261, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for row, padding in ((1, 4), (2, 7)):
        ids[row, :padding], mask[row, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def logits_of(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    mask = inputs["attention_mask"]
    with torch.no_grad():
        found = model(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **options).logits
    return found[mask.bool()]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_weights_are_that_policy_and_the_trie_is_generate(family, make_policies, inputs):
    base, adapters, policies = make_policies(family)
    ensemble, average = HiddenStateEnsemble(base, adapters), ParameterAverage(base, adapters)
    written = []
    for policy, one_hot in zip((0, 2), torch.eye(3)[[0, 2]], strict=True):
        expected, tokens = logits_of(policies[policy], inputs), policies[policy].generate(**inputs, **GREEDY)
        written.append(tokens[:, 10:])
        for mixture in (ensemble, average):
            off = (logits_of(mixture, inputs, weights=one_hot) - expected).abs().max()
            assert off < 4e-7 * expected.abs().max()
            assert torch.equal(mixture.generate(**inputs, **GREEDY, weights=one_hot), tokens)
    assert not torch.equal(*written)  # the policies differ
    found = TrieDecoder(ensemble, **inputs, **plain_greedy(ensemble, GREEDY)).decode(WEIGHTS)
    for weights, tokens in zip(WEIGHTS, found, strict=True):
        alone = ensemble.generate(**inputs, **GREEDY, weights=weights)[:, 10:]
        assert torch.equal(torch.nn.functional.pad(alone, (0, STEPS - alone.shape[1])), tokens)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("gemma2", HEADS, "caps its logits"),
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "forward lacks .'position_ids'"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "forward lacks .*past_key_values"),
    ],
)
def test_bases_that_cannot_be_combined_are_refused_in_one_line(family, settings, message):
    with pytest.raises(ValueError, match=message) as refusal:
        HiddenStateEnsemble(made(family, **settings), {"any": NOTHING})
    assert "\n" not in str(refusal.value)


HYBRIDS = {
    "qwen3_next": {
        **HEADS,
        **EXPERTS,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "lfm2": HEADS | {"layer_types": ["conv", "full_attention"]},
    "jamba": GROUPED | {"num_experts": 2, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1},
}


@pytest.mark.parametrize("family", HYBRIDS)
def test_layers_that_keep_a_state_are_written_by_generate_and_refused_by_the_trie(family, inputs, write_adapter, tmp_path):
    base = made(family, **HYBRIDS[family])
    path = write_adapter(base, tmp_path / "0", rank=3, target_modules=["q_proj", "v_proj"])
    ensemble = HiddenStateEnsemble(base, {"0": read_adapter(path), "1": NOTHING})
    policy = PeftModel.from_pretrained(deepcopy(base), str(path)).eval()
    assert torch.equal(ensemble.generate(**inputs, **GREEDY, weights=[1.0, 0.0]), policy.generate(**inputs, **GREEDY))
    assert plain_greedy(ensemble, GREEDY) is None  # a search then calls generate()
    with pytest.raises(ValueError, match="layers that keep a state instead of keys and values"):
        TrieDecoder(ensemble, **inputs, max_new_tokens=2)


# How a capability may be named in transformers; what is about the ensemble itself, and its own, is answered by itself.
ASKED = ("_supports", "supports_", "_can_", "_is_", "_compatible", "is_backend")
ITS_OWN = {"_is_overridden", "_supports_mm_encoder_outputs", "supports_tp_plan", "supports_pp_plan"}


@pytest.mark.parametrize("mixture", [HiddenStateEnsemble, ParameterAverage])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "falcon"])
def test_every_capability_that_transformers_asks_for_is_answered_as_by_the_base(family, mixture, make_policies):
    base, adapters, _ = make_policies(family)
    ensemble, walked = mixture(base, adapters), set()
    for name in {*dir(PreTrainedModel), *dir(GenerationMixin)}:
        if name.startswith(ASKED) and name not in ITS_OWN:
            of_base, own = getattr(base, name), getattr(ensemble, name)
            assert (own() if callable(own) else own) == (of_base() if callable(of_base) else of_base), name
            walked.add(name)
    assert walked >= {"_can_set_experts_implementation", "_supports_sdpa", "_is_stateful", "_can_compile_fullgraph"}
    assert ensemble._can_set_experts_implementation() == ("moe" in family or family == "gpt_oss")


@pytest.mark.parametrize("family", MIXTURES_OF_EXPERTS)
def test_router_outputs_are_those_of_each_policy(family, make_policies, inputs):
    base, adapters, policies = make_policies(family)
    options = {**inputs, "output_router_logits": True}
    with torch.no_grad():
        found = HiddenStateEnsemble(base, adapters)(**options).router_logits
        for policy, model in enumerate(policies):
            for mixed, own in zip(found, model(**options).router_logits, strict=True):
                by_row = mixed.view(3, 3, 10, 4)[:, policy]  # (B, T, experts)
                seen = inputs["attention_mask"].bool()
                torch.testing.assert_close(by_row[seen], own.view(3, 10, 4)[seen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_the_experts_implementation_can_be_set_through_the_ensemble(implementation, make_policies, inputs):
    base, adapters, policies = make_policies("qwen3_moe")
    ensemble = HiddenStateEnsemble(base, adapters)
    ensemble.set_experts_implementation(implementation)
    assert ensemble.policies.config._experts_implementation == implementation
    expected = policies[1].generate(**inputs, **GREEDY)
    assert torch.equal(ensemble.generate(**inputs, **GREEDY, weights=[0, 1, 0]), expected)


@pytest.mark.parametrize("mixture", [HiddenStateEnsemble, ParameterAverage])
@pytest.mark.parametrize("beams", [1, 2])
def test_guidance_asks_again_with_the_same_weights(mixture, beams, make_policies, inputs):
    base, adapters, policies = make_policies("llama")
    base = deepcopy(base)
    base.generation_config.guidance_scale = 1.7
    ensemble, options = mixture(base, adapters), GREEDY | {"num_beams": beams}
    for policy in (0, 2):
        expected = policies[policy].generate(**inputs, **options, guidance_scale=1.7)
        assert torch.equal(ensemble.generate(**inputs, **options, weights=torch.eye(3)[policy]), expected)
        assert not torch.equal(policies[policy].generate(**inputs, **options), expected)
    assert plain_greedy(ensemble, GREEDY) is None


def test_weights_that_do_not_sum_to_1_are_said_once(make_policies, inputs, caplog):
    base, adapters, _ = make_policies("llama")
    ensemble = HiddenStateEnsemble(base, adapters)
    expected = ensemble.generate(**inputs, **GREEDY, weights={"0": 0.5, "2": 0.5})
    assert "weights sum" not in caplog.text
    for _ in range(2):
        assert torch.equal(ensemble.generate(**inputs, **GREEDY, weights={"0": 0.8, "2": 0.8}), expected)
    assert caplog.text.count("weights sum to 1.6, not 1") == 1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_ensemble_read_as_a_teacher_says_what_the_ensemble_says(family, make_policies, inputs):
    """Backbone, head and TRL's scale against the ensemble's own forward; other weights in each row."""
    base, adapters, _ = make_policies(family)
    ensemble = HiddenStateEnsemble(base, adapters)
    teacher, weights, mask = EnsembleTeacher(ensemble), WEIGHTS[1:], inputs["attention_mask"]
    asked = Asked(inputs["input_ids"][:, :8], mask[:, :8], weights, new_tokens=2)
    strange = torch.cat([torch.full((3, 5), 7), inputs["input_ids"][:, 8:]], 1)  # what a student was asked
    with teacher.asked(asked):
        hidden = teacher.base_model(strange, torch.ones_like(strange)).last_hidden_state
    config, head = base.config, teacher.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    seen = scale * torch.nn.functional.linear(hidden, head.weight, head.bias)
    off = seen[mask.bool()].log_softmax(-1) - logits_of(ensemble, inputs, weights=weights).log_softmax(-1)
    assert off.abs().max() < 1e-5
    assert teacher.config.vocab_size == len(head.weight)
