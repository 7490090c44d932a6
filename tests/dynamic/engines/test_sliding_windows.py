"""Bases whose layers see a window of 4 tokens, written far beyond it: as `generate()` does, in both engines."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.engines.union import VOCABULARIES, UnionEngine
from emorl.policies.adapters import read_adapter
from emorl.policies.prompts import encode

PROMPTS = ["Hello there", "How are you, my friend?", "ö", "Tell me a story about the sea and the wind"]
STEPS = 24
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
}


@pytest.fixture(scope="module")
def plain(tokenizer):
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    return plain


@pytest.fixture(scope="module")
def make_window(make_causal_model):
    """A model with a window of 4."""

    def make(family: str, seed: int = 0, **settings: Any) -> Any:
        return make_causal_model(family, seed, **WINDOWS[family] | {"initializer_range": 0.3} | settings)

    return make


def written(engine: Any, prompts: list[str], schedule: list[tuple[Any, int]], **decoding: Any) -> Any:
    """The last entry of the schedule, (weights (K,) or (B, K), span), is repeated to the end."""
    writing = engine.begin(prompts, Decoding(**{"max_new_tokens": STEPS} | decoding))
    for weights, span in [*schedule, *[schedule[-1]] * STEPS]:
        writing.write(torch.tensor(weights).expand(len(prompts), -1), span)
    assert writing.finished.all()
    return writing


def generated(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[str]:
    """What `generate()` writes without special tokens but the end, which the union engine knows only."""
    inputs = encode(tokenizer, prompts)
    found = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, suppress_tokens=[0, 2, 3, 4], **options)
    texts = tokenizer.batch_decode(found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.replace("\ufffd", "").strip() for text in texts]  # the engine leaves incomplete characters out


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("family", WINDOWS)
def test_one_model_in_the_union_engine_writes_as_generate_does_past_its_window(family, vocabulary, make_window, plain):
    model = make_window(family)
    engine = UnionEngine([model, make_window(family, 1)], [plain, plain], names=["a", "b"], vocabulary=vocabulary)
    expected = generated(model, plain, PROMPTS)
    for start in ([1.0, 0.0], [[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]):
        found = written(engine, PROMPTS, [(start, 1), ([1.0, 0.0], 5)]).texts
        assert found[0] == expected[0]
        assert found[3] == expected[3]
    assert found[1] != expected[1]  # others wrote its first token
    wide = make_window(family, sliding_window=512)
    wide.load_state_dict(model.state_dict())
    assert generated(wide, plain, PROMPTS) != expected  # the window counts


@pytest.mark.parametrize("family", WINDOWS)
def test_texts_in_the_union_engine_do_not_depend_on_their_batch(family, make_window, plain, words):
    """Two tokenizers: strings of one are spelled by the other, and read again where their tokens change."""
    models = [make_window(family), make_window(family, 2, vocab_size=len(words))]
    engine = UnionEngine(models, [plain, words], names=["a", "b"])
    rows = [[0.5, 0.5], [0.0, 1.0], [1.0, 0.0], [0.3, 0.7]]
    schedule = [(rows, 3), (rows[::-1], 4), (rows, 2)]
    together = written(engine, PROMPTS, schedule)
    for row, prompt in enumerate(PROMPTS):
        alone = written(engine, [prompt], [([weights[row]], span) for weights, span in schedule])
        assert bytes(alone._data[0]) == bytes(together._data[row])
        for reader in alone._readers:  # what is kept of the caches says what reading all anew does
            ids = torch.tensor([reader.transcripts[0].ids[: reader.transcripts[0].read]])
            with torch.no_grad():
                fresh = reader._model(ids).logits[0, -1]
            torch.testing.assert_close(reader.logits[0], fresh, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", WINDOWS)
def test_policies_in_the_stacked_engine_write_as_generate_does_past_the_window(
    family, make_window, plain, write_adapter, tmp_path
):
    base = make_window(family)
    adapters = {name: read_adapter(write_adapter(base, tmp_path / name, seed=seed)) for seed, name in enumerate("ab")}
    ensemble = HiddenStateEnsemble(base, adapters)
    engine = StackedEngine(ensemble, plain)
    for weights in ([1.0, 0.0], [0.4, 0.6]):
        inputs = encode(plain, PROMPTS)
        tokens = ensemble.generate(**inputs, max_new_tokens=STEPS, do_sample=False, weights=weights)
        expected = plain.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert written(engine, PROMPTS, [(weights, 5)]).texts == [text.strip() for text in expected]
    away = written(engine, PROMPTS, [([1.0, 0.0], 9), ([0.0, 1.0], 3), ([0.5, 0.5], 4)])  # policies catch up
    alone = [written(engine, [prompt], [([1.0, 0.0], 9), ([0.0, 1.0], 3), ([0.5, 0.5], 4)]).texts[0] for prompt in PROMPTS]
    assert away.texts == alone


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama4_text", {"intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8}),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
)
def test_chunks_and_states_are_refused_in_one_line(family, settings, plain):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING[family](**sizes, num_key_value_heads=2, vocab_size=261, **settings)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="keep a state or see tokens in chunks; expected full or sliding-window attention"):
        UnionEngine([model], [plain], names=["other"])
