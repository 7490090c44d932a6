"""Generation settings that a base brings along: obeyed by both engines as by `generate()`, refused, or said."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.engines.union import UnionEngine
from emorl.policies.adapters import read_adapter
from emorl.policies.prompts import encode

PROMPTS = ["Hello there", "How are you, my friend?", "aaaa", "Tell me a story about the sea and the wind"]
STEPS = 20
LETTERS = list(range(60, 100))  # ids of characters
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition_penalty": {"repetition_penalty": 2.5},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": LETTERS},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(20, 250))},
    "forced_eos_token_id": {"forced_eos_token_id": 1},
    "min_new_tokens": {"min_new_tokens": 15, "eos_token_id": [1, *range(70, 200)]},
    "min_length": {"min_length": 18, "eos_token_id": [1, *range(70, 200)]},
    "bad_words_ids": {"bad_words_ids": [[token] for token in LETTERS]},
    "sequence_bias": {"sequence_bias": [[[65], 40.0]]},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [3, 1.5]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "all": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": LETTERS, "min_new_tokens": 9},
}
SPECIAL = [0, 2, 3, 4]  # which the union engine never writes


@pytest.fixture(scope="module")
def plain(tokenizer):
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    return plain


def with_settings(model: Any, settings: dict[str, Any]) -> Any:
    model.generation_config.update(**settings)
    return model


@pytest.fixture
def make_ensemble(make_causal_model, make_seq2seq_model, write_adapter, tmp_path):
    def make(settings: dict[str, Any], kind: str = "decoder") -> HiddenStateEnsemble:
        base = make_seq2seq_model() if kind == "encoder-decoder" else make_causal_model()
        options = {"target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"} if kind == "encoder-decoder" else {}
        paths = {name: write_adapter(base, tmp_path / name, seed=seed, **options) for seed, name in enumerate("ab")}
        adapters = {name: read_adapter(path) for name, path in paths.items()}
        return HiddenStateEnsemble(with_settings(base, settings), adapters)

    return make


def tokens_of(ensemble: Any, tokenizer: Any, prompts: list[str], weights: Any) -> list[list[int]]:
    inputs = encode(tokenizer, prompts)
    before = 1 if ensemble.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    found = ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, weights=weights)[:, before:]
    return torch.nn.functional.pad(found, (0, STEPS - found.shape[1])).tolist()


@pytest.mark.parametrize("kind", ["decoder", "encoder-decoder"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_stacked_engine_obeys_the_settings_of_its_base(setting, kind, make_ensemble, plain):
    ensemble = make_ensemble(SETTINGS[setting], kind)
    tokenizer = deepcopy(plain)
    tokenizer.padding_side = "right" if kind == "encoder-decoder" else "left"
    engine, weights = StackedEngine(ensemble, tokenizer), torch.tensor([[1.0, 0.0], [0.4, 0.6], [0.0, 1.0], [0.5, 0.5]])
    writing = engine.begin(PROMPTS, Decoding(max_new_tokens=STEPS))
    for _ in range(STEPS):
        writing.write(weights, 3)
    expected = tokens_of(ensemble, tokenizer, PROMPTS, weights)
    assert writing._written.tolist() == expected
    if kind == "decoder":  # the setting changes something
        assert tokens_of(make_ensemble({}), tokenizer, PROMPTS, weights) != expected


@pytest.mark.parametrize("setting", SETTINGS)
def test_models_in_the_union_engine_obey_their_own_settings(setting, make_causal_model, plain):
    settings = deepcopy(SETTINGS[setting])
    model = make_causal_model("llama", 3)
    if "eos_token_id" in settings:  # several are one string here; one that the model would write early
        settings["eos_token_id"] = int(model.generate(**encode(plain, PROMPTS[:1]), max_new_tokens=3, do_sample=False)[0, -1])
    with_settings(model, settings)
    other = make_causal_model("gpt2", 1)
    engine = UnionEngine([model, other], [plain, plain], names=["a", "b"], vocabulary="full")
    writing = engine.begin(PROMPTS, Decoding(max_new_tokens=STEPS))
    for _ in range(STEPS):
        writing.write(torch.tensor([[1.0, 0.0]]).expand(4, -1), 7)
    spelling = engine.union.spellings[0].token_bytes
    for row, prompt in enumerate(PROMPTS):
        inputs = encode(plain, [prompt])
        suppressed = [*settings.get("suppress_tokens", []), *SPECIAL]
        found = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=suppressed)
        ids = found[0, inputs["input_ids"].shape[1] :].tolist()
        ended = ids[-1] == settings.get("eos_token_id", 1)
        assert bytes(writing._data[row]) == b"".join(spelling[id_] or b"" for id_ in (ids[:-1] if ended else ids))
        assert writing.tokens[row] == len(ids)


def test_top_k_of_the_base_is_obeyed_and_its_other_sampling_is_said(make_ensemble, make_causal_model, plain, caplog):
    settings = {"do_sample": True, "top_k": 1, "min_p": 0.2, "temperature": 0.6}
    ensemble = make_ensemble(settings)
    greedy = tokens_of(ensemble, plain, PROMPTS, [0.5, 0.5])
    writing = StackedEngine(ensemble, plain).begin(PROMPTS, Decoding(STEPS, temperature=1.0))
    writing.write(torch.full((4, 2), 0.5), STEPS)
    assert writing._written.tolist() == greedy
    assert "the base asks for {'temperature': 0.6, 'min_p': 0.2}" in caplog.text
    caplog.clear()
    model = with_settings(make_causal_model(), settings)
    union = UnionEngine([model], [plain], names=["mine"])
    sampled, certain = (union.begin(PROMPTS, Decoding(STEPS, temperature=heat)) for heat in (1.0, 0.0))
    for each in (sampled, certain):
        each.write(torch.ones(4, 1), STEPS)
    assert sampled.texts == certain.texts
    assert caplog.text.count("model 'mine' asks for {'temperature': 0.6, 'min_p': 0.2}") == 1  # not where it is greedy


def test_guidance_is_refused_and_beams_are_said_in_one_line(make_ensemble, make_causal_model, plain, caplog):
    with pytest.raises(ValueError, match=r"the base has guidance_scale=1\.5 in its generation_config, .* null") as refusal:
        StackedEngine(make_ensemble({"guidance_scale": 1.5}), plain)
    assert "\n" not in str(refusal.value)
    with pytest.raises(ValueError, match="model 'mine' has guidance_scale=3"):
        UnionEngine([with_settings(make_causal_model(), {"guidance_scale": 3})], [plain], names=["mine"])
    UnionEngine([with_settings(make_causal_model(), {"num_beams": 4})], [plain], names=["mine"])
    assert "model 'mine' asks for beam_search" in caplog.text
