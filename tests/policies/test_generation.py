"""Settings of decoding that are let through give one text for a prompt, wherever policies decode."""

import numpy as np
import pytest
import torch
from datasets import Dataset

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError
from emorl.config.experiment import SearchConfig
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import generate
from emorl.objectives.loading import Objective
from emorl.objectives.scalarize import Value
from emorl.policies.adapters import read_adapter
from emorl.policies.generation import check_generation
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.weight_evaluation import WeightEvaluator

LET_THROUGH = [
    {},
    {"stop_strings": ["."]},
    {"stop_strings": "e"},
    {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
    {"do_sample": True, "min_p": 0.1, "typical_p": 0.9},
    {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    {"num_beams": 3},
    {"num_beams": 2, "length_penalty": 0.5, "early_stopping": True},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"bad_words_ids": [[7], [8, 9]], "suppress_tokens": [10, 11], "begin_suppress_tokens": [12]},
    {"min_new_tokens": 3},
    {"forced_eos_token_id": 1},
    {"eos_token_id": [1, 30]},
    {"exponential_decay_length_penalty": [2, 1.5]},
    {"sequence_bias": [[[7], -5.0]]},
    {"renormalize_logits": True, "remove_invalid_values": True},
    {"use_cache": False},
    {"cache_implementation": "dynamic"},
    {"max_time": 100.0},
]
REFUSED = [
    ({"max_new_token": 3}, "unknown setting 'max_new_token'; did you mean 'max_new_tokens'"),
    ({"max_new_tokens": -3}, "generation: "),
    ({"max_new_tokens": 0}, "generation: "),
    ({"max_new_tokens": "many"}, "generation.max_new_tokens: expected a whole number"),
    ({"max_new_tokens": 2.5}, "generation.max_new_tokens: expected a whole number"),
    ({"do_sample": True, "temperature": -1}, "generation: .*strictly positive"),
    ({"do_sample": True, "temperature": 0}, "generation: .*strictly positive"),
    ({"do_sample": True, "temperature": "hot"}, "generation: "),
    ({"num_beams": 0}, "generation: "),
    ({"num_beams": -2}, "generation: "),
    ({"do_sample": True, "top_p": 2}, "generation.top_p: expected a share"),
    ({"do_sample": True, "top_p": 0}, "generation.top_p: expected a share"),
    ({"do_sample": True, "top_k": -1}, "generation: "),
    ({"do_sample": True, "min_p": 7}, "generation: "),
    ({"repetition_penalty": 0.0}, "generation: "),
    ({"repetition_penalty": "strong"}, "generation: "),
    ({"num_return_sequences": 2, "num_beams": 2}, "give no single text"),
    ({"return_dict_in_generate": True}, "give no single text"),
    ({"cache_implementation": "paper"}, "generation: "),
    ({"bad_words_ids": [7]}, "generation: "),
    ({"suppress_tokens": "all"}, "generation: "),
    ({"penalty_alpha": 0.6, "top_k": 4}, "generation: "),
]


@pytest.fixture(scope="module")
def ensemble(make_causal_model, write_adapter, tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("adapters"), make_causal_model("llama")
    adapters = {
        name: read_adapter(write_adapter(make_causal_model("llama"), folder / name, seed=seed))
        for seed, name in enumerate("ab")
    }
    return HiddenStateEnsemble(model, adapters, [0.5, 0.5])


@pytest.mark.parametrize("settings", LET_THROUGH, ids=str)
def test_what_is_let_through_gives_one_text_for_each_prompt_in_evaluation_and_search(ensemble, tokenizer, settings):
    generation = {"max_new_tokens": 5, **settings}
    check_generation(generation)
    prompts = [[{"role": "user", "content": text}] for text in ("say 1", "say something longer")]
    table = generate(ensemble, tokenizer, prompts, generation)
    assert len(table) == 2
    objective = Objective("length", lambda prompts, completions, **columns: [len(c[0]["content"]) for c in completions])
    space = WeightSpace(("a", "b"))
    with ScoreMemo(None) as memo:
        evaluator = WeightEvaluator(
            ensemble, tokenizer, Dataset.from_dict({"prompt": prompts}), [objective], space, SearchConfig(),
            generation=generation, seed=0, value=Value("mean", np.ones(1)), memo=memo,
        )  # fmt: skip
        [scored] = evaluator([{"a": 0.5, "b": 0.5}])
    if not generation.get("do_sample"):
        texts = table["completion"]
        assert scored.scores[0] == pytest.approx(texts.str.len().mean())


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=str)
def test_what_no_decoder_could_use_is_one_line(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        check_generation(settings)
    assert "\n" not in str(caught.value)


def test_a_check_leaves_the_random_numbers_as_they_were():
    before = torch.random.get_rng_state()
    check_generation({"do_sample": True, "temperature": 0.31})
    assert torch.equal(before, torch.random.get_rng_state())
