"""Reinforced merging of classifiers: what a plan answers, what is counted, and how one is chosen after a search on parts."""

import pytest
import torch
from torch.func import functional_call
from transformers import BertConfig, BertForSequenceClassification

from emorl.fusion.assembly import assemble
from emorl.fusion.merging_map import MergingSpace
from emorl.search.study import Finished
from recipes.rmm.classifiers import Examples, _shifts, accuracies, vision
from recipes.rmm.search import HOST, Judge, PlanEvaluator, gain, needed

SPACE = MergingSpace(6, 6)
PLANS = [tuple((layer, column) for layer in range(6)) for column in range(6)]
EACH = 40


@pytest.fixture(scope="module")
def setting():
    return vision(0, steps=2).shortened(EACH)


def test_heads_side_by_side_answer_what_each_answers_alone(setting):
    (questions,) = setting.questions
    model = assemble(list(setting.columns.values()), PLANS[0])
    alone = []
    for task in range(3):
        head = {name: value[2 * task : 2 * task + 2] for name, value in questions.head.items()}
        asked = Examples(questions.test.inputs, questions.test.labels[:, task : task + 1])
        alone += accuracies(model, head, asked)
    assert accuracies(model, questions.head, questions.test) == alone


def test_texts_in_the_order_of_their_lengths_are_answered_as_they_stand():
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForSequenceClassification(BertConfig(**sizes)).eval()
    mask = (torch.arange(12) < torch.randint(1, 9, (300, 1))).long()
    inputs = {"input_ids": torch.randint(1, 30, (300, 12)) * mask, "attention_mask": mask}
    labels = torch.randint(2, (300, 1))
    right = functional_call(model, {}, kwargs=inputs).logits.argmax(1, keepdim=True) == labels
    assert accuracies(model, {}, Examples(inputs, labels)) == pytest.approx([right.double().mean().item()])


def test_a_digit_is_shifted_nine_ways():
    image = torch.arange(4.0).reshape(1, 1, 2, 2)
    shifted = _shifts(image)
    assert shifted.shape == (9, 1, 2, 2)
    assert torch.equal(shifted[4:5], image)
    assert shifted[0, 0].tolist() == [[-1, -1], [-1, 0]]  # down and to the right


def test_on_parts_the_host_answers_each_part_once_and_gains_nothing_on_itself(setting):
    evaluator = PlanEvaluator(setting, SPACE, 0.5, [])
    host = SPACE.corners()[list(setting.columns).index(HOST)]
    scored = evaluator([host] * 4)
    assert [one.notes["answered"] for one in scored] == [count * EACH * 3 // 2 for count in (2, 4, 5, 6)]
    assert all(gain(Finished(0, host, one.scores, one.notes)) == 0 for one in scored)
    assert scored[0].scores == scored[2].scores  # the parts come round again


def test_a_plan_is_chosen_by_successive_halving_and_all_of_it_is_counted(setting):
    judge = Judge(setting, SPACE)
    chosen, answered = judge.choose(PLANS)
    assert answered == (6 * 8 + 3 * 32) * 3
    left = sorted(PLANS, key=lambda plan: judge.value(plan, 0.2), reverse=True)[:3]
    assert judge.value(chosen) == max(judge.value(plan) for plan in left)
    assert judge.choose(PLANS) == (chosen, answered)


def test_what_the_full_search_needs_is_counted_to_its_first_plan_as_good():
    full = [Finished(number, {}, (value,), {"answered": 10 * (number + 1)}) for number, value in enumerate((0.1, 0.5, 0.9))]
    assert needed(full, 0.5) == 20
    assert str(needed(full, 0.95)) == "nan"
