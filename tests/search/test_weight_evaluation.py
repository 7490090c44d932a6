"""Evaluating weights: the trie, generate() and a race agree, and nothing is scored or decoded twice."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.trie import plain_greedy
from emorl.config import UserError
from emorl.config.experiment import SearchConfig
from emorl.evaluation.memo import ScoreMemo
from emorl.evaluation.scoring import evaluate
from emorl.objectives.loading import Objective
from emorl.objectives.scalarize import scalarize
from emorl.policies.adapters import read_adapter
from emorl.search.spaces.weight_space import WeightSpace
from emorl.search.study import Finished
from emorl.search.weight_evaluation import WeightEvaluator

PROMPTS = [
    [{"role": "user", "content": text}] for text in ("hi", "how are you", "x", "a longer prompt", "hm", "so", "q", "you")
]
DATA = Dataset.from_dict({"prompt": PROMPTS})
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": 1}
SPACE = WeightSpace(("a", "b", "c"))


def share_of(characters):
    def function(prompts, completions, **columns):
        texts = [completion[0]["content"] for completion in completions]
        return [sum(map(text.count, characters)) / max(1, len(text)) for text in texts]

    return function


@pytest.fixture(scope="module")
def parts(make_causal_model, write_adapter, tokenizer, tmp_path_factory):
    base, directory = make_causal_model("llama"), tmp_path_factory.mktemp("policies")
    adapters = {name: read_adapter(write_adapter(base, directory / name, seed=seed)) for seed, name in enumerate("abc")}
    return HiddenStateEnsemble(base, adapters), tokenizer


def mean(scores):
    return scores.mean(-1)


def chebyshev(scores):
    flat = scores.reshape(-1, scores.shape[-1])
    return scalarize(flat, "chebyshev", np.array([0.5, 0.5]), flat).reshape(scores.shape[:-1])


def make(parts, generation=GREEDY, memo=None, objectives=None, value=mean, **search):
    ensemble, tokenizer = parts
    objectives = objectives or [Objective("low", share_of("abcdefgh")), Objective("high", share_of("\\]^_`{|}~"))]
    return WeightEvaluator(
        ensemble,
        tokenizer,
        DATA,
        objectives,
        SPACE,
        SearchConfig(**search),
        generation=generation,
        seed=0,
        value=value,
        memo=memo or ScoreMemo(None),
    )


def candidates(count, seed=0):
    weights = np.random.default_rng(seed).dirichlet(np.ones(3), count)
    return [*SPACE.corners(), *(dict(zip("abc", row.tolist(), strict=True)) for row in weights)]


def without_time(scored):
    """What does not depend on the clock or on what was scored before."""
    unstable = {"seconds": 0.0, "reward_calls": 0}
    return [replace(one, notes={**one.notes, "cost": {**one.notes["cost"], **unstable}}) for one in scored]


def test_the_trie_gives_the_scores_of_generate(parts):
    by_trie = make(parts)(candidates(6))
    by_generate = make(parts, {**GREEDY, "stop_strings": None, "cache_implementation": "dynamic"})(candidates(6))
    assert without_time(by_trie) == without_time(by_generate)
    assert len({one.scores for one in by_trie}) > 3


def test_one_batch_equals_many(parts):
    evaluator, whole = make(parts), make(parts)(candidates(5))
    one_by_one = [evaluator([candidate])[0] for candidate in candidates(5)]
    assert without_time(one_by_one) == without_time(whole)


def test_sampled_candidates_share_their_random_numbers(parts):
    sampling = {"max_new_tokens": 6, "do_sample": True}
    evaluator = make(parts, sampling, samples=3)
    first, second = evaluator([{"a": 0.5, "b": 0.5, "c": 0.0}] * 2)
    assert first.scores == second.scores
    assert first.notes["cost"]["completions"] == 3 * len(PROMPTS)
    assert make(parts, sampling, samples=3)([{"a": 0.5, "b": 0.5, "c": 0.0}])[0].scores == first.scores


def test_texts_are_scored_once_in_the_whole_search(parts, tmp_path):
    asked = []

    def function(prompts, completions, **columns):
        asked.extend((p[0]["content"], c[0]["content"]) for p, c in zip(prompts, completions, strict=True))
        return share_of("abc")(prompts, completions)

    for seed in (0, 1, 0):
        with ScoreMemo(tmp_path / "scores.sqlite") as memo:
            make(parts, memo=memo, objectives=[Objective("only", function)])(candidates(6, seed))
    assert len(asked) == len(set(asked)) < 3 * 10 * len(PROMPTS)


def test_a_race_gives_up_what_is_clearly_worse_and_keeps_the_scores_of_the_rest(parts):
    def by_text(prompts, completions, **columns):
        return [0.0 if "e" in completion[0]["content"] else 1.0 for completion in completions]

    objectives = [Objective("only", by_text)]
    whole = make(parts, objectives=objectives)(candidates(20))
    raced = make(parts, objectives=objectives, race=0.6, race_prompts=4)(candidates(20))
    best = max(one.scores for one in whole)
    seen = [one.notes["cost"]["prompts"] for one in raced]
    assert set(seen) <= {4, 8}
    for full, one in zip(whole, raced, strict=True):
        if one.notes["cost"]["prompts"] == len(PROMPTS):
            assert one.scores == full.scores
            assert len(one.notes["by_prompt"]) == len(PROMPTS)
        else:
            assert full.scores < best


@pytest.mark.parametrize("value", [mean, chebyshev])
def test_a_race_knows_the_best_of_former_runs(value, parts):
    evaluator = make(parts, value=value, race=0.9, race_prompts=4)
    poor = [[index / 100, -index / 100] for index in range(len(PROMPTS))]
    excellent = [[10.0 + index, 10.0 - index] for index in range(len(PROMPTS))]
    evaluator.remember(
        [Finished(0, {}, (0.0, 0.0), {"by_prompt": poor}), Finished(1, {}, (10.0, 10.0), {"by_prompt": excellent})]
    )
    assert [one.notes["cost"]["prompts"] for one in evaluator(candidates(2))] == [4] * 6


def test_an_objective_without_any_score_ends_the_search(parts):
    nothing = Objective("nothing", lambda prompts, completions, **columns: [None] * len(prompts))
    with pytest.raises(UserError, match="objective 'nothing' returned None for every one of 8 prompts"):
        make(parts, objectives=[nothing])(candidates(1))


def test_too_little_memory_is_said_before_decoding(parts):
    with pytest.raises(UserError, match=r"search.memory: .* bytes of memory do not hold these prompts; expected at least"):
        make(parts, memory=1e-6)


@pytest.mark.parametrize(
    ("generation", "greedy"),
    [
        ({"max_new_tokens": 5}, True),
        ({"max_new_tokens": 5, "do_sample": False, "eos_token_id": [1, 2]}, True),
        ({"max_new_tokens": 5, "do_sample": True}, False),
        ({"max_new_tokens": 5, "num_beams": 2}, False),
        ({"max_new_tokens": 5, "repetition_penalty": 1.2}, False),
        ({"max_new_tokens": 5, "min_new_tokens": 2}, False),
        ({"max_new_tokens": 5, "stop_strings": ["a"]}, False),
        ({}, False),
    ],
)
def test_only_plain_greedy_decoding_goes_through_the_trie(parts, generation, greedy):
    found = plain_greedy(parts[0], generation)
    assert (found is not None) == greedy
    if found is not None:
        assert found["max_new_tokens"] == 5
        assert found["eos_token_id"] == generation.get("eos_token_id", [1])


def test_parameter_averages_are_decoded_together_as_each_alone(make_causal_model, write_adapter, tokenizer, tmp_path):
    base = make_causal_model("llama")
    adapters = {name: read_adapter(write_adapter(base, tmp_path / name, seed=seed)) for seed, name in enumerate("abc")}
    parts = ParameterAverage(base, adapters), tokenizer
    some = candidates(5)
    together = without_time(make(parts)(some))
    alone = without_time([scored for one in some for scored in make(parts)([one])])
    assert np.allclose([one.scores for one in together], [one.scores for one in alone])
    assert together != without_time(make((HiddenStateEnsemble(base, adapters), parts[1]))(some))


@torch.no_grad()
def test_a_bart_is_searched_through_generate(write_adapter, tokenizer, tmp_path):
    """Its bias behind the head and its absolute positions are nothing for the trie."""
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.3}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "decoder_start_token_id": 1}
    base = BartForConditionalGeneration(BartConfig(vocab_size=261, max_position_embeddings=256, **sizes, **special)).eval()
    base.generation_config = GenerationConfig(**special)
    lora = {"target_modules": ["q_proj", "v_proj"], "task_type": "SEQ_2_SEQ_LM"}
    adapters = {name: read_adapter(write_adapter(base, tmp_path / name, seed=seed, **lora)) for seed, name in enumerate("abc")}
    ensemble = HiddenStateEnsemble(base, adapters)
    assert plain_greedy(ensemble, GREEDY) is None
    scored = make((ensemble, tokenizer))(SPACE.corners())
    alone = PeftModel.from_pretrained(base, str(tmp_path / "b")).eval()
    table = evaluate(alone, tokenizer, DATA, [Objective("low", share_of("abcdefgh"))], GREEDY).table
    assert scored[1].scores[0] == pytest.approx(table["low"].mean())
