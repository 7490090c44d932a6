import math

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset

from emorl.evaluation.scoring import cost_of, evaluate, generate, mean_and_error, score, summarize
from emorl.objectives.loading import Objective
from emorl.policies.prompts import encode

TEXTS = ["hi", "how are you", "x", "a longer prompt than these", "hm"]
PROMPTS = [[{"role": "user", "content": text}] for text in TEXTS]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model(make_causal_model):
    return make_causal_model("llama")


def test_a_batch_equals_batches_of_one(model, tokenizer):
    together = generate(model, tokenizer, PROMPTS, GREEDY)
    for index, prompt in enumerate(PROMPTS):
        alone = generate(model, tokenizer, [prompt], GREEDY)
        assert together["completion"][index] == alone["completion"][0]
        assert together["prompt"][index] == TEXTS[index]


def test_generate_returns_what_the_model_says(model, tokenizer):
    inputs = encode(tokenizer, [PROMPTS[0]])
    ids = model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    table = generate(model, tokenizer, [PROMPTS[0]], GREEDY)
    assert table["completion"][0] == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert table["tokens"][0] == (ids != tokenizer.pad_token_id).sum()


def test_prompts_are_rendered_as_trl_renders_them(tokenizer):
    text = f"<|user|>{TEXTS[1]}<|end|><|assistant|>"
    assert encode(tokenizer, [PROMPTS[1]])["input_ids"].tolist() == [tokenizer(text)["input_ids"]]
    ragged = encode(tokenizer, [PROMPTS[0], PROMPTS[3]])
    assert ragged["attention_mask"][0, 0] == 0
    assert ragged["attention_mask"][:, -1].tolist() == [1, 1]


def test_sampling_is_repeatable_and_leaves_the_callers_random_state(model, tokenizer):
    options = {"max_new_tokens": 6, "do_sample": True}
    torch.manual_seed(5)
    before = torch.rand(1)
    torch.manual_seed(5)
    first = generate(model, tokenizer, PROMPTS, options, samples=3, seed=1)
    assert torch.rand(1) == before
    assert first.equals(generate(model, tokenizer, PROMPTS, options, samples=3, seed=1))
    assert not first.equals(generate(model, tokenizer, PROMPTS, options, samples=3, seed=2))
    assert first[["prompt_index", "sample"]].to_numpy().tolist() == [[i, s] for i in range(5) for s in range(3)]


def test_objectives_see_prompts_completions_and_columns_in_trls_format(model, tokenizer):
    seen = {}

    def reward(prompts, completions, topic, **columns):
        seen.update(prompts=prompts, completions=completions, topic=topic)
        return [float(len(value)) for value in topic]

    data = Dataset.from_dict({"prompt": PROMPTS, "topic": ["a", "bb", "ccc", "dddd", "e"]})
    evaluation = evaluate(model, tokenizer, data, [Objective("topical", reward)], GREEDY, samples=2, batch=3)
    assert evaluation.table["topical"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 1, 1]
    assert seen["prompts"][2] == PROMPTS[1]
    assert seen["completions"][2] == [{"role": "assistant", "content": evaluation.table["completion"][2]}]
    cost = evaluation.cost
    assert (cost.prompts, cost.completions, cost.reward_calls) == (5, 10, 10)
    assert cost.tokens == evaluation.table["tokens"].sum()


def table(**columns):
    rows = {"prompt_index": [0, 0, 1, 1], "sample": [0, 1, 0, 1], "prompt": ["a b", "a b", "d", "d"],
            "completion": ["a b", "c", "a b", "d e f"], "tokens": [1] * 4}  # fmt: skip
    return pd.DataFrame({**rows, **columns})


def test_standard_errors_are_over_prompts_not_samples():
    means, errors = mean_and_error(table(x=[0.0, 1.0, 1.0, 2.0]), ["x"])
    assert means == [1.0]
    assert errors == pytest.approx([0.5])  # prompt means .5 and 1.5: sd .7071 / sqrt(2)


def test_a_summary_by_hand():
    summary = summarize(table(x=[0.0, 1.0, 1.0, 2.0], y=[1.0, 1.0, 3.0, 3.0]), ["x", "y"])
    assert summary["mean"] == 1.5
    assert summary["mean_error"] == pytest.approx(np.std([0.75, 2.25], ddof=1) / math.sqrt(2))
    assert summary["minimum"] == 1.0
    assert summary["distinct_share"] == 0.5
    assert summary["words"] == 2.0
    assert summary["words_deviation"] == pytest.approx(math.sqrt(0.5))
    assert summary["diversity_2"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 2 / 3) / 4)
    assert summary["edit_rate"] == pytest.approx((0 + 1 + 1 + 2 / 3) / 4)
    assert summary["repeated_trigrams"] == 0.0
    assert "perplexity" not in summary


def test_a_summary_has_perplexities_where_the_table_does():
    summary = summarize(table(x=[1.0] * 4, perplexity=[1.0, 2.0, 4.0, 8.0], paper_perplexity=[1.0, 2.0, 4.0, 8.0]), ["x"])
    assert summary["perplexity"] == pytest.approx(2**1.5)
    assert summary["paper_perplexity"] == 3.75


def test_what_cannot_be_scored_is_left_out_of_the_mean():
    scored = score(table().assign(prompt="p"), Dataset.from_dict({"prompt": ["p", "q"]}),
                   [Objective("x", lambda completions, **_: [None, 1.0, 0.0, 0.5])])  # fmt: skip
    assert math.isnan(scored["x"][0])
    assert mean_and_error(scored, ["x"])[0] == [pytest.approx((1.0 + 0.25) / 2)]


def test_cost_counts_prompts_once():
    assert cost_of(table(), 3, 2.0).prompts == 2
    assert cost_of(table(), 3, 2.0).reward_calls == 12
