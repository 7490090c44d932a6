"""Specificity on a random tiny encoder: its formula, and the bound that no fixed sentence can beat."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel

from emorl.objectives.models.similarity import SentenceEncoder, Specificity, shared_encoder

PROMPTS = [f"I keep thinking about {thing}." for thing in ("my knee", "the exam", "my boss", "smoking", "rent", "sleep")]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=300, pad_token_id=0, initializer_range=0.5, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_evidence_by_hand(encoder):
    own, others, said = (SentenceEncoder(encoder)(texts) for texts in ([PROMPTS[0]], PROMPTS, ["Your knee hurts."]))
    expected = (own @ said[0] / 0.1).item() - torch.log((others @ said[0] / 0.1).exp().mean()).item()
    specificity = Specificity(encoder, PROMPTS, temperature=0.1, slope=2.0, offset=0.5)
    assert specificity.evidence([PROMPTS[0]], ["Your knee hurts."]).item() == pytest.approx(expected, abs=1e-4)
    score = 1 / (1 + math.exp(-2 * (expected - 0.5)))
    assert specificity([PROMPTS[0]], ["Your knee hurts."]) == pytest.approx([score], abs=1e-4)


@pytest.mark.parametrize("sentence", ["You feel that you'd feel.", "smoking", PROMPTS[3]])
def test_no_sentence_has_evidence_for_everyone(encoder, sentence):
    evidence = Specificity(encoder, PROMPTS, temperature=0.1).evidence(PROMPTS, [sentence] * len(PROMPTS))
    assert evidence.exp().mean().item() == pytest.approx(1.0, abs=1e-4)


def test_the_bank_may_be_a_file(encoder, tmp_path):
    (tmp_path / "bank.txt").write_text("\n".join([*PROMPTS, "", " "]))
    texts = [f"You said {'so ' * n}much." for n in range(6)]
    one, other = Specificity(encoder, str(tmp_path / "bank.txt")), Specificity(encoder, PROMPTS)
    assert one(PROMPTS, texts) == pytest.approx(other(PROMPTS, texts), abs=1e-4)
    assert other([], []) == []
    assert other(["p"], [" "]) == [0.0]
    chat = [[{"role": "user", "content": PROMPTS[0]}]]
    assert other(chat, [[{"role": "assistant", "content": texts[0]}]]) == pytest.approx(other(PROMPTS[:1], texts[:1]))


def test_batches_do_not_matter_and_objectives_share_one_encoder(encoder):
    texts = [f"You said {'so ' * n}much." for n in range(6)]
    one, other = SentenceEncoder(encoder, batch_size=1)(texts), SentenceEncoder(encoder, batch_size=64)(texts)
    assert torch.allclose(one, other, atol=1e-5)
    assert shared_encoder(encoder) is shared_encoder(encoder)


def test_mistakes_are_named(encoder):
    with pytest.raises(ValueError, match="at least 2 prompts"):
        Specificity(encoder, ["one"])
    with pytest.raises(ValueError, match=r"no file 'nowhere\.txt'"):
        Specificity(encoder, "nowhere.txt")
    with pytest.raises(ValueError, match="expected temperature > 0"):
        Specificity(encoder, PROMPTS, temperature=0)
