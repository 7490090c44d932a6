"""Real models through the engine: requests with different weights at once are what `generate()` gives each alone."""

import queue

import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.config.experiment import BaseConfig
from emorl.config.serve import ServeConfig
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base
from emorl.policies.prompts import is_chat, token_ids
from emorl.serving.engine import Engine
from emorl.serving.jobs import Asked, Written
from emorl.serving.voices import Sampling, Voice

pytestmark = pytest.mark.realmodel

STEPS, WAIT = 16, 300
QUESTIONS = ["Write one sentence about the sea.", "What is 17 + 25?", "I lost my job last week and I cannot sleep.", "Hi"]
WEIGHTS = [(0.5, 0.3, 0.2), (1.0, 0.0, 0.0), (0.1, 0.2, 0.7), (0.0, 0.6, 0.4)]


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_requests_at_once_are_answered_as_each_alone(real_model, write_adapter, tmp_path, name):
    base = load_base(BaseConfig(model=str(real_model(name))))
    paths = [write_adapter(base.model, tmp_path / policy, seed=seed) for seed, policy in enumerate("abc")]
    ensemble = HiddenStateEnsemble(base.model, {path.name: read_adapter(path, scale=0.2) for path in paths})
    chats = [[{"role": "user", "content": text}] for text in QUESTIONS] if is_chat(base.tokenizer) else QUESTIONS
    asked, alone = [], []
    for chat, weights in zip(chats, WEIGHTS, strict=True):
        ids = torch.tensor([token_ids(base.tokenizer, chat)])
        sampling = Sampling.of(ensemble, {"do_sample": False}, ids.shape[1])
        voice = Voice(ensemble, dict(zip("abc", weights, strict=True)))
        asked.append(Asked(voice, chat, tuple(ids[0].tolist()), STEPS, sampling))
        written = ensemble.generate(ids, attention_mask=ids.ne(-1), weights=weights, max_new_tokens=STEPS, do_sample=False)
        alone.append(base.tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True))
    engine, events = Engine(base.tokenizer, ServeConfig(chunk=16), 2**30), queue.Queue()
    engine.start()
    engine.submit(asked, lambda place, event: events.put((place, event)))
    texts, left = [""] * len(asked), len(asked)
    while left:
        place, event = events.get(timeout=WAIT)
        assert isinstance(event, Written)
        texts[place] += event.piece.text
        left -= event.end is not None
    engine.close(WAIT)
    assert texts == alone
