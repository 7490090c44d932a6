"""What cannot join a batch is answered one after the other: encoder-decoders and dynamic ensembles."""

import queue
from copy import deepcopy

import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config import UserError
from emorl.config.serve import ServeConfig
from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.engines.union import UnionEngine
from emorl.dynamic.ensemble import DynamicEnsemble
from emorl.policies.adapters import read_adapter
from emorl.serving.engine import Engine
from emorl.serving.jobs import Asked, Failed, Written
from emorl.serving.models import Model, Models
from emorl.serving.preparing import Defaults, Preparing
from emorl.serving.requests import ChatRequest
from emorl.serving.voices import DynamicVoice, Sampling, Voice
from emorl.serving.writing import Piece

WAIT, STEPS = 60, 12


@pytest.fixture
def ask(tokenizer):
    engine = Engine(tokenizer, ServeConfig(), 2**26)
    engine.start()

    def submit(asked):
        events = queue.Queue()
        [job] = engine.submit([asked], lambda _, event: events.put(event))
        return job, events

    yield submit
    engine.close(WAIT)


def told(events, samples=1):
    found = []
    while sum(event.end is not None for event in found) < samples:
        found.append(events.get(timeout=WAIT))
        assert isinstance(found[-1], Written)
    return found


@pytest.fixture(scope="module")
def seq2seq(make_seq2seq_model, write_adapter, tmp_path_factory):
    base, folder = make_seq2seq_model(initializer_factor=3.0), tmp_path_factory.mktemp("seq2seq")
    options = {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    paths = [write_adapter(base, folder / name, seed=seed, **options) for seed, name in enumerate("ab")]
    return HiddenStateEnsemble(base, {path.name: read_adapter(path) for path in paths}, include_base=True)


def of_seq2seq(mixture, tokenizer, sampling, **options):
    ids = tuple(tokenizer("how are you")["input_ids"])
    return Asked(Voice(mixture, {"a": 0.6, "b": 0.4}), "", ids, STEPS, sampling, **options)


def test_an_encoder_decoder_streams_what_it_generates(ask, seq2seq, tokenizer):
    asked = of_seq2seq(seq2seq, tokenizer, Sampling.of(seq2seq, {"do_sample": False}, 11))
    events = told(ask(asked)[1])
    written = seq2seq.generate(torch.tensor([asked.ids]), weights={"a": 0.6, "b": 0.4}, max_new_tokens=STEPS, do_sample=False)
    text = tokenizer.decode(written[0], skip_special_tokens=True)
    assert "".join(event.piece.text for event in events) == text
    assert len(events) > 2
    assert events[-1].tokens == (written[0, 1:] != 0).sum()


def test_an_encoder_decoder_samples_by_seed_and_stops_where_told(ask, seq2seq, tokenizer):
    sampling = Sampling.of(seq2seq, {"do_sample": True, "temperature": 1.5, "top_k": 0}, 11)
    texts = []
    for seed in (1, 1, 2):
        events = told(ask(of_seq2seq(seq2seq, tokenizer, sampling, seed=seed, samples=2))[1], samples=2)
        texts.append(["".join(e.piece.text for e in events if e.sample == sample) for sample in range(2)])
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][1] == texts[2][0]  # text i has seed + i
    stop = texts[0][0][2:4]
    events = told(ask(of_seq2seq(seq2seq, tokenizer, sampling, seed=1, stop=(stop,)))[1])
    assert "".join(event.piece.text for event in events) == texts[0][0].split(stop)[0]
    assert events[-1].end == "stop"


def test_an_encoder_decoder_stops_when_its_client_goes(ask, seq2seq, tokenizer):
    endless = Asked(Voice(seq2seq, {"a": 1.0}), "", (7, 8), 20_000, Sampling())
    job, events = ask(endless)
    events.get(timeout=WAIT)
    job.is_gone = True
    assert told(ask(of_seq2seq(seq2seq, tokenizer, Sampling()))[1])


@pytest.fixture(scope="module")
def dynamic(make_causal_model, write_adapter, tokenizer, tmp_path_factory):
    base, folder = make_causal_model(), tmp_path_factory.mktemp("dynamic")
    policies = {name: read_adapter(write_adapter(base, folder / name, seed=seed)) for seed, name in enumerate("ab")}
    plain = deepcopy(tokenizer)
    engine = StackedEngine(HiddenStateEnsemble(base, policies), plain)
    return DynamicEnsemble(engine, FixedWeights(torch.tensor([0.7, 0.3])), Decoding(8, temperature=1.0, seed=5), span=3)


def test_an_encoder_decoder_obeys_all_settings_of_generate(ask, seq2seq, tokenizer):
    ids = tokenizer("how are you", return_tensors="pt")["input_ids"]
    generation = {"do_sample": False, "forced_eos_token_id": 1, "min_new_tokens": 6, "repetition_penalty": 1.5}
    sampling = Voice(seq2seq, {"a": 0.6, "b": 0.4}).sampling(generation, ids.shape[1], 25)
    asked = Asked(Voice(seq2seq, {"a": 0.6, "b": 0.4}), "", tuple(ids[0].tolist()), 25, sampling)
    written = seq2seq.generate(ids, weights={"a": 0.6, "b": 0.4}, max_new_tokens=25, **generation)
    text = "".join(event.piece.text for event in told(ask(asked)[1]))
    assert text == tokenizer.decode(written[0], skip_special_tokens=True)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_dynamic_ensemble_answers_as_it_does_by_itself(ask, dynamic, temperature):
    turns = [{"role": "user", "content": "how are you"}]
    asked = Asked(DynamicVoice(dynamic), turns, (), STEPS, Sampling(temperature), seed=9)
    [event] = told(ask(asked)[1])
    own = {"max_new_tokens": STEPS, "temperature": temperature, "top_p": 1.0, "seed": 9}
    [answer] = dynamic.generate([turns], seeds=[0], **own)
    assert (event.piece, event.tokens) == (Piece(answer.text), answer.tokens)
    assert DynamicVoice(dynamic).longest == dynamic.engine.ensemble.config.max_position_embeddings
    stop = answer.text[1:3]
    stopped = Asked(DynamicVoice(dynamic), turns, (), STEPS, Sampling(temperature), seed=9, stop=(stop,))
    assert told(ask(stopped)[1])[-1].piece.text == answer.text.split(stop)[0]


def test_who_waits_for_a_dynamic_ensemble_no_more_stops_it_and_others_go_on_meanwhile(ask, dynamic, tokenizer):
    turns = [{"role": "user", "content": "how are you"}]
    job, events = ask(Asked(DynamicVoice(dynamic), turns, (), 10**5, Sampling(temperature=1.0)))
    mixture = dynamic.engine.ensemble
    beside = Asked(Voice(mixture, {"a": 0.5, "b": 0.5}), "", tuple(tokenizer("hello")["input_ids"]), 8, Sampling())
    assert len(told(ask(beside)[1])) > 1
    assert events.empty()
    job.is_gone = True
    assert isinstance(events.get(timeout=WAIT), Failed)
    assert told(ask(Asked(DynamicVoice(dynamic), turns, (), STEPS, Sampling()))[1])


def test_models_with_tokenizers_of_their_own_answer_a_chat_as_they_do_by_themselves(ask, make_causal_model, tokenizer):
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    models = [make_causal_model(seed=1), make_causal_model(seed=2, max_position_embeddings=64)]
    engine = UnionEngine(models, [tokenizer, plain], names=["chat", "plain"])
    ensemble = DynamicEnsemble(engine, FixedWeights(torch.tensor([0.6, 0.4])), Decoding(8), span=3)
    voice = DynamicVoice(ensemble)
    assert voice.longest == 64
    preparing = Preparing(
        Models([], [Model("emorl/dynamic", "dynamic", voice)]), voice.tokenizer, Defaults({"do_sample": False})
    )
    turns = [{"role": "user", "content": "how are you"}]
    _, [asked] = preparing.prepare(ChatRequest(messages=turns, max_tokens=STEPS))
    [event] = told(ask(asked)[1])
    [answer] = ensemble.generate([turns], seeds=[0], max_new_tokens=STEPS)
    assert event.piece == Piece(answer.text)
    assert len(asked.ids) == len(tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"])
    for fields, message in (
        ({"max_tokens": 100}, "64"),
        ({"top_k": 5}, "top_k"),
        ({"chat_template_kwargs": {"a": 1}}, "leave them out"),
    ):
        with pytest.raises(UserError, match=message):
            preparing.prepare(ChatRequest(messages=turns, **fields))
