"""The same identities on a CPU and, marked `gpu`, on CUDA in both precisions: PEFT, the trie, the row cache."""

from copy import deepcopy

import pytest
import torch
from peft import PeftModel
from transformers import DynamicCache

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.row_batch import PromptReading, RowBatch
from emorl.aggregation.row_cache import RowCache
from emorl.aggregation.trie import TrieDecoder
from emorl.policies.adapters import read_adapter

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
STEPS = 12
PROMPTS = ["hello", "how are you today", "a"]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=["llama", "gemma3_text"])
def parts(request, device, make_causal_model, write_adapter, tokenizer, tmp_path):
    """A base on the device, the folders of two adapters, and inputs there."""
    base = make_causal_model(request.param)
    paths = [write_adapter(base, tmp_path / str(seed), rank=2 + seed, seed=seed) for seed in range(2)]
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True).to(device)
    return base.to(device), paths, dict(inputs)


def policies(base, paths):
    """The ensemble, and PEFT's own model of each policy."""
    peft = [PeftModel.from_pretrained(deepcopy(base), str(path)).eval() for path in paths]
    return HiddenStateEnsemble(base, {path.name: read_adapter(path) for path in paths}), peft


@torch.no_grad()
def test_one_policy_alone_is_peft_token_for_token_in_float32(parts):
    base, paths, inputs = parts
    ensemble, peft = policies(base, paths)
    for weights, policy in zip(([1.0, 0.0], [0.0, 1.0]), peft, strict=True):
        expected = policy.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
        assert torch.equal(ensemble.generate(**inputs, weights=weights, max_new_tokens=STEPS, do_sample=False), expected)
        assert expected.device.type == base.device.type


@torch.no_grad()
def test_one_policy_alone_is_peft_but_for_rounding_in_bfloat16(parts):
    base, paths, inputs = parts
    exact = policies(base, paths)[1]
    ensemble, peft = policies(deepcopy(base).to(torch.bfloat16), paths)
    for weights, policy, reference in zip(([1.0, 0.0], [0.0, 1.0]), peft, exact, strict=True):
        found, theirs = ensemble(**inputs, weights=weights).logits[:, -1].float(), policy(**inputs).logits[:, -1].float()
        rounding = (theirs - reference(**inputs).logits[:, -1]).abs().max()  # of PEFT's own model in bfloat16
        assert rounding > 0
        assert (found - theirs).abs().max() <= rounding


@torch.no_grad()
def test_the_trie_gives_each_candidate_what_generate_gives_it(parts):
    base, paths, inputs = parts
    ensemble, _ = policies(base, paths)
    weights = torch.cat([torch.eye(2), torch.rand(5, 2, generator=torch.Generator().manual_seed(1))])
    found = TrieDecoder(ensemble, **inputs, max_new_tokens=STEPS).decode(weights)
    options = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None}
    for row, tokens in zip(weights, found, strict=True):
        expected = ensemble.generate(**inputs, weights=row, **options)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(tokens.cpu(), expected.cpu())


def test_a_row_cache_holds_what_transformers_own_holds(device):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = RowCache(), DynamicCache()
    for new in (5, 1, 70, 1):  # beyond the room it first keeps
        states = [torch.randn(3, 2, new, 4, generator=generator).to(device) for _ in range(2)]
        for found, expected in zip(ours.update(*states, 0), theirs.update(*states, 0), strict=True):
            assert torch.equal(found, expected)
            assert found.device.type == device
    rows = torch.tensor([2, 0], device=device)
    ours.batch_select_indices(rows)
    theirs.batch_select_indices(rows)
    assert torch.equal(ours.layers[0].keys, theirs.layers[0].keys)


@torch.no_grad()
def test_texts_that_come_and_go_are_those_of_generate(parts):
    base, paths, inputs = parts
    ensemble, _ = policies(base, paths)
    prompts = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    weights = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]])
    batch, written = RowBatch(ensemble, (0, 1)), [[] for _ in prompts]
    for prompt, row, text in zip(prompts, weights, written, strict=True):
        reading = PromptReading(ensemble, prompt, row)
        text.append(int(reading.read(1000)[-1].argmax()))
        batch.join(reading)
        for each, token in zip(
            written, batch.step([each[-1] for each in written[: len(batch)]]).argmax(-1).tolist(), strict=False
        ):
            each.append(token)
    order = batch.leave([0])
    assert order == [2, 1]
    for text, token in zip(
        [written[row] for row in order], batch.step([written[row][-1] for row in order]).argmax(-1), strict=True
    ):
        text.append(int(token))
    for prompt, row, text in zip(prompts, weights, written, strict=True):
        ids = torch.tensor([prompt], device=base.device)
        alone = ensemble.generate(ids, weights=row, max_new_tokens=len(text), do_sample=False, eos_token_id=None)
        assert text == alone[0, len(prompt) :].tolist()
