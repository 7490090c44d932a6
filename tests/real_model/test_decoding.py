"""Two real models decode as the libraries they come from: Llama's layers and byte-level tokens, Gemma's windows and pieces."""

import functools
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from peft import PeftModel

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.trie import TrieDecoder
from emorl.config.experiment import BaseConfig
from emorl.dynamic.engines.union import VOCABULARIES, UnionEngine
from emorl.policies.adapters import read_adapter
from emorl.policies.base import Base, load_base
from emorl.policies.prompts import encode, is_chat
from tests.dynamic.engines.test_union import SlowReference, data_of, written

pytestmark = pytest.mark.realmodel

NAMES = ["smollm2", "gemma3"]
STEPS, UNION_STEPS = 16, 8
PROMPTS = ["Write one sentence about the sea.", "What is 17 + 25?", "I lost my job last week and I cannot sleep."]
LONG = "The sea was grey, and the boats came home one by one. " * 45
SCRIPTS = {
    "latin": "Über die schönen Äpfel schrieb Zoë: «naïve façade»",
    "cyrillic": "Расскажи мне о зимнем море",
    "arabic": "اكتب جملة عن البحر",
    "devanagari": "समुद्र के बारे में एक वाक्य लिखिए",
    "cjk and emoji": "请写一句关于大海的话 🌊🐠👩🏽‍🚀",
}


@dataclass
class Case:
    """A base, an ensemble of two policies on it, and the same policies in PEFT's own model, named by number."""

    base: Base
    ensemble: HiddenStateEnsemble
    peft: PeftModel

    def encode(self, texts):
        prompts = [[{"role": "user", "content": text}] for text in texts] if is_chat(self.base.tokenizer) else texts
        return dict(encode(self.base.tokenizer, prompts))


@pytest.fixture(scope="module")
def bases(real_model):
    """Factory: a base in float32, loaded once."""
    made: dict[str, Base] = {}

    def load(name: str) -> Base:
        if name not in made:
            made[name] = load_base(BaseConfig(model=str(real_model(name))))
        return made[name]

    return load


@pytest.fixture(scope="module", params=NAMES)
def case(request, bases, write_adapter, tmp_path_factory) -> Case:
    base, folder = bases(request.param), tmp_path_factory.mktemp(request.param)
    paths = [write_adapter(base.model, folder / str(seed), rank=2 + seed, alpha=0.5, seed=seed) for seed in range(2)]
    ensemble = HiddenStateEnsemble(base.model, {path.name: read_adapter(path) for path in paths})
    shared = {id(tensor): tensor for tensor in [*base.model.parameters(), *base.model.buffers()]}
    peft = PeftModel.from_pretrained(deepcopy(base.model, shared), str(paths[0]), adapter_name="0")
    peft.load_adapter(str(paths[1]), adapter_name="1")
    return Case(base, ensemble, peft.eval())


@torch.no_grad()
def test_all_weight_on_one_policy_is_peft_token_for_token_and_logit_for_logit(case):
    inputs = case.encode(PROMPTS)
    texts = []
    for policy, weights in (("0", [1.0, 0.0]), ("1", [0.0, 1.0])):
        case.peft.set_adapter(policy)
        expected = case.peft.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(case.ensemble.generate(**inputs, weights=weights, max_new_tokens=STEPS, do_sample=False), expected)
        found = case.ensemble(**inputs, weights=weights, logits_to_keep=1).logits
        logits = case.peft(**inputs, logits_to_keep=1).logits
        assert (found - logits).abs().max() < 1e-4 * logits.abs().max()  # deep layers amplify float32's roundings
        texts.append(expected)
    plain = case.base.model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    assert not torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], plain)


@torch.no_grad()
def test_a_prompt_longer_than_gemmas_window_is_read_as_peft_reads_it(case):
    inputs = case.encode([LONG])
    assert inputs["input_ids"].shape[1] > 512
    case.peft.set_adapter("1")
    expected = case.peft.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(case.ensemble.generate(**inputs, weights=[0, 1], max_new_tokens=4, do_sample=False), expected)


@torch.no_grad()
def test_the_trie_gives_each_candidate_what_generate_gives_it(case):
    inputs = case.encode(PROMPTS)
    weights = torch.cat([torch.eye(2), torch.rand(4, 2, generator=torch.Generator().manual_seed(0))])
    ends = case.ensemble.generation_config.eos_token_id
    pad = case.base.tokenizer.pad_token_id
    decoder = TrieDecoder(case.ensemble, **inputs, max_new_tokens=STEPS, eos_token_id=ends, pad_token_id=pad)
    found = decoder.decode(weights)  # (C, P, T)
    start = inputs["input_ids"].shape[1]
    for row, tokens in zip(weights, found, strict=True):
        alone_ = case.ensemble.generate(**inputs, weights=row, max_new_tokens=STEPS, do_sample=False, pad_token_id=pad)[
            :, start:
        ]
        assert torch.equal(tokens[:, : alone_.shape[1]], alone_)
    assert len({tuple(tokens.flatten().tolist()) for tokens in found}) > 2


@pytest.fixture(scope="module", params=VOCABULARIES)
def engine(request, bases) -> UnionEngine:
    """Of both models; what begins a string is looked up once, where the slow reference asks at each step."""
    pair = [bases(name) for name in NAMES]
    made = UnionEngine([one.model for one in pair], [one.tokenizer for one in pair], NAMES, vocabulary=request.param, top_k=5)
    made.union.first_tokens = functools.cache(made.union.first_tokens)
    return made


def alone(engine, which, text):
    """The bytes and the number of tokens that `generate()` writes, special tokens but the end left out."""
    model, tokenizer, spelling = engine.models[which], engine.tokenizers[which], engine.union.spellings[which]
    inputs = encode(tokenizer, [[{"role": "user", "content": text}] if is_chat(tokenizer) else text])
    ends = model.generation_config.eos_token_id
    special = [i for i, data in enumerate(spelling.token_bytes) if data is None and i not in [ends, tokenizer.eos_token_id]]
    options = {"max_new_tokens": UNION_STEPS, "do_sample": False, "suppress_tokens": special}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()
    return b"".join(spelling.token_bytes[id_] or b"" for id_ in ids), len(ids)


def test_with_all_weight_a_model_writes_every_script_as_alone(engine):
    for which, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        expected = [alone(engine, which, text) for text in SCRIPTS.values()]
        writing = written(engine, list(SCRIPTS.values()), [(weights, 5)], max_new_tokens=UNION_STEPS)
        assert list(zip(data_of(writing), writing.tokens, strict=True)) == expected


def test_both_write_every_script_as_they_do_when_all_is_read_anew_at_each_step(engine):
    prompts, schedule = list(SCRIPTS.values()), [([0.5, 0.5], 3), ([0.0, 1.0], 2), ([0.6, 0.4], 4)]
    found = data_of(written(engine, prompts, schedule, max_new_tokens=UNION_STEPS))
    assert found == [SlowReference(engine, prompt).write(schedule, UNION_STEPS) for prompt in prompts]
    assert any(byte > 127 for data in found for byte in data)


def test_behind_a_prompt_longer_than_gemmas_window_each_writes_as_alone(engine):
    for which, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        writing = written(engine, [LONG], [(weights, 5)], max_new_tokens=UNION_STEPS)
        assert (data_of(writing)[0], writing.tokens[0]) == alone(engine, which, LONG)
