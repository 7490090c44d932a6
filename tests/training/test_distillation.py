"""The ensemble distilled by TRL's trainer: what teacher and student read, where there is nothing to learn, that it learns."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.teacher import EnsembleTeacher
from emorl.config import UserError
from emorl.config.experiment import BaseConfig
from emorl.policies.adapters import read_adapter
from emorl.policies.base import Base
from emorl.policies.preference_line import PreferenceLine
from emorl.policies.prompts import encode, prepare_tokenizer
from emorl.runs.progress import Silent
from emorl.runs.run import open_run, read_cost
from emorl.training.distillation import DIVERGENCE, Lesson, build_trainer, distill, distillation_config
from emorl.training.questions import Questions, asked_with, divergences, repeated, teacher_texts
from emorl.training.student import begin_as_soup, make_student

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
NAMES = ("first", "second", "third")
GENERATION = {"max_new_tokens": 8, "do_sample": False}
MANY = [[{"role": "user", "content": f"say {word} {number}"}] for number in range(100) for word in ("yes", "no, not")]
PROMPTS = MANY[:40]
LORA = {"lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}


@pytest.fixture(scope="module")
def base(tiny_base_dir, make_causal_model, tokenizer):
    model = make_causal_model("llama")
    model.name_or_path = str(tiny_base_dir)
    return Base(model, tokenizer)


@pytest.fixture(scope="module")
def adapters(base, write_adapter, tmp_path_factory):
    """Policies of rank 4 that differ, and whose soup of two has rank 8."""
    folder = tmp_path_factory.mktemp("policies")
    return {name: read_adapter(write_adapter(base.model, folder / name, seed=seed)) for seed, name in enumerate(NAMES)}


def questions(weights, prompts=PROMPTS, student=None):
    rows = torch.tensor(weights).expand(len(prompts), -1)
    return Questions(prompts, rows, student or prompts)


@pytest.fixture
def make_lesson(base, adapters, tmp_path):
    def make(asked, start, policies=adapters, on=base, folder=tmp_path / "run", rank=4, **block):
        """What `distill` takes: a student that begins with the weights `start`, validated on the first questions."""
        settings = {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 8, **block}
        config = distillation_config(settings, BaseConfig(model=on.model), GENERATION, 0, folder / "checkpoints")
        validation = Questions(asked.teacher[:8], asked.weights[:8], asked.student[:8])
        run = open_run(folder, "distill", {})
        return Lesson(on, policies, asked, validation, start), LoraConfig(r=rank, **LORA), config, GENERATION, run

    return make


@pytest.fixture
def make_trainer(make_lesson):
    def make(*given, **named):
        lesson, lora, config, generation, run = make_lesson(*given, **named)
        student = make_student(lesson.base.model, lora, seed=0)
        begin_as_soup(student, list(lesson.policies.values()), lesson.start)
        return build_trainer(lesson, student, config, generation, run)

    return make


def first_step(trainer):
    """Loss and largest gradient of one batch."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = [p.grad.abs().max().item() for p in trainer.model.parameters() if p.grad is not None]
    return float(loss.detach()), max(gradients)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(make_trainer, adapters, beta):
    one_hot = [0.0, 1.0, 0.0]
    loss, gradient = first_step(make_trainer(questions(one_hot), one_hot, beta=beta))
    assert abs(loss) < 1e-6
    assert gradient < 1e-5
    other_loss, other_gradient = first_step(make_trainer(questions(one_hot), [1.0, 0.0, 0.0], beta=beta))
    assert other_loss > 1e-3
    assert other_gradient > 1e-3
    equal = dict.fromkeys(("a", "b"), adapters["first"])
    loss, gradient = first_step(make_trainer(questions([0.3, 0.7]), [1.0, 0.0], policies=equal, beta=beta))
    assert abs(loss) < 1e-6
    assert gradient < 1e-5


@torch.no_grad()
def test_the_loss_is_the_divergence_of_the_two_models_as_they_are_used(make_trainer, adapters, base):
    """TRL's chunked loss with the view, against whole forwards of ensemble and student: KL(student || teacher) at beta 1."""
    weights, start = [0.5, 0.2, 0.3], [0.0, 0.0, 1.0]
    trainer = make_trainer(questions(weights), start, beta=1.0)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = float(trainer.compute_loss(trainer.model, batch))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    at, counted = batch["completion_ids"].shape[1], batch["completion_mask"].bool()
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    ensemble, policy = HiddenStateEnsemble(base.model, adapters), HiddenStateEnsemble(base.model, {"it": adapters["third"]})
    teacher, student = (
        model(**inputs).logits[:, -at - 1 : -1][counted].log_softmax(-1) for model in (with_weights(ensemble, weights), policy)
    )
    assert loss == pytest.approx(float((student.exp() * (student - teacher)).sum(-1).mean()), rel=1e-4)


def with_weights(ensemble, weights):
    ensemble.weights = weights
    return ensemble


def test_a_step_changes_neither_the_base_nor_the_teacher(make_trainer, base):
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    trainer = make_trainer(questions([0.5, 0.5, 0.0]), [0.5, 0.5, 0.0], learning_rate=1e-2)
    of_teacher = {name: value.clone() for name, value in trainer._view.state_dict().items()}
    trainer.train()
    assert base.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert all(torch.equal(value, of_teacher[name]) for name, value in trainer._view.state_dict().items())
    shared = {value.data_ptr() for value in base.model.parameters()}
    student = [value for name, value in trainer.model.named_parameters() if "lora_" not in name]
    assert {value.data_ptr() for value in student} == shared  # no second base in memory


def test_it_comes_near_the_ensemble_where_its_soup_is_not(make_lesson, make_causal_model, write_adapter, tokenizer, tmp_path):
    """On prompts that are not trained on: under a third of the soup's divergence."""
    shallow, steps, weights = Base(make_causal_model("llama", num_hidden_layers=1), tokenizer), 200, [0.5, 0.2, 0.3]
    folders = {name: write_adapter(shallow.model, tmp_path / name, seed=seed) for seed, name in enumerate(NAMES)}
    policies = {name: read_adapter(folder) for name, folder in folders.items()}
    asked = questions(weights, repeated(MANY[8:], 16 * steps, seed=0))
    lesson = make_lesson(
        asked, weights, policies=policies, on=shallow, rank=8, max_steps=steps, eval_steps=50, learning_rate=1e-2,
        lr_scheduler_type="cosine", beta=0.0, per_device_train_batch_size=16,
    )  # fmt: skip
    outcome = distill(*lesson, Silent(), {})
    ensemble, soup = HiddenStateEnsemble(shallow.model, policies), ParameterAverage(shallow.model, policies)
    texts, validated = (
        teacher_texts(ensemble, tokenizer, one, GENERATION, batch=64, seed=0)
        for one in (questions(weights, MANY[:8]), lesson[0].validation)
    )
    student = PeftModel.from_pretrained(deepcopy(shallow.model), str(tmp_path / "run" / "policy")).eval()
    of_student, of_soup = divergences(student, ensemble, texts).sum(0), divergences(soup, ensemble, texts, mixes=True).sum(0)
    assert of_student[0] < of_soup[0] / 3
    assert of_student[1] == of_soup[1] == sum(map(len, texts.answers))
    nats, tokens = divergences(student, ensemble, validated).sum(0)
    assert outcome.divergence == pytest.approx(float(nats / tokens), rel=1e-4)  # what was kept is what was validated
    cost = read_cost(tmp_path / "run")
    assert cost.prompts == cost.completions == 16 * steps
    assert 16 * steps < cost.tokens <= 16 * steps * GENERATION["max_new_tokens"]


def test_the_same_seed_gives_the_same_adapter(make_lesson, tmp_path):
    weights, adapted = [0.5, 0.2, 0.3], []
    for folder in (tmp_path / "one", tmp_path / "two"):
        distill(*make_lesson(questions(weights), weights, folder=folder, learning_rate=1e-2), Silent(), {})
        adapted.append(load_file(folder / "policy" / "adapter_model.safetensors"))
    assert all(torch.equal(value, adapted[1][name]) for name, value in adapted[0].items())


def test_a_start_that_nothing_betters_is_kept(make_lesson, adapters, base, tmp_path):
    near = [0.95, 0.05, 0.0]
    lesson = make_lesson(questions(near), near, learning_rate=0.5)  # which can only lead away
    outcome = distill(*lesson, Silent(), {})
    assert outcome.best_step == 0
    assert min(entry[DIVERGENCE] for entry in outcome.log if entry.get("step", 0) > 0 and DIVERGENCE in entry) > 1e-2
    start = make_student(base.model, lesson[1], seed=0)
    begin_as_soup(start, list(adapters.values()), near)
    kept, first = load_file(tmp_path / "run" / "policy" / "adapter_model.safetensors"), get_peft_model_state_dict(start)
    assert all(torch.equal(value, first[name]) for name, value in kept.items())


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "qwen3", "gemma3_text"])
def test_a_student_that_is_its_teacher_has_no_loss_in_other_families(
    make_trainer, make_causal_model, write_adapter, tokenizer, tmp_path, family
):
    """Prompts are of unequal length, so that learned positions count too."""
    other = Base(make_causal_model(family), tokenizer)
    folders = [write_adapter(other.model, tmp_path / str(seed), seed=seed, target_modules="all-linear") for seed in range(2)]
    policies = {folder.name: read_adapter(folder) for folder in folders}
    loss, gradient = first_step(make_trainer(questions([0.0, 1.0]), [0.0, 1.0], policies=policies, on=other))
    assert abs(loss) < 1e-6
    assert gradient < 1e-5
    loss, gradient = first_step(
        make_trainer(questions([0.0, 1.0]), [1.0, 0.0], policies=policies, on=other, folder=tmp_path / "other")
    )
    assert loss > 1e-3
    assert gradient > 1e-4


def test_texts_end_with_the_first_end_token_or_before_the_padding(base, adapters):
    """Also where a stop string has ended them, and the padding is another token than the end."""
    ensemble = with_weights(HiddenStateEnsemble(base.model, adapters), [0.5, 0.5, 0.0])
    plain = teacher_texts(ensemble, base.tokenizer, questions([0.5, 0.5, 0.0]), GENERATION, batch=64, seed=0)
    letter = base.tokenizer.decode(plain.answers[0][3])
    stopped = {**GENERATION, "stop_strings": [letter]}
    cut = teacher_texts(ensemble, base.tokenizer, questions([0.5, 0.5, 0.0]), stopped, batch=7, seed=0)
    for whole, part in zip(plain.answers, cut.answers, strict=True):
        ends = next((place for place, token in enumerate(whole) if base.tokenizer.decode(token) == letter), len(whole) - 1)
        assert part == whole[: ends + 1]
    assert len(cut.answers[0]) <= 4


TEMPLATES = {
    "system turns": None,
    "a default system turn": (
        "{% if messages[0]['role'] != 'system' %}<|system|>You are helpful<|end|>{% endif %}"
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "no system turns": (
        "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}<|assistant|>"
    ),
    "system turns left out": (
        "{% for message in messages %}{% if message['role'] != 'system' %}<|{{ message['role'] }}|>{{ message['content'] }}"
        "<|end|>{% endif %}{% endfor %}<|assistant|>"
    ),
    "an argument": (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}<|assistant|>"
        "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    ),
}


WITHOUT = ("no system turns", "system turns left out")


@pytest.mark.parametrize("with_system", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES, "none"])
def test_the_teacher_reads_the_prompt_without_the_line_and_the_student_with_it(
    make_trainer, base, tokenizer, template, with_system, monkeypatch
):
    words = deepcopy(tokenizer)
    if template == "none":
        words.chat_template = None
    elif TEMPLATES[template] is not None:
        words.chat_template = TEMPLATES[template]
    if template == "an argument":
        prepare_tokenizer(words, {"enable_thinking": False}, None)
    texts = [turns[0]["content"] for turns in PROMPTS[:8]]
    system = [{"role": "system", "content": "Be kind."}] if with_system and template not in WITHOUT else []
    prompts = texts if template == "none" else [[*system, {"role": "user", "content": text}] for text in texts]
    line = PreferenceLine.of("Priorities: {weights}.", NAMES, words)
    weights = [[0.1 * row, 0.9 - 0.1 * row, 0.1] for row in range(8)]
    asked = asked_with(prompts, weights, NAMES, line)
    trainer = make_trainer(asked, [1.0, 0.0, 0.0], on=Base(base.model, words), shuffle_dataset=False)
    seen = []
    ensemble = trainer._view.base_model.ensemble
    read = ensemble.mixed_hidden_states
    monkeypatch.setattr(ensemble, "mixed_hidden_states", lambda *given: (seen.append(given), read(*given))[1])
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch)
    [(ids, mask, given)] = seen
    told = words.batch_decode(batch["prompt_ids"])
    plain = dict(zip(map(str, asked.student), range(8), strict=True))
    order = [next(row for row in range(8) if rendered(words, asked.student[row]) in text) for text in told]
    assert sorted(order) == sorted(plain.values())
    expected = encode(words, [prompts[row] for row in order])
    length = expected["input_ids"].shape[1]
    assert torch.equal(ids[:, :length], expected["input_ids"])
    assert torch.equal(mask[:, :length], expected["attention_mask"])
    assert torch.equal(ids[:, length:], batch["completion_ids"])
    assert torch.equal(mask[:, length:], batch["completion_mask"])
    assert torch.allclose(given, torch.tensor([weights[row] for row in order]))
    for row, text in zip(order, told, strict=True):
        assert line.text(dict(zip(NAMES, weights[row], strict=True))) in text
        assert "Priorities" not in words.decode(ids[order.index(row), :length])


def rendered(tokenizer, prompt):
    return tokenizer.decode(encode(tokenizer, [prompt])["input_ids"][0])


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"beta": 2}, r"distill.trainer: beta must be in \[0.0, 1.0\]"),
        ({"learning_rat": 1}, "unknown key 'distill.trainer.learning_rat'"),
        ({"teacher_model_name_or_path": "x"}, "the teacher is the ensemble"),
        ({"max_steps": 0}, "distill.trainer.max_steps: expected a whole number"),
        ({"fsdp": True}, "which FSDP and DeepSpeed would take apart"),
        ({"seed": 3}, "distill.trainer.seed is set by emorl"),
        ({"generation_kwargs": {"top_p": 3}}, "distill.trainer.generation_kwargs"),
    ],
)
def test_settings_that_cannot_be_are_one_line(tiny_base_dir, block, message):
    with pytest.raises(UserError, match=message):
        distillation_config(block, BaseConfig(model=str(tiny_base_dir)), GENERATION, 0, Path("nowhere"))


def test_an_ensemble_whose_head_is_not_all_is_no_teacher(base, adapters):
    ensemble = HiddenStateEnsemble(base.model, adapters)
    forward = ensemble.policies.forward

    def louder(*given, **named):
        output = forward(*given, **named)
        output.logits = output.logits * 2
        return output

    ensemble.policies.forward = louder
    with pytest.raises(UserError, match="changes what its head gives in a way that TRL's distillation does not know"):
        EnsembleTeacher(ensemble)
