"""Objectives that run a model, on random tiny models saved and loaded as any hub id would be."""

import math

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from emorl.objectives.classifier import Classifier
from emorl.objectives.likelihood import Likelihood


@pytest.fixture(scope="module")
def save_classifier(tmp_path_factory, tokenizer):
    def save(labels):
        directory = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}, pad_token_id=0,
            initializer_range=0.5,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return str(directory)

    return save


PROMPTS = ["I am sad.", "My job is lost and I do not sleep.", "I am sad.", "Hm."]
TEXTS = ["You are sad.", "It is hard.", "You are sad.", "A much longer answer, with many words in it."]


def test_a_single_logit_is_a_sigmoid_of_the_pair(save_classifier, tokenizer):
    path = save_classifier(["quality"])
    model = BertForSequenceClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = [model(**tokenizer(p, t, return_tensors="pt")).logits.sigmoid().item() for p, t in zip(PROMPTS, TEXTS)]  # noqa: B905
    assert Classifier(path, batch_size=3)(PROMPTS, TEXTS) == pytest.approx(expected, abs=1e-6)


def test_a_labels_probability_and_its_complement(save_classifier):
    path = save_classifier(["cold", "warm"])
    warm = Classifier(path, label="warm")(PROMPTS, TEXTS)
    cold = Classifier(path, label="cold")(PROMPTS, TEXTS)
    assert [a + b for a, b in zip(warm, cold, strict=True)] == pytest.approx([1.0] * 4)
    assert len(set(warm)) == 3


def test_without_the_prompt_only_the_completion_matters(save_classifier):
    path = save_classifier(["quality"])
    alone = Classifier(path, with_prompt=False)
    assert alone(["a", "b"], ["same", "same"])[0] == alone(["a", "b"], ["same", "same"])[1]
    pair = Classifier(path)
    assert pair(["a", "b"], ["same", "same"])[0] != pair(["a", "b"], ["same", "same"])[1]


def test_a_label_must_be_named_and_exist(save_classifier):
    path = save_classifier(["cold", "warm"])
    with pytest.raises(ValueError, match="has the labels cold, warm; say which"):
        Classifier(path)
    with pytest.raises(ValueError, match="has no label 'warmth'; did you mean 'warm'"):
        Classifier(path, label="warmth")


def test_likelihood_equals_the_models_own_loss_in_batches_of_any_size(tiny_base_dir, make_causal_model, tokenizer):
    model = make_causal_model("llama")
    expected = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        before = f"<|user|>{prompt}<|end|><|assistant|>"
        ids = tokenizer(f"{before}{text}<|end|>", return_tensors="pt")["input_ids"]
        labels = ids.clone()
        labels[:, : len(tokenizer(before)["input_ids"])] = -100
        with torch.no_grad():
            expected.append(model(input_ids=ids, labels=labels).loss.item())
    pairs = list(zip(PROMPTS, TEXTS, strict=True))
    assert Likelihood(str(tiny_base_dir)).negative_log_likelihoods(pairs) == pytest.approx(expected, abs=1e-5)
    inverse = Likelihood(str(tiny_base_dir), scale="inverse", temperature=2.0, batch_size=3)
    assert inverse(PROMPTS, TEXTS) == pytest.approx([math.exp(-nll / 2) for nll in expected], abs=1e-5)
    linear = Likelihood(str(tiny_base_dir), ceiling=10_000.0)
    assert linear(PROMPTS, TEXTS) == pytest.approx([max(0, 1 - math.exp(nll) / 10_000) for nll in expected], abs=1e-5)


def test_an_empty_completion_is_not_fluent(tiny_base_dir):
    assert Likelihood(str(tiny_base_dir), ceiling=1e9)(["Hello"], ["  "]) == [0.0]


@pytest.mark.parametrize("options", [{"scale": "cubic"}, {"ceiling": 1.0}, {"temperature": 0.0}])
def test_impossible_scales_are_refused_before_loading(options):
    with pytest.raises(ValueError, match="likelihood:"):
        Likelihood("not-a-model", **options)
