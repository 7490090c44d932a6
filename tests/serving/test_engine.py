"""The engine's thread: what a request gets does not depend on its neighbours, and what goes wrong stays its own."""

import queue
import time

import pytest
import torch
from transformers import LogitsProcessorList

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.row_batch import PromptReading, RowBatch
from emorl.config import UserError
from emorl.config.serve import ServeConfig
from emorl.policies.adapters import read_adapter
from emorl.serving.engine import Engine
from emorl.serving.jobs import Asked, BusyError, Failed, PromptScores, Written
from emorl.serving.voices import Sampling, Voice

STEPS = 16
WAIT = 60
GREEDY = Sampling(ends=(1,))


@pytest.fixture(scope="module")
def mixtures(make_causal_model, write_adapter, tmp_path_factory):
    base, folder = make_causal_model(), tmp_path_factory.mktemp("policies")
    paths = [write_adapter(base, folder / name, seed=seed) for seed, name in enumerate("abc")]
    policies = {path.name: read_adapter(path) for path in paths}
    return {kind: kind(base, policies, include_base=True) for kind in (HiddenStateEnsemble, ParameterAverage)}


@pytest.fixture
def engine(tokenizer):
    made = []

    def make(memory=2**26, **limits):
        made.append(Engine(tokenizer, ServeConfig(**limits), memory))
        made[-1].start()
        return made[-1]

    yield make
    for each in made:
        each.close(WAIT)


class Answer:
    """Gathers what an engine tells."""

    def __init__(self, engine, asked):
        self.events = queue.Queue()
        [self.job] = engine.submit([asked], lambda _, event: self.events.put(event))
        self.asked = asked

    def all(self):
        found, left = [], self.asked.samples
        while left:
            event = self.events.get(timeout=WAIT)
            found.append(event)
            if isinstance(event, Failed):
                return found
            left -= isinstance(event, Written) and event.end is not None
        return found

    def texts(self):
        events = self.all()
        return ["".join(e.piece.text for e in events if e.sample == sample) for sample in range(self.asked.samples)]


def asked(mixture, weights, prompt="hello you", sampling=GREEDY, tokenizer=None, **options):
    ids = tuple(tokenizer(prompt)["input_ids"])
    return Asked(Voice(mixture, weights), prompt, ids, options.pop("most_tokens", STEPS), sampling, **options)


def several(mixtures, tokenizer):
    """Requests of both mixtures, single policies and the base, with prompts of many lengths."""
    hidden, average = mixtures[HiddenStateEnsemble], mixtures[ParameterAverage]
    weights = [
        {"a": 0.5, "b": 0.3, "c": 0.2},
        {"a": 0.1, "b": 0.2, "c": 0.7},
        {"a": 1.0},
        {"base": 1.0},
        {"b": 2.0, "base": -1.0},
    ]
    prompts = ["a", "how are you today", "please " * 12, "hello you", "hello"]
    for number, (each, prompt) in enumerate(zip(weights, prompts, strict=True)):
        yield asked(hidden, each, prompt, tokenizer=tokenizer, most_tokens=4 + 3 * number)
        yield asked(average, each, prompt[::-1], tokenizer=tokenizer, most_tokens=16 - 3 * number)


def generated(asked_one, tokenizer):
    """The same text by transformers' `generate()`."""
    ids = torch.tensor([asked_one.ids])
    mixture = asked_one.voice.mixture
    options = {"max_new_tokens": asked_one.most_tokens, "do_sample": False, "eos_token_id": 1, "pad_token_id": 0}
    written = mixture.generate(ids, attention_mask=torch.ones_like(ids), weights=dict(asked_one.voice.weights), **options)
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("limits", [{}, {"rows": 3}, {"chunk": 5}])
def test_every_text_is_that_of_generate_whatever_is_written_beside_it(engine, mixtures, tokenizer, limits):
    here, wanted = engine(**limits), list(several(mixtures, tokenizer))
    answers = [Answer(here, each) for each in wanted]
    assert [answer.texts() for answer in answers] == [[generated(each, tokenizer)] for each in wanted]


def test_a_sampled_text_is_that_of_its_seed_alone_or_among_others(engine, mixtures, tokenizer):
    sampling = Sampling(temperature=1.5, top_p=0.9, ends=(1,))
    mixture, weights = mixtures[HiddenStateEnsemble], {"a": 0.4, "c": 0.6}
    mine = asked(mixture, weights, sampling=sampling, seed=7, samples=3, tokenizer=tokenizer)
    [alone] = [Answer(engine(), mine).texts()]
    here = engine()
    answers = [Answer(here, each) for each in [*several(mixtures, tokenizer), mine, *several(mixtures, tokenizer)]]
    assert answers[10].texts() == alone
    assert len(set(alone)) == 3
    second = asked(mixture, weights, sampling=sampling, seed=8, samples=1, tokenizer=tokenizer)
    assert Answer(here, second).texts() == alone[1:2]  # text i has seed + i
    for answer in answers[:10] + answers[11:]:
        answer.texts()


def test_settings_of_generate_hold_penalties_and_bans_too(engine, mixtures, tokenizer):
    mixture = mixtures[HiddenStateEnsemble]
    generation = {"do_sample": False, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "min_new_tokens": 9}
    ids = tokenizer("hello you", return_tensors="pt")
    wanted = mixture.generate(**ids, weights=[0.5, 0.5, 0, 0], max_new_tokens=STEPS, pad_token_id=0, **generation)
    sampling = Sampling.of(mixture, generation, ids["input_ids"].shape[1])
    found = Answer(engine(), asked(mixture, {"a": 0.5, "b": 0.5}, sampling=sampling, tokenizer=tokenizer)).texts()
    assert found == [tokenizer.decode(wanted[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)]


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 0}, (0.7, 0.8, 0, 0)),
        ({"do_sample": True, "top_k": 5, "repetition_penalty": 1.3}, (1.0, 1.0, 5, 1)),
        ({"do_sample": True, "temperature": 0.7, "min_p": 0.1, "top_k": 0}, (1.0, 1.0, 0, 2)),  # temperature comes before it
        ({"do_sample": False, "temperature": 0.7}, (0.0, 1.0, 0, 0)),
    ],
)
def test_what_choose_does_not_know_is_left_to_transformers(mixtures, generation, expected):
    found = Sampling.of(mixtures[HiddenStateEnsemble], generation, 5)
    assert (found.temperature, found.top_p, found.top_k, len(found.processors)) == expected


def test_beams_cannot_be_served(mixtures):
    with pytest.raises(UserError, match="beam search cannot be served"):
        Sampling.of(mixtures[HiddenStateEnsemble], {"num_beams": 3}, 5)


def test_log_probabilities_are_those_of_one_forward(engine, mixtures, tokenizer):
    mixture, weights = mixtures[HiddenStateEnsemble], {"a": 0.7, "b": 0.3}
    one = asked(mixture, weights, logprobs=2, scores_prompt=True, most_tokens=4, tokenizer=tokenizer)
    prompt, *written = Answer(engine(chunk=3), one).all()
    assert isinstance(prompt, PromptScores)
    scores = [*prompt.scores, *(score for event in written for score in event.scores)]
    text = "".join(score.text for score in scores)
    ids = torch.tensor([tokenizer(one.prompt[:1] + text)["input_ids"]])
    expected = mixture(ids, weights=weights).logits[0, :-1].log_softmax(-1)
    own = expected.gather(1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor([score.logprob for score in scores]), own[: len(scores)], rtol=1e-4, atol=1e-4)
    best = expected.topk(2).values
    torch.testing.assert_close(torch.tensor([[p for _, p in s.top] for s in scores]), best[: len(scores)], rtol=1e-4, atol=1e-4)


def test_a_prompt_is_read_once_for_all_its_texts_and_a_shared_beginning_once_for_all_prompts(engine, mixtures, tokenizer):
    mixture, read = mixtures[HiddenStateEnsemble], []
    embeddings = mixture.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, given, output: read.append(given[0].shape[1]))
    try:
        here, system = engine(), "You are kind and never in a hurry. "
        for prompt in (system + "Hello", system + "Good bye"):
            one = asked(mixture, {"a": 0.5, "b": 0.5}, prompt=prompt, samples=3, most_tokens=1, tokenizer=tokenizer)
            Answer(here, one).texts()
    finally:
        hook.remove()
    assert read == [len(system + "Hello"), len("Good bye")]


def test_requests_that_come_together_read_what_they_share_once(engine, mixtures, tokenizer):
    mixture, read = mixtures[HiddenStateEnsemble], []
    prompts = ["You are kind and never in a hurry. " + end for end in ("Hello", "Good bye", "Hello there", "No")]
    wanted = [asked(mixture, {"a": 0.5, "b": 0.5}, prompt=prompt, most_tokens=1, tokenizer=tokenizer) for prompt in prompts]
    hook = mixture.get_input_embeddings().register_forward_hook(lambda module, given, output: read.append(given[0].shape[1]))
    events = queue.Queue()
    try:
        engine().submit(wanted, lambda place, event: events.put(event))
        for _ in wanted:
            assert events.get(timeout=WAIT).end == "length"
    finally:
        hook.remove()
    assert read == [len(prompts[0]), len("Good bye"), len(" there"), len("No")]


def test_rows_that_left_give_their_memory_back(mixtures, tokenizer):
    mixture, one = mixtures[HiddenStateEnsemble], torch.tensor([0.5, 0.5, 0.0, 0.0])
    reading = PromptReading(mixture, tokenizer("hello you " * 10)["input_ids"], one)
    reading.read(1000)
    batch = RowBatch(mixture, reading.active)
    for _ in range(32):
        batch.join(reading)
    full = batch.bytes
    batch.leave(range(1, 32))
    assert batch.bytes < full / 8


def test_who_goes_away_frees_its_place(engine, mixtures, tokenizer):
    here = engine(rows=1)
    long = Answer(
        here, asked(mixtures[HiddenStateEnsemble], {"a": 1.0}, sampling=Sampling(), most_tokens=5000, tokenizer=tokenizer)
    )
    long.events.get(timeout=WAIT)
    long.job.is_gone = True
    after = Answer(here, asked(mixtures[HiddenStateEnsemble], {"a": 1.0}, most_tokens=3, tokenizer=tokenizer))
    assert after.texts()
    end = time.monotonic() + WAIT
    while here.running or here.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_full_queue_refuses_and_goes_on(engine, mixtures, tokenizer):
    here, mixture = engine(rows=1, queue=2), mixtures[HiddenStateEnsemble]
    first = Answer(here, asked(mixture, {"a": 1.0}, sampling=Sampling(), most_tokens=2000, tokenizer=tokenizer))
    first.events.get(timeout=WAIT)
    others = [Answer(here, asked(mixture, {"a": 1.0}, most_tokens=3, tokenizer=tokenizer)) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests are waiting"):
        Answer(here, asked(mixture, {"a": 1.0}, tokenizer=tokenizer))
    first.job.is_gone = True
    assert all(other.texts() for other in others)


def test_a_request_of_many_prompts_is_taken_whole_where_one_more_is_refused(engine, mixtures, tokenizer):
    here, events = engine(queue=2), queue.Queue()
    one = asked(mixtures[HiddenStateEnsemble], {"a": 1.0}, most_tokens=1, tokenizer=tokenizer)
    here.submit([one] * 50, lambda place, event: events.put(place))
    assert sorted(events.get(timeout=WAIT) for _ in range(50)) == list(range(50))


def test_what_does_not_fit_alone_is_refused_and_what_does_waits_for_room(engine, mixtures, tokenizer):
    mixture, weights = mixtures[HiddenStateEnsemble], {"a": 0.5, "b": 0.5}
    one = asked(mixture, weights, tokenizer=tokenizer)
    assert one.bytes_per_place == 2 * 2 * 2 * 8 * 4 * 2  # keys and values, layers, heads, width, bytes, policies
    here = engine(memory=int(1.6 * 3.5 * one.places * one.bytes_per_place / 0.75))
    with pytest.raises(UserError, match="GiB of cache"):
        Answer(here, asked(mixture, weights, samples=3, tokenizer=tokenizer))
    with pytest.raises(UserError, match="n=33 is more than the 32 texts"):
        Answer(here, asked(mixture, weights, samples=33, tokenizer=tokenizer))
    answers = [Answer(here, one) for _ in range(6)]
    assert {answer.texts()[0] for answer in answers} == {generated(one, tokenizer)}


def test_a_request_that_fails_ends_alone(engine, mixtures, tokenizer):
    mixture = mixtures[HiddenStateEnsemble]

    def fail(ids, scores):
        raise RuntimeError("secret path")

    here = engine()
    broken = asked(mixture, {"b": 1.0}, sampling=Sampling(processors=LogitsProcessorList([fail])), tokenizer=tokenizer)
    good = asked(mixture, {"a": 1.0}, tokenizer=tokenizer)
    answers = [Answer(here, each) for each in (good, broken, good)]
    failed = answers[1].all()
    assert isinstance(failed[-1], Failed)
    assert "RuntimeError" in failed[-1].message
    assert "secret" not in failed[-1].message
    assert answers[0].texts() == answers[2].texts() == [generated(good, tokenizer)]


def test_what_fails_between_two_steps_ends_what_is_written_and_not_the_thread(engine, mixtures, tokenizer, monkeypatch):
    here, mixture = engine(), mixtures[HiddenStateEnsemble]
    long = Answer(here, asked(mixture, {"a": 1.0}, sampling=Sampling(), most_tokens=5000, tokenizer=tokenizer))
    long.events.get(timeout=WAIT)
    with monkeypatch.context() as patched:
        patched.setattr(RowBatch, "leave", lambda self, rows: torch.empty(2**62))  # no such memory
        short = Answer(here, asked(mixture, {"b": 0.0, "a": 1.0}, most_tokens=2, tokenizer=tokenizer))
        assert isinstance(long.all()[-1], Failed)
    assert short.all()
    good = asked(mixture, {"a": 1.0}, tokenizer=tokenizer)
    assert Answer(here, good).texts() == [generated(good, tokenizer)]


def test_a_request_that_takes_too_long_is_answered_with_what_there_is(engine, mixtures, tokenizer):
    here = engine(seconds=0.5)
    events = Answer(
        here,
        asked(mixtures[HiddenStateEnsemble], {"a": 1.0}, sampling=Sampling(), most_tokens=10**6 // 50, tokenizer=tokenizer),
    ).all()
    assert events[-1].end == "length"
    assert 0 < events[-1].tokens < 10**6 // 50


def test_closing_finishes_what_runs_and_takes_nothing_more(engine, mixtures, tokenizer):
    here = engine()
    answer = Answer(here, asked(mixtures[HiddenStateEnsemble], {"a": 1.0}, tokenizer=tokenizer))
    start = time.monotonic()
    here.close(WAIT)
    assert time.monotonic() - start < WAIT
    assert answer.texts() == [generated(answer.asked, tokenizer)]
    with pytest.raises(BusyError, match="shutting down"):
        Answer(here, answer.asked)


def test_no_new_tokens_and_prompt_scores_end_at_once(engine, mixtures, tokenizer):
    one = asked(mixtures[HiddenStateEnsemble], {"a": 1.0}, most_tokens=0, logprobs=0, scores_prompt=True, tokenizer=tokenizer)
    prompt, end = Answer(engine(), one).all()
    assert (len(prompt.scores), end.end, end.tokens) == (len(one.ids) - 1, "length", 0)
