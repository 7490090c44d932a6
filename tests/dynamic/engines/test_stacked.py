"""Policies of one base that write together, span by span: what must not differ from `generate()` and a slow reference."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.dynamic.engines.engine import Decoding, distribution_signals
from emorl.dynamic.engines.sampling import choose, random_numbers
from emorl.dynamic.engines.stacked import StackedEngine
from emorl.policies.adapters import read_adapter
from emorl.policies.prompts import encode

PROMPTS = ["Hello there, how are you?", "Hi", "My dog died and I do not know what to do now.", "One, two"]


@pytest.fixture(scope="module")
def adapters(
    make_causal_model: Callable[..., Any], write_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: read_adapter(write_adapter(make_causal_model(), folder / name, seed=seed)) for seed, name in enumerate("abc")}


@pytest.fixture(scope="module")
def engine(make_causal_model: Callable[..., Any], adapters: dict[str, Any], tokenizer: Any) -> StackedEngine:
    plain = deepcopy(tokenizer)
    plain.chat_template = None
    return StackedEngine(HiddenStateEnsemble(make_causal_model(), adapters), plain)


@pytest.fixture(scope="module")
def seq2seq_engine(
    make_seq2seq_model: Callable[..., Any],
    write_adapter: Callable[..., Path],
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> StackedEngine:
    plain = deepcopy(tokenizer)
    plain.chat_template, plain.padding_side = None, "right"
    folder, base = tmp_path_factory.mktemp("adapters"), make_seq2seq_model()
    options: dict[str, Any] = {"target_modules": ["q", "v", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    made = {n: read_adapter(write_adapter(base, folder / n, seed=seed, **options)) for seed, n in enumerate("abc")}
    return StackedEngine(HiddenStateEnsemble(base, made), plain)


def write_all(
    engine: StackedEngine, prompts: Sequence[str], schedule: Sequence[Tensor], span: int, decoding: Decoding, **options: Any
) -> Any:
    """Texts written with one entry of the schedule, weights (B, K), after the other."""
    writing = engine.begin(prompts, decoding, **options)
    for weights in schedule:
        writing.write(weights, span)
    return writing


def reference(engine: StackedEngine, prompt: str, schedule: Sequence[Tensor], span: int) -> list[int]:
    """Greedy token ids without any cache: everything is read again for each token, by all policies."""
    ids = encode(engine.tokenizer, [prompt])["input_ids"]
    is_seq2seq = engine.ensemble.config.is_encoder_decoder
    written: Tensor = torch.tensor([[0]]) if is_seq2seq else ids
    start = written.shape[1]
    for weights in schedule:
        for _ in range(span):
            inputs = {"input_ids": ids, "decoder_input_ids": written} if is_seq2seq else {"input_ids": written}
            with torch.no_grad():
                token = engine.ensemble(**inputs, weights=weights, use_cache=False).logits[:, -1].argmax(-1)
            written = torch.cat([written, token[:, None]], 1)
            if int(token) in engine.ends.tolist():
                return written[0, start:].tolist()
    return written[0, start:].tolist()


@pytest.mark.parametrize("kind", ["engine", "seq2seq_engine"])
def test_constant_weights_write_what_generate_does(kind: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(kind)
    weights = torch.tensor([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6], [0.1, 0.1, 0.8]])
    inputs = encode(engine.tokenizer, PROMPTS)
    output = engine.ensemble.generate(**inputs, weights=weights, max_new_tokens=20, do_sample=False)
    before = 1 if kind == "seq2seq_engine" else inputs["input_ids"].shape[1]
    expected = engine.tokenizer.batch_decode(output[:, before:], skip_special_tokens=True)
    writing = write_all(engine, PROMPTS, [weights] * 7, 3, Decoding(max_new_tokens=20))
    assert writing.texts == [text.strip() for text in expected]
    assert bool(writing.finished.all())
    assert max(writing.tokens) == 20


@pytest.mark.parametrize("kind", ["engine", "seq2seq_engine"])
@pytest.mark.parametrize("span", [1, 4])
def test_changing_weights_write_what_decoding_without_a_cache_does(
    kind: str, span: int, request: pytest.FixtureRequest
) -> None:
    engine, generator = request.getfixturevalue(kind), torch.Generator().manual_seed(span)
    schedule = [torch.softmax(4 * torch.randn(4, 3, generator=generator), -1) for _ in range(5)]
    writing = write_all(engine, PROMPTS, schedule, span, Decoding(max_new_tokens=5 * span))
    for row, prompt in enumerate(PROMPTS):
        expected = reference(engine, prompt, [weights[row] for weights in schedule], span)
        assert writing._written[row, : writing.tokens[row]].tolist() == expected


@pytest.mark.parametrize("kind", ["engine", "seq2seq_engine"])
def test_a_policy_without_weight_is_not_run_and_catches_up(kind: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(kind)
    rows = [[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1], [0.2, 0.3, 0.5], [0, 1, 0], [0.4, 0, 0.6]]
    schedule = [torch.tensor(row, dtype=torch.float).expand(4, -1) for row in rows]
    ran = []
    writing = engine.begin(PROMPTS, Decoding(max_new_tokens=18))
    for weights in schedule:
        writing.write(weights, 3)
        ran.append(writing._active)
    assert ran == [(0,), (0, 1), (2,), (0, 1, 2), (1,), (0, 2)]
    for row, prompt in enumerate(PROMPTS):
        expected = reference(engine, prompt, [weights[row] for weights in schedule], 3)
        assert writing._written[row, : writing.tokens[row]].tolist() == expected


def test_equal_policies_write_what_each_of_them_does_whatever_the_weights(
    make_causal_model: Callable[..., Any], adapters: dict[str, Any], engine: StackedEngine
) -> None:
    same = dict.fromkeys("xyz", adapters["a"])
    equal = StackedEngine(HiddenStateEnsemble(make_causal_model(), same), engine.tokenizer)
    generator = torch.Generator().manual_seed(1)
    schedule = [torch.softmax(3 * torch.randn(4, 3, generator=generator), -1) for _ in range(4)]
    alone = [torch.tensor([1.0, 0, 0]).expand(4, -1)] * 4
    decoding = Decoding(max_new_tokens=12)
    together = write_all(equal, PROMPTS, schedule, 3, decoding)
    assert together.texts == write_all(engine, PROMPTS, alone, 3, decoding).texts
    torch.testing.assert_close(together.signals[..., 2], torch.zeros(4, 3), atol=1e-5, rtol=0)  # nobody disagrees


def test_an_end_token_ends_one_text_and_the_others_go_on_unchanged(engine: StackedEngine) -> None:
    generator = torch.Generator().manual_seed(3)
    schedule = [torch.softmax(3 * torch.randn(4, 3, generator=generator), -1) for _ in range(6)]
    whole = write_all(engine, PROMPTS, schedule, 2, Decoding(max_new_tokens=12))
    ended_early = StackedEngine(engine.ensemble, engine.tokenizer)
    ended_early.ends = whole._written[0, 4:5].clone()  # what the first text says as its fifth token
    writing = write_all(ended_early, PROMPTS, schedule, 2, Decoding(max_new_tokens=12))
    for row in range(4):
        tokens = whole._written[row].tolist()
        ends = [place for place, token in enumerate(tokens) if token == int(ended_early.ends)]
        length = ends[0] + 1 if ends else 12
        assert writing.tokens[row] == length
        assert writing._written[row, :length].tolist() == tokens[:length]
    assert writing.tokens[0] <= 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_texts_of_a_batch_do_not_influence_each_other(engine: StackedEngine, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    schedule = [torch.softmax(5 * torch.randn(4, 3, generator=generator), -1) for _ in range(4)]
    decoding = Decoding(max_new_tokens=12, temperature=temperature, top_p=0.9, seed=7)
    together = write_all(engine, PROMPTS, schedule, 3, decoding)
    for row, prompt in enumerate(PROMPTS):
        alone = write_all(engine, [prompt], [weights[row : row + 1] for weights in schedule], 3, decoding, seeds=[row])
        assert alone.texts == [together.texts[row]]
        torch.testing.assert_close(alone.signals[0], together.signals[row], atol=1e-4, rtol=1e-3)


def test_nothing_is_kept_between_requests(engine: StackedEngine) -> None:
    weights, decoding = torch.tensor([[0.2, 0.3, 0.5]]), Decoding(max_new_tokens=8)
    first = write_all(engine, PROMPTS[:1], [weights], 8, decoding).texts
    write_all(engine, PROMPTS, [torch.eye(3)[[0, 1, 2, 0]]] * 2, 4, decoding)
    assert write_all(engine, PROMPTS[:1], [weights], 8, decoding).texts == first


def test_signals_are_of_each_policy_and_stale_where_it_was_not_run(engine: StackedEngine) -> None:
    writing = engine.begin(PROMPTS, Decoding(max_new_tokens=8))
    before = writing.signals
    assert before.shape == (4, 3, 4)
    assert bool(((before >= 0) & (before <= 1)).all())
    assert not before[..., 3].any()
    for policy in range(3):  # what the policy alone says of the first token
        with torch.no_grad():
            one = engine.ensemble(**encode(engine.tokenizer, PROMPTS[:1]), weights=torch.eye(3)[policy]).logits[0, -1]
        assert before[0, policy, 1] == pytest.approx(float(one.softmax(-1).max()), abs=1e-5)
    writing.write(torch.tensor([1.0, 0, 0]).expand(4, -1), 2)
    after = writing.signals
    assert after[..., 3].tolist() == [[0, 1, 1]] * 4
    torch.testing.assert_close(after[:, 1:, :3], before[:, 1:, :3])
    assert not torch.equal(after[:, 0, :3], before[:, 0, :3])
    assert writing.states.shape == (4, 3, engine.state_width)


def test_signals_of_known_distributions() -> None:
    certain, uniform = torch.tensor([1.0, 0, 0, 0]), torch.full((4,), 0.25)
    other = torch.tensor([0, 1.0, 0, 0])
    found = distribution_signals(torch.stack([certain, uniform])[None])[0]
    assert found[:, 0].tolist() == pytest.approx([0, 1])
    assert found[:, 1].tolist() == pytest.approx([1, 0.25])
    same = distribution_signals(torch.stack([uniform, uniform])[None])[0]
    assert same[:, 2].tolist() == pytest.approx([0, 0], abs=1e-6)
    opposed = distribution_signals(torch.stack([certain, other])[None])[0]  # each against (1/2, 1/2)
    assert opposed[:, 2].tolist() == pytest.approx([0.311278] * 2, abs=1e-5)


def test_sampling_follows_the_distribution_and_its_nucleus() -> None:
    probabilities = torch.tensor([0.1, 0.6, 0.05, 0.25])
    uniform = (torch.arange(10000) + 0.5) / 10000
    logits = probabilities.log().expand(10000, -1)
    counts = choose(logits, Decoding(1, temperature=1.0), uniform).bincount(minlength=4) / 10000
    torch.testing.assert_close(counts, probabilities, atol=2e-4, rtol=0)
    counts = choose(logits, Decoding(1, temperature=1.0, top_p=0.7), uniform).bincount(minlength=4) / 10000
    torch.testing.assert_close(counts, torch.tensor([0, 0.6 / 0.85, 0, 0.25 / 0.85]), atol=2e-4, rtol=0)
    assert choose(logits[:1], Decoding(1), uniform[:1]).tolist() == [1]
    assert torch.equal(random_numbers(Decoding(5, 1.0), [3, 4])[1], random_numbers(Decoding(5, 1.0), [4])[0])


def test_wrong_settings_are_refused(engine: StackedEngine) -> None:
    with pytest.raises(ValueError, match="max_new_tokens >= 1"):
        Decoding(0)
    with pytest.raises(ValueError, match=r"expected \(4, 3\)"):
        engine.begin(PROMPTS, Decoding(4)).write(torch.ones(4, 2) / 2, 2)
    with pytest.raises(ValueError, match="sum 1"):
        engine.begin(PROMPTS, Decoding(4)).write(torch.ones(4, 3), 2)


def test_what_is_seen_of_a_text_does_not_depend_on_its_batch_where_weights_are_zero(engine: StackedEngine) -> None:
    """Each text leaves out other policies, which the others' texts need."""
    rows = [[[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]], [[0, 0.3, 0.7], [0, 1, 0], [1, 0, 0], [0.5, 0, 0.5]]]
    schedule = [torch.tensor(weights, dtype=torch.float) for weights in rows]

    def seen(prompts: Sequence[str], weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        writing, found = engine.begin(prompts, Decoding(8)), []
        for each in weights:
            writing.write(each, 3)
            found.append((writing.signals, writing.states))
        return found

    together = seen(PROMPTS, schedule)
    assert together[0][0][..., 3].tolist() == [[0, 1, 1], [1, 0, 1], [1, 1, 0], [0, 0, 1]]
    for row, prompt in enumerate(PROMPTS):
        for (signals, states), (of_batch, states_of_batch) in zip(
            seen([prompt], [weights[row : row + 1] for weights in schedule]), together, strict=True
        ):
            torch.testing.assert_close(signals[0], of_batch[row], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(states[0], states_of_batch[row], atol=1e-4, rtol=1e-3)
