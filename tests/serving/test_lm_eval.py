"""lm-eval's `local-completions` against the real server: prompts as token ids, stop strings, and prompts that are scored."""

import json
from itertools import pairwise

import lm_eval
import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager

from emorl.aggregation.ensemble import MIXTURES
from emorl.config.experiment import load_kept_experiment
from emorl.runs.layout import ENSEMBLE
from emorl.stages.materials import Materials

WEIGHTS = {"brief": 0.25, "varied": 0.25, "fresh": 0.5}
NEW = 40
QUESTIONS = [
    {"question": "Is it day?", "choices": ["yes", "no, it is not", "perhaps"], "answer": 0},
    {"question": "Wie spät ist es?", "choices": ["früh", "spät", "é🙂"], "answer": 2},
    {"question": "2 + 2", "choices": ["4", "5", "44"], "answer": 0},
]


@pytest.fixture(scope="module")
def ensemble(searched):
    base = Materials(load_kept_experiment(searched.output)).base
    return MIXTURES["hidden_states"].from_pretrained(
        searched.search / ENSEMBLE, base=base.model, weights=WEIGHTS
    ), base.tokenizer


@pytest.fixture(scope="module")
def whole(ensemble):
    """The ensemble's own answer to each question."""
    mixture, tokenizer = ensemble
    prompts = [torch.tensor([tokenizer(question["question"])["input_ids"]]) for question in QUESTIONS]
    answers = [mixture.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :] for prompt in prompts]
    return [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


@pytest.fixture(scope="module")
def stops(whole):
    """Two characters of the first answer, which so are two tokens, and what never comes."""
    pairs = [pair for first, second in pairwise(whole[0][3:]) if (pair := first + second).isascii() and pair.isprintable()]
    return [pairs[0], "\n\n\n"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, stops):
    """Two tasks of local files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": stops, "do_sample": False, "temperature": 0.0, "max_gen_toks": NEW},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, task in {"written": written, "chosen": chosen}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}), encoding="utf-8")
    return TaskManager(include_path=str(folder), include_defaults=False)


@pytest.fixture(scope="module", params=[{"batch_size": 1}, {"batch_size": 4}, {"num_concurrent": 3}], ids=str)
def samples(request, tasks, url, tiny_base_dir):
    """What lm-eval got for each task, by its number."""
    model = {
        "model": "emorl/" + ",".join(f"{name}={weight}" for name, weight in WEIGHTS.items()),
        "base_url": f"{url}/v1/completions",
        "tokenizer": str(tiny_base_dir),
        "tokenizer_backend": "huggingface",
        "max_retries": 1,
        **request.param,
    }
    found = lm_eval.simple_evaluate(
        "local-completions", model_args=model, tasks=["written", "chosen"], task_manager=tasks, bootstrap_iters=0
    )
    return {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}


def test_choices_have_the_log_likelihoods_of_the_ensemble_itself(samples, ensemble):
    mixture, tokenizer = ensemble
    for question, sample in zip(QUESTIONS, samples["chosen"], strict=True):
        expected = []
        for choice in question["choices"]:
            prompt, ids = (tokenizer(question["question"] + text)["input_ids"] for text in ("", choice))
            with torch.no_grad():
                scores = torch.log_softmax(mixture(input_ids=torch.tensor([ids])).logits[0].float(), -1)
            behind = scores[len(prompt) - 1 : -1]
            own = behind[range(len(behind)), ids[len(prompt) :]]
            expected.append((own.sum().item(), bool((behind.max(-1).values == own).all())))
        told = [(likelihood, is_greedy) for [(likelihood, is_greedy)] in sample["resps"]]
        assert [value for value, _ in told] == pytest.approx([value for value, _ in expected], abs=1e-3)
        assert [value for _, value in told] == [value for _, value in expected]
        assert sample["acc"] == (max(range(3), key=lambda index: expected[index][0]) == question["answer"])


def test_texts_end_at_the_tasks_stop_strings(samples, whole, stops):
    cut = [min(filter(lambda place: place >= 0, map(text.find, stops)), default=len(text)) for text in whole]
    assert [sample["resps"] for sample in samples["written"]] == [
        [[text[:place]]] for text, place in zip(whole, cut, strict=True)
    ]
    assert cut[0] < len(whole[0])
