"""Objectives that run a model, on random tiny models saved and loaded as any hub id would be."""

import copy
import math
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from emorl.objectives.loading import Objective
from emorl.objectives.models.batching import score_in_batches
from emorl.objectives.models.classifier import Classifier
from emorl.objectives.models.frozen_model import longest_input
from emorl.objectives.models.likelihood import Likelihood

COUNSELLOR = Path(__file__).parents[3] / "shared" / "models" / "counsel-3m"


def encoder_tokenizer(tokenizer):
    """Encoders have no chat template: prompt and completion are a pair of segments."""
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


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
        encoder_tokenizer(tokenizer).save_pretrained(directory)
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


def test_the_precision_can_be_chosen(save_classifier, tiny_base_dir):
    classifier, language_model = save_classifier(["quality"]), str(tiny_base_dir)
    for make in (lambda dtype: Classifier(classifier, dtype=dtype), lambda dtype: Likelihood(language_model, dtype=dtype)):
        exact, saved, rough = (make(dtype)(PROMPTS, TEXTS) for dtype in ("float32", "auto", "bfloat16"))
        assert exact == saved
        assert 0 < max(abs(a - b) for a, b in zip(exact, rough, strict=True)) < 0.02
    with pytest.raises(ValueError, match="dtype is one of auto, float32, bfloat16, got 'float8'"):
        Likelihood(language_model, dtype="float8")


def test_a_wrong_folder_is_named_with_its_remedy(save_classifier, tmp_path):
    Path(save_classifier(["quality"])).rename(tmp_path / "model")
    with pytest.raises(ValueError, match=r"holds no model \(no config.json\); did you mean '.*/model'"):
        Classifier(str(tmp_path))
    for missing in (str(tmp_path / "nothing"), "./nothing", "runs/nothing/model"):
        with pytest.raises(ValueError, match="no folder"):
            Classifier(missing)
        with pytest.raises(ValueError, match="no folder"):
            Likelihood(missing)


def test_a_label_that_the_only_output_has_not_is_refused(save_classifier):
    path = save_classifier(["quality"])
    assert Classifier(path, label="quality")(PROMPTS, TEXTS) == Classifier(path)(PROMPTS, TEXTS)
    with pytest.raises(ValueError, match="no label 'grade'"):
        Classifier(path, label="grade")


def test_what_a_batch_may_change_depends_on_the_precision(save_classifier):
    path = save_classifier(["quality"])
    assert Objective("quality", Classifier(path)).batch_tolerance == 1e-4
    assert Objective("quality", Classifier(path, dtype="bfloat16")).batch_tolerance == 0.02
    assert Objective("rule", lambda **columns: []).batch_tolerance == 1e-4


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
    inverse = Likelihood(str(tiny_base_dir), temperature=2.0, minimum_words=0, batch_size=3)
    assert inverse(PROMPTS, TEXTS) == pytest.approx([math.exp(-nll / 2) for nll in expected], abs=1e-5)
    linear = Likelihood(str(tiny_base_dir), "linear", ceiling=10_000.0, minimum_words=0)
    assert linear(PROMPTS, TEXTS) == pytest.approx([max(0, 1 - math.exp(nll) / 10_000) for nll in expected], abs=1e-5)


@pytest.fixture(scope="module")
def uniform_model(tmp_path_factory, make_causal_model, tokenizer):
    """A language model to which every token is equally likely: perplexity V whatever the text."""
    directory = tmp_path_factory.mktemp("uniform")
    model = make_causal_model("llama")
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory), model.config.vocab_size


@pytest.mark.parametrize(
    ("prompt", "text", "evidence", "copied"),
    [
        ("Hello", "one two three four five", 1.0, 0.0),
        ("Hello", "Yes, yes.", 1 / 5, 0.0),
        ("Hello", "I see.", 2 / 5, 0.0),
        ("Hello", "a b c d. A b c d!", 4 / 5, (1 / 2 - 1 / 4) / (3 / 4)),  # half of it was said before
        ("a b c d e", "A b c, d e?", 1.0, 1.0),  # all of it is the prompt's
        ("a b c", "a b c d e f", 1.0, 0.0),  # half of it quoted is free
    ],
)
def test_short_repeated_and_copied_text_by_hand(uniform_model, prompt, text, evidence, copied):
    path, size = uniform_model
    expected = evidence * math.exp(-math.log(size) * (1 + copied) / 2)
    assert Likelihood(path, temperature=2.0)([prompt], [text]) == pytest.approx([expected])
    assert Likelihood(path, temperature=2.0, floor=size / 4)([prompt], [text])[0] == pytest.approx(
        expected * math.sqrt(size / 4)
    )
    linear = evidence * (1 - size ** (1 + copied) / 1e6)
    assert Likelihood(path, "linear", ceiling=1e6)([prompt], [text]) == pytest.approx([linear])


def test_at_its_floor_a_text_is_fluent_enough(uniform_model):
    path, size = uniform_model
    text = "one two three four five"
    assert Likelihood(path, floor=size + 1)(["p"], [text]) == [1.0]
    assert Likelihood(path, "linear", ceiling=2.0 * size, floor=size + 1)(["p"], [text]) == [1.0]


def test_the_papers_form_reads_prompt_and_completion_together(tiny_base_dir, make_causal_model, tokenizer):
    model = make_causal_model("llama")
    ids = tokenizer("I am sad.I am sad.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    paper = Likelihood(str(tiny_base_dir), "paper", ceiling=10_000.0)
    assert paper(["I am sad."], ["I am sad."]) == pytest.approx([max(0, 1 - perplexity / 10_000)], abs=1e-5)


@pytest.mark.parametrize("text", ["", "  ", "...", "?!", "- - - - - - - -"])
def test_text_without_a_word_is_not_fluent(tiny_base_dir, text):
    assert Likelihood(str(tiny_base_dir), minimum_words=0)(["Hello"], [text]) == [0.0]


def test_text_in_a_language_without_spaces_can_be_scored(tiny_base_dir):
    text = "我很难过。"
    full, fifth = (Likelihood(str(tiny_base_dir), minimum_words=n)(["你好"], [text])[0] for n in (0, 5))
    assert fifth == pytest.approx(full / 5)


@pytest.mark.realdata
@pytest.mark.skipif(not COUNSELLOR.is_dir(), reason="needs ../shared/models")
def test_degenerate_text_scores_below_fluent_text_on_a_real_model():
    fluency = Likelihood(str(COUNSELLOR), temperature=2.0)
    prompt = "I want to quit smoking, but my husband smokes and it is hard when he is around."
    degenerate = [
        "husband your is hard quitting around when It he smokes.", "I am I am I am I am I am", "sad sad sad sad sad sad",
        "You are not alone. You are not alone. You are not alone. You are not alone.", "Yes.", "I see.", "...", "", prompt,
        "It is hard to quit when your",
    ]  # fmt: skip
    fluent, *others = fluency([prompt] * 11, ["It is hard to quit when your husband smokes around you.", *degenerate])
    assert max(others) < fluent


LONG = "It is hard to sleep. " * 1200  # about 5,000 words


def test_likelihood_cuts_what_its_model_has_no_positions_for_and_says_so_once(make_causal_model, tokenizer, tmp_path, caplog):
    make_causal_model("gpt2", n_positions=64).save_pretrained(tmp_path)  # learned positions: there is nothing behind the last
    tokenizer.save_pretrained(tmp_path)
    objective = Likelihood(str(tmp_path), scale="inverse")
    scores = objective(["Hello"] * 2 + [LONG] * 2, ["It is hard.", LONG, "It is hard.", LONG])
    assert all(0 < score < 1 for score in scores)
    assert caplog.text.count("a text longer than the model's 64 positions was cut") == 1
    before, after = (tokenizer(text)["input_ids"] for text in ("<|user|>Hello<|end|><|assistant|>", LONG))
    assert objective._cut(before, after) == (before, after[: 64 - len(before)])
    prompt, completion = objective._cut(after, after[:20])
    assert (prompt, completion) == (after[-44:], after[:20])  # the end of the prompt, all of the completion
    assert tuple(map(len, objective._cut(after, after))) == (16, 48)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_classifier_cuts_what_its_model_has_no_positions_for_and_says_so_once(family, tokenizer, tmp_path, caplog):
    torch.manual_seed(1)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"max_position_embeddings": 64, "id2label": {0: "quality"}, "label2id": {"quality": 0}, "pad_token_id": 0}
    if family == "roberta":
        sizes |= {"pad_token_id": 1, "max_position_embeddings": 66}  # its first position is 2
    AutoModelForSequenceClassification.from_config(CONFIG_MAPPING[family](**sizes)).save_pretrained(tmp_path)
    unlimited = encoder_tokenizer(tokenizer)
    unlimited.model_max_length = 10**30
    unlimited.save_pretrained(tmp_path)
    objective = Classifier(str(tmp_path), batch_size=2)
    assert longest_input(objective._model) == 64
    short = objective(["Hello"], ["It is hard."])
    assert caplog.text == ""
    scores = objective(["Hello"] * 2 + [LONG] * 2, ["It is hard.", LONG, "It is hard.", LONG])
    assert scores[0] == pytest.approx(short[0], abs=1e-6)
    assert scores[1] == pytest.approx(objective(["Hello"], [LONG[:200]])[0], abs=1e-6)
    assert scores[3] == pytest.approx(objective([LONG[:200]], [LONG[:200]])[0], abs=1e-6)
    assert caplog.text.count("longer than the model's 64 tokens was cut") == 1


def test_batches_hold_few_long_texts_and_all_of_them():
    sizes = []

    def count(batch):
        sizes.append(len(batch))
        return [float(len(completion)) for _, completion in batch]

    texts = ["x" * length for length in (50_000, 3, 20_000, 1, 20_001, 2, 30_000, 100_000)]
    assert score_in_batches([("", text) for text in texts], count, 64) == [len(text) for text in texts]
    assert sizes == [3, 2, 1, 1, 1]
    sizes.clear()
    score_in_batches([("", "x" * length) for length in range(1, 10)], count, 4)
    assert sizes == [4, 4, 1]


@pytest.mark.parametrize(
    "options",
    [{"scale": "cubic"}, {"ceiling": 1.0}, {"temperature": 0.0}, {"floor": 0.5}, {"scale": "linear", "floor": 60.0},
     {"scale": "paper", "floor": 5.0}, {"minimum_words": -1}],
)  # fmt: skip
def test_impossible_scales_are_refused_before_loading(options):
    with pytest.raises(ValueError, match="likelihood:"):
        Likelihood("not-a-model", **options)
