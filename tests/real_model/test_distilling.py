"""The ensemble of a real model as a teacher: SmolLM2, whose template has a default system turn; Gemma, without a template."""

import pytest
import torch

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.aggregation.teacher import EnsembleTeacher
from emorl.config.experiment import BaseConfig
from emorl.policies.adapters import read_adapter
from emorl.policies.base import load_base
from emorl.policies.preference_line import PreferenceLine
from emorl.policies.prompts import encode, is_chat

pytestmark = pytest.mark.realmodel

WEIGHTS = {"0": 0.7, "1": 0.3}
TOLD = "Priorities: 0 70 %, 1 30 %."


@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
@torch.no_grad()
def test_the_teacher_is_the_ensemble_and_reads_no_line(real_model, name, write_adapter, tmp_path):
    base = load_base(BaseConfig(model=str(real_model(name))))
    paths = [write_adapter(base.model, tmp_path / str(seed), alpha=0.5, seed=seed) for seed in range(2)]
    ensemble = HiddenStateEnsemble(base.model, {path.name: read_adapter(path) for path in paths}, WEIGHTS)
    texts = ["Write one sentence about the sea.", "I lost my job last week and I cannot sleep."]
    prompts = [[{"role": "user", "content": text}] for text in texts] if is_chat(base.tokenizer) else texts
    inputs = encode(base.tokenizer, prompts)
    teacher, mask = EnsembleTeacher(ensemble), inputs["attention_mask"]
    seen = teacher.get_output_embeddings()(teacher.base_model(**inputs).last_hidden_state)
    meant = ensemble(**inputs, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits
    off = (seen.log_softmax(-1) - meant.log_softmax(-1))[mask.bool()].abs().max()
    assert off < 1e-3
    line = PreferenceLine.of("Priorities: {weights}.", list(WEIGHTS), base.tokenizer)
    told, plain = (base.tokenizer.decode(encode(base.tokenizer, [prompt])["input_ids"][0]) for prompt in (
        line.put_into(prompts[0], WEIGHTS), prompts[0]
    ))  # fmt: skip
    assert TOLD in told
    assert TOLD not in plain
    if name == "smollm2":
        assert "named SmolLM" in plain  # its default system turn, in whose place the line stands
        assert "named SmolLM" not in told
        assert told.count("system") == 1
