"""Texts that come and go decode as each does alone: random models of several families, ragged prompts, any order."""

import random

import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.known_prompts import KnownPrompts
from emorl.aggregation.row_batch import PromptReading, RowBatch, can_join
from emorl.policies.adapters import read_adapter

FAMILIES = ["llama", "qwen3", "mistral", "gemma3_text", "gpt2", "gpt_neox", "phi"]
MIXTURES = [HiddenStateEnsemble, ParameterAverage]
STEPS = 20


@pytest.fixture(scope="module")
def make_mixture(make_causal_model, write_adapter, tmp_path_factory):
    def make(kind, family="llama", policies=3):
        base, folder = make_causal_model(family), tmp_path_factory.mktemp(family)
        paths = [write_adapter(base, folder / str(k), rank=2 + k, seed=k) for k in range(policies)]
        return kind(base, {path.name: read_adapter(path) for path in paths})

    return make


def texts(count, seed=0):
    """(prompt, weights, how many tokens are wanted): lengths from 1 to far beyond each other."""
    chance = random.Random(seed)
    for _ in range(count):
        prompt = [chance.randrange(5, 261) for _ in range(chance.choice([1, 3, 9, 30, 70]))]
        yield prompt, torch.tensor([chance.random() + 0.1 for _ in range(3)]), chance.randrange(1, STEPS)


def alone(mixture, prompt, weights, steps):
    ids = torch.tensor([prompt])
    written = mixture.generate(ids, weights=weights, max_new_tokens=steps, do_sample=False, eos_token_id=None)
    return written[0, len(prompt) :].tolist()


def read(mixture, prompt, weights, chunk=1000, known=()):
    reading = PromptReading(mixture, prompt, weights, known)
    while not reading.is_read:
        logits = reading.read(chunk)
    return reading, int(logits[-1].argmax())


def continuous(mixture, wanted, at_once, chunk=1000):
    """Each text's tokens, at most so many beside each other, one joining whenever there is room."""
    batch, rows, written = RowBatch(mixture, _active(mixture)), [], [[] for _ in wanted]
    waiting = list(range(len(wanted)))
    while waiting or rows:
        while waiting and len(rows) < at_once:
            text = waiting.pop(0)
            reading, token = read(mixture, *wanted[text][:2], chunk)
            written[text].append(token)
            if wanted[text][2] > 1:
                batch.join(reading)
                rows.append(text)
        if rows:
            logits = batch.step([written[text][-1] for text in rows])
            for text, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
                written[text].append(token)
            ended = [row for row, text in enumerate(rows) if len(written[text]) == wanted[text][2]]
            rows = [rows[row] for row in batch.leave(ended)] if ended else rows
    return written


def _active(mixture):
    return tuple(range(3)) if mixture.has_rows_by_policy else None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", MIXTURES)
def test_texts_that_come_and_go_are_those_of_generate(make_mixture, kind, family):
    mixture = make_mixture(kind, family)
    wanted = list(texts(12))
    assert continuous(mixture, wanted, at_once=4) == [alone(mixture, *text) for text in wanted]


def test_a_long_stay_beside_many_short_ones_is_not_changed_by_closing_and_making_room(make_mixture):
    mixture = make_mixture(HiddenStateEnsemble)
    wanted = [(prompt, weights, 150 if number == 3 else steps) for number, (prompt, weights, steps) in enumerate(texts(40, 1))]
    assert continuous(mixture, wanted, at_once=5) == [alone(mixture, *text) for text in wanted]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_prompt_read_in_pieces_continues_as_one_read_at_once(make_mixture, chunk):
    mixture = make_mixture(HiddenStateEnsemble)
    wanted = list(texts(6, 2))
    assert continuous(mixture, wanted, at_once=3, chunk=chunk) == [alone(mixture, *text) for text in wanted]


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_known_beginning_is_not_read_again_and_changes_nothing(make_mixture, kind):
    mixture, weights = make_mixture(kind), torch.tensor([0.5, 0.3, 0.2])
    shared = list(range(5, 45))
    known = KnownPrompts(2**20)
    first, _ = read(mixture, [*shared, 7, 8], weights)
    known.keep("here", [*shared, 7, 8], first.layers)
    beginning = known.beginning("here", [*shared, 9])
    assert beginning[0][0].shape[2] == len(shared)
    assert known.beginning("elsewhere", [*shared, 9]) == []
    assert known.beginning("here", [*shared, 7, 8])[0][0].shape[2] == len(shared) + 1  # the last token is always read
    fresh, known_of = read(mixture, [*shared, 9], weights), read(mixture, [*shared, 9], weights, known=beginning)
    assert fresh[1] == known_of[1]
    for ours, theirs in zip(fresh[0].layers, known_of[0].layers, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_known_prompts_keep_to_their_memory_and_drop_what_was_used_longest_ago(make_mixture):
    mixture, weights = make_mixture(HiddenStateEnsemble), torch.tensor([0.5, 0.3, 0.2])
    prompts = [[start] * 20 for start in range(5, 11)]
    size = sum(keys.nbytes + values.nbytes for keys, values in read(mixture, prompts[0], weights)[0].layers)
    known = KnownPrompts(3 * size)
    for prompt in prompts[:3]:
        known.keep("here", prompt, read(mixture, prompt, weights)[0].layers)
    known.beginning("here", [*prompts[0], 1])  # used
    known.keep("here", prompts[3], read(mixture, prompts[3], weights)[0].layers)
    assert known.bytes == 3 * size
    assert [bool(known.beginning("here", [*prompt, 1])) for prompt in prompts[:4]] == [True, False, True, True]


def test_one_reading_may_join_several_times(make_mixture):
    mixture, weights = make_mixture(HiddenStateEnsemble), torch.tensor([0.2, 0.5, 0.3])
    reading, token = read(mixture, [9, 8, 7], weights)
    batch = RowBatch(mixture, reading.active)
    batch.join(reading)
    batch.join(reading)
    assert torch.equal(*batch.step([token, token]))


def test_policies_without_weight_are_not_computed(make_mixture):
    mixture, weights = make_mixture(HiddenStateEnsemble), torch.tensor([0.0, 1.0, 0.0])
    reading, token = read(mixture, [9, 8, 7], weights)
    batch = RowBatch(mixture, reading.active)
    batch.join(reading)
    assert (reading.active, batch.rows_by_text) == ((1,), 1)
    assert [token, int(batch.step([token]).argmax())] == alone(mixture, [9, 8, 7], weights, 2)


def test_encoder_decoders_cannot_join(make_seq2seq_model, make_causal_model, write_adapter, tmp_path):
    base = make_seq2seq_model()
    path = write_adapter(base, tmp_path / "a", target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM")
    assert not can_join(HiddenStateEnsemble(base, {"a": read_adapter(path)}))
