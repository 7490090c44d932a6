"""A real llama-server, where there is one, writes what `ParameterAverage` writes at the same scales."""

import pytest
import torch

from emorl.aggregation.ensemble import ParameterAverage
from emorl.fusion.export_card import Exported
from emorl.fusion.gguf_lora import export_gguf_lora
from emorl.policies.adapters import read_adapter
from recipes.serve.llama_cpp import SERVER, Agreement, find_server, greedy, serving
from tests.policies.test_gguf import write_base

pytestmark = pytest.mark.realmodel


@pytest.fixture(scope="module")
def program():
    found = find_server()
    if found is None:
        pytest.skip(f"no llama-server on the PATH, nor in {SERVER}")
    return found


def test_requests_choose_scales_and_get_the_soups_tokens(program, make_causal_model, write_adapter, tokenizer, tmp_path):
    model = make_causal_model("llama", vocab_size=262)
    policies = {
        name: read_adapter(write_adapter(model, tmp_path / name, seed=seed, rank=2 + seed))
        for seed, name in enumerate(("kind", "brief"))
    }
    what = Exported(policies, {"kind": 1.0, "brief": 0.0}, "tiny", model.config, "emorl export")
    facts = export_gguf_lora(what, tmp_path, tmp_path, [])
    base = write_base(model, tokenizer, tmp_path / "base.gguf")
    prompts = [tokenizer(text).input_ids for text in ("say yes", "no", "a longer prompt than these", "x")]
    mixture = ParameterAverage(model, policies, include_base=True)
    alone = greedy(mixture, tokenizer, prompts, [0.0, 0.0], 12)
    with serving(program, base, [tmp_path / name for name in facts["files"]]) as server:
        for scales in ([0.7, 0.3], [1.0, 0.0], [-0.5, 1.5], [0.0, 0.0]):
            theirs = [server.greedy(ids, scales, 12) for ids in prompts]
            found = Agreement.of(greedy(mixture, tokenizer, prompts, scales, 12), theirs, alone)
            assert found.same >= 0.95 * found.tokens, (scales, theirs)
            assert any(scales) == (found.as_base < 0.5 * found.tokens)
    assert torch.is_grad_enabled()
