"""What the levels of aggregation must have in common, and that the benchmark runs; its timings are not tested."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.aggregation_levels import (
    HIDDEN,
    PARAMETERS,
    SYNCHRONISED,
    UNSYNCHRONISED,
    default_weights,
    equal_share,
    main,
    make_case,
    make_levels,
    own_probabilities,
    until_end,
)
from emorl.policies.adapters import read_adapter

STEPS, WEIGHTS = 12, [0.5, 0.3, 0.2]
GREEDY = {"max_new_tokens": STEPS, "do_sample": False}
SEQ2SEQ = {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "k", "v", "o", "wi", "wo"]}


@pytest.fixture(scope="module", params=["causal", "t5"])
def case(request, make_causal_model, make_seq2seq_model, write_adapter, tokenizer, tmp_path_factory):
    """Texts that end at different positions: the end is a token that a greedy text has in its middle."""
    directory = tmp_path_factory.mktemp(request.param)
    base = make_causal_model("llama") if request.param == "causal" else make_seq2seq_model(initializer_factor=2.0)
    lora = SEQ2SEQ if request.param == "t5" else {}
    adapters = {str(seed): read_adapter(write_adapter(base, directory / str(seed), seed=seed, **lora)) for seed in range(3)}
    inputs = dict(tokenizer(["hi", "how are you", "x"], return_tensors="pt", padding=True))
    endless = make_case(base, adapters, inputs, GREEDY)
    text = make_levels(endless, sample=False, seed=0)[HIDDEN](WEIGHTS)[1]
    return replace(endless, ends=[int(text[STEPS // 2])])


@pytest.fixture(scope="module")
def levels(case):
    return make_levels(case, sample=False, seed=0)


def one_hot(policy):
    return [float(index == policy) for index in range(3)]


@pytest.mark.parametrize("weights", [WEIGHTS, [1.0, 0.2, 0.6], [0.0, 2.0, 1.0]])
def test_synchronised_logits_give_the_tokens_of_hidden_states(levels, case, weights):
    tokens = levels[HIDDEN](weights)
    assert tokens.shape == (3, STEPS)
    assert torch.equal(levels[SYNCHRONISED](weights), tokens)
    assert (levels[HIDDEN](WEIGHTS)[1, STEPS // 2 + 1 :] == case.pad).all()


@pytest.mark.parametrize("policy", [0, 2])
def test_a_policy_alone_is_itself_at_every_level(levels, policy):
    tokens = levels[HIDDEN](one_hot(policy))
    for level in (PARAMETERS, SYNCHRONISED, UNSYNCHRONISED):
        assert torch.equal(levels[level](one_hot(policy)), tokens), level


def test_unsynchronised_probabilities_come_after_each_policys_own_text(levels, case):
    """Two ways agree: with the cache while writing, and reading the finished text at once."""
    expected = torch.zeros(())
    for policy, (model, weight) in enumerate(zip(case.alone, WEIGHTS, strict=True)):
        own = levels[HIDDEN](one_hot(policy))
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                shifted = torch.cat([torch.zeros(3, 1, dtype=torch.long), own[:, :-1]], 1)
                logits = model(**case.inputs, decoder_input_ids=shifted).logits
            else:
                mask = torch.nn.functional.pad(case.inputs["attention_mask"], (0, STEPS), value=1)
                positions = (mask.cumsum(-1) - 1).clamp(min=0)
                tokens = torch.cat([case.inputs["input_ids"], own], 1)
                logits = model(input_ids=tokens, attention_mask=mask, position_ids=positions).logits
                logits = logits[:, case.begin - 1 : -1]
        after = (own == case.ends[0]).cumsum(1) - (own == case.ends[0]).long() > 0
        only_end = torch.nn.functional.one_hot(torch.tensor(case.ends[0]), logits.shape[-1]).float()
        expected = expected + weight * torch.where(after[..., None], only_end, logits.softmax(-1))
    found = levels[UNSYNCHRONISED](WEIGHTS)
    assert torch.equal(found, until_end(expected.argmax(-1), case))
    assert not torch.equal(found, levels[SYNCHRONISED](WEIGHTS))


def test_what_a_policy_writes_alone_follows_its_probabilities_and_ends_for_certain(levels, case):
    with torch.no_grad():
        probabilities = own_probabilities(case, case.alone[0], sample=False)
    assert torch.allclose(probabilities.sum(-1), torch.ones(3, STEPS))
    assert torch.equal(until_end(probabilities.argmax(-1), case), levels[HIDDEN](one_hot(0)))


def test_sampled_texts_repeat_with_their_seed(case):
    one, again, other = (make_levels(case, sample=True, seed=seed)[UNSYNCHRONISED](WEIGHTS) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_equal_tokens_are_counted_until_both_texts_have_ended():
    assert equal_share(torch.tensor([[5, 6, 7, 0, 0]]), torch.tensor([[5, 9, 7, 8, 0]]), pad=0) == 0.5


def test_default_weights_are_inside_the_simplex():
    assert default_weights(2) == [[0.5, 0.5], [0.75, 0.25], [0.25, 0.75]]


@pytest.fixture
def arguments(tmp_path, tiny_base_dir, make_causal_model, write_adapter):
    """A finished training of two policies."""
    base = make_causal_model("llama")
    for seed, name in enumerate(("short", "varied")):
        policy = write_adapter(base, tmp_path / "runs" / "train" / name / "policy", seed=seed)
        (policy / "policy.json").write_text("{}")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me about {index}."}) + "\n" for index in range(8)))
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text(
        f"output: {tmp_path / 'runs'}\nbase: {{model: {tiny_base_dir}}}\n"
        f"data: {{path: {prompts}, validation: 3, test: 2}}\n"
        "objectives: {short: {function: length, minimum: 1, maximum: 3}, varied: {function: distinct_2}}\n"
    )
    return [str(experiment), f"policies={tmp_path / 'runs'}", "--threads", "1", "--json", str(tmp_path / "rows.json")]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_level_is_measured_at_every_weight(arguments, tmp_path, capsys):
    main([*arguments, "--prompts", "2", "--weights", "0.5,0.5", "0.9,0.1"])
    rows = json.loads((tmp_path / "rows.json").read_text())
    levels = [HIDDEN, PARAMETERS, SYNCHRONISED, UNSYNCHRONISED]
    assert [(row["level"], row["weights"]) for row in rows] == [
        (level, weights) for weights in ([0.5, 0.5], [0.9, 0.1]) for level in levels
    ]
    assert all(len(row["completions"]) == 2 for row in rows)
    assert [row["equal_tokens"] for row in rows if row["level"] in (HIDDEN, SYNCHRONISED)] == [1.0] * 4
    printed = capsys.readouterr().out
    assert all(f"| {level} |" in printed for level in levels)


def test_anything_but_plain_greedy_decoding_is_refused(make_causal_model, write_adapter, tokenizer, tmp_path):
    base = make_causal_model("llama")
    adapters = {"one": read_adapter(write_adapter(base, tmp_path / "one"))}
    with pytest.raises(ValueError, match="plain greedy decoding"):
        make_case(base, adapters, dict(tokenizer(["hi"], return_tensors="pt")), {"max_new_tokens": 4, "do_sample": True})
