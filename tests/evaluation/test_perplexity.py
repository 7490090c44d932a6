import math

import pandas as pd
import pytest
import torch

from emorl.config import UserError
from emorl.evaluation.perplexity import load_language_model, mean_perplexities, with_perplexity

PROMPTS = ["hi", "how are you", "how are you"]
COMPLETIONS = ["fine", "a longer answer than that", ""]


@pytest.fixture(scope="module")
def language_model(tiny_base_dir):
    return load_language_model(str(tiny_base_dir))


@pytest.fixture(scope="module")
def table(language_model):
    return with_perplexity(pd.DataFrame({"prompt": PROMPTS, "completion": COMPLETIONS}), language_model, 2)


def test_the_papers_perplexity_is_the_loss_over_prompt_and_completion(table, make_causal_model, tokenizer):
    model = make_causal_model("llama")
    for prompt, completion, perplexity in zip(PROMPTS, COMPLETIONS, table["paper_perplexity"], strict=True):
        ids = torch.tensor([tokenizer(prompt + completion)["input_ids"]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss
        assert perplexity == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexity_is_of_the_completion_and_its_end_given_the_prompt(table, make_causal_model, tokenizer):
    before = tokenizer("<|user|>hi<|end|><|assistant|>")["input_ids"]
    after = tokenizer("fine<|end|>")["input_ids"]
    with torch.no_grad():
        logs = make_causal_model("llama")(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
    nll = -sum(logs[len(before) + place - 1, token].item() for place, token in enumerate(after)) / len(after)
    assert table["perplexity"][0] == pytest.approx(math.exp(nll), rel=1e-4)


def test_a_batch_equals_batches_of_one(table, language_model):
    alone = with_perplexity(table[["prompt", "completion"]], language_model, 1)
    pd.testing.assert_frame_equal(table, alone, rtol=1e-4)


def test_an_empty_completion_has_no_perplexity_and_is_left_out_of_the_mean(table):
    assert math.isnan(table["perplexity"][2])
    assert mean_perplexities(table)["perplexity"] == pytest.approx(math.sqrt(table["perplexity"][0] * table["perplexity"][1]))
    assert mean_perplexities(table)["paper_perplexity"] == pytest.approx(table["paper_perplexity"].mean())
    assert mean_perplexities(table[["prompt"]]) == {}


def test_a_missing_language_model_is_named():
    with pytest.raises(UserError, match=r"evaluate\.perplexity_model '\./nowhere'"):
        load_language_model("./nowhere")
