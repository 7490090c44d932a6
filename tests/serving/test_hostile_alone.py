"""Hostile values for what answers one after the other: an encoder-decoder without a chat template, and a dynamic ensemble."""

import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config.serve import ServeConfig
from emorl.dynamic.agents.observation import FixedWeights
from emorl.dynamic.engines.engine import Decoding
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.dynamic.ensemble import DynamicEnsemble
from emorl.policies.adapters import read_adapter
from emorl.serving.application import Served, make_application
from emorl.serving.engine import Engine
from emorl.serving.models import Model, Models
from emorl.serving.preparing import Defaults, Preparing
from emorl.serving.voices import DynamicVoice
from tests.serving.conftest import serving
from tests.serving.test_hostile import FIELDS, GOOD, HOSTILE, sent
from tests.serving.wire import CHAT, COMPLETIONS, is_idle

REACHING = {"temperature", "top_p", "top_k", "seed", "n", "stop", "max_tokens", "messages", "prompt", "logprobs", "echo"}
pytestmark = pytest.mark.usefixtures("no_errors")


@pytest.fixture(scope="module")
def encoder_decoder(serve, tiny_seq2seq_dir):
    with serve(tiny_seq2seq_dir, generation={"max_new_tokens": 2}, seconds=2) as url:
        yield url


@pytest.fixture(scope="module")
def dynamic(make_causal_model, write_adapter, tokenizer, tmp_path_factory):
    base, folder = make_causal_model(), tmp_path_factory.mktemp("dynamic")
    policies = {name: read_adapter(write_adapter(base, folder / name, seed=seed)) for seed, name in enumerate("ab")}
    engine = StackedEngine(HiddenStateEnsemble(base, policies), tokenizer)
    ensemble = DynamicEnsemble(engine, FixedWeights(torch.tensor([0.7, 0.3])), Decoding(2, temperature=1.0, seed=5), span=3)
    models = Models([], [Model("emorl/dynamic", "dynamic", DynamicVoice(ensemble))])
    preparing = Preparing(models, tokenizer, Defaults({"max_new_tokens": 2, "do_sample": False}))
    with serving(make_application(Served(Engine(tokenizer, ServeConfig(seconds=2), 2**26), preparing))) as url:
        yield url


@pytest.mark.parametrize("kind", ["encoder_decoder", "dynamic"])
def test_no_value_of_a_field_that_reaches_the_model_is_too_strange(request, kind):
    url = request.getfixturevalue(kind)
    for path, field in FIELDS:
        for value in HOSTILE if field in REACHING else ():
            sent(url, path, GOOD[path] | {field: value})
    assert is_idle(url)


@pytest.mark.parametrize("kind", ["encoder_decoder", "dynamic"])
def test_mixtures_of_strange_values_harm_nobody(request, kind):
    url = request.getfixturevalue(kind)
    for number, value in enumerate(HOSTILE):
        for path in GOOD:
            fields = {
                "temperature": 1.0,
                "top_p": 1e-45,
                "seed": -(2**63),
                "n": 2,
                "stop": "x",
                "stream": True,
                "max_tokens": number % 3,
            }
            sent(url, path, GOOD[path] | fields | {FIELDS[number % len(FIELDS)][1]: value})
    before = sent(url, COMPLETIONS, GOOD[COMPLETIONS]).json["choices"]
    assert sent(url, COMPLETIONS, GOOD[COMPLETIONS]).json["choices"] == before
    assert is_idle(url)


def test_a_dynamic_ensemble_refuses_what_it_would_not_heed(dynamic):
    for fields in ({"chat_template_kwargs": {"x": 1}}, {"logprobs": True}):
        reply = sent(dynamic, CHAT, GOOD[CHAT] | fields)
        assert reply.status == 400
        assert reply.error["message"].startswith(next(iter(fields)))
