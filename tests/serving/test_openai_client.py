"""The real `openai` package against the real server: whole and streamed, a trade-off per request, its errors by type."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from emorl.aggregation.ensemble import MIXTURES
from emorl.config.experiment import load_kept_experiment
from emorl.runs.layout import ENSEMBLE
from emorl.stages.generate import Wish, generate_lines
from emorl.stages.materials import Materials
from tests.serving.wire import health, is_idle

pytestmark = pytest.mark.usefixtures("no_errors")
FRONT_BY_VALUE = [{"brief": 0.6, "varied": 0.4}, {"brief": 0.25, "varied": 0.25, "fresh": 0.5}, {"varied": 1}]
TALK = [{"role": "user", "content": "say yes"}]
LONG = "once upon a time"  # answered at length by the best point


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def chat(client):
    def ask(model="emorl", messages=TALK, **fields):
        return client.chat.completions.create(model=model, messages=messages, **fields)

    return ask


@pytest.fixture(scope="module")
def complete(client):
    def ask(prompt="say yes", model="emorl", **fields):
        return client.completions.create(model=model, prompt=prompt, **fields)

    return ask


@pytest.fixture(scope="module")
def ensemble(searched):
    """What the search saved, loaded once more, and its tokenizer."""
    base = Materials(load_kept_experiment(searched.output)).base
    return MIXTURES["hidden_states"].from_pretrained(searched.search / ENSEMBLE, base=base.model), base.tokenizer


def text_of(answer):
    return answer.choices[0].message.content


def offsets(tokens):
    """Where each begins in all of them."""
    return [sum(map(len, tokens[:place])) for place in range(len(tokens))]


def test_the_list_is_the_front_by_value_the_soups_the_policies_and_the_base(client):
    models = {model.id: model.emorl for model in client.models.list()}
    points = ["best", "front/1", "front/2", "front/3"]
    singles = ["emorl/policy/brief", "emorl/policy/varied", "emorl/policy/fresh", "emorl/base"]
    assert list(models) == [f"emorl/{name}" for name in points] + [f"emorl/soup/{name}" for name in points] + singles
    assert [models[f"emorl/front/{number}"]["value"] for number in (1, 2, 3)] == [0.53, 0.52, 0.47]
    assert models["emorl/best"]["weights"] == models["emorl/front/1"]["weights"] == {"brief": 0.6, "varied": 0.4, "fresh": 0.0}
    assert models["emorl/front/3"]["scores"] == {"brief": 0.2, "varied": 0.9, "fresh": 0.3}
    assert client.models.retrieve("emorl/front/2").emorl == models["emorl/front/2"]


@pytest.mark.parametrize(
    "weights", [{"brief": 1.0}, {"brief": 0.6, "varied": 0.4}, {"brief": 0.2, "varied": 0.3, "fresh": 0.5}]
)
def test_an_answer_is_that_of_emorl_generate(searched, chat, weights):
    for prompt in ("say yes", "what is it?", "naïve 🙂"):
        [line] = generate_lines(searched.output, [prompt], Wish(weights=weights), as_json=True)
        answer = chat(messages=[{"role": "user", "content": prompt}], extra_body={"weights": weights})
        assert text_of(answer) == json.loads(line)["completion"]
        assert {name: weight for name, weight in answer.emorl["weights"].items() if weight} == weights


def test_a_preference_chooses_the_point_that_emorl_generate_chooses(searched, chat):
    texts = set()
    for prefer in ({"brief": 1.0}, {"varied": 1.0}, {"fresh": 1.0}, {"varied": 0.4, "fresh": 0.6}):
        [line] = generate_lines(searched.output, ["say yes"], Wish(prefer=prefer), as_json=True)
        answer, expected = chat(extra_body={"prefer": prefer}), json.loads(line)
        assert (text_of(answer), answer.emorl["weights"]) == (expected["completion"], expected["weights"])
        assert answer.emorl["scores"] == expected["scores"]
        texts.add(text_of(answer))
    assert len(texts) == 3


def test_a_trade_off_by_name_is_the_one_by_field(chat):
    for number, weights in enumerate(FRONT_BY_VALUE, 1):
        named, written = chat(f"emorl/front/{number}"), ",".join(f"{name}={weight}" for name, weight in weights.items())
        assert text_of(named) == text_of(chat(extra_body={"weights": weights})) == text_of(chat(f"emorl/{written}"))
        assert named.emorl == chat(f"emorl/{written}").emorl | {"model": f"emorl/front/{number}"}
    assert text_of(chat("emorl/policy/fresh")) == text_of(chat("emorl/fresh=1"))
    of_all = [text_of(chat(model)) for model in ("emorl/best", "emorl/soup/best", "emorl/base", "emorl/policy/brief")]
    assert len(set(of_all)) == 4


@pytest.mark.parametrize(
    "fields", [{}, {"temperature": 1.0, "seed": 3}, {"max_tokens": 1}, {"n": 3, "temperature": 2.0, "seed": 1}]
)
def test_the_pieces_of_a_streamed_chat_are_the_whole_answer(chat, fields):
    whole = chat(messages=[{"role": "user", "content": "naïve 🙂"}], **fields)
    chunks = list(chat(messages=[{"role": "user", "content": "naïve 🙂"}], stream=True, **fields))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.delta.content or "" for part in parts) == choice.message.content
        assert parts[0].delta.role == "assistant"
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + [choice.finish_reason]
    assert {chunk.id for chunk in chunks} == {chunks[0].id} != {whole.id}
    assert all(chunk.emorl == whole.emorl and chunk.usage is None for chunk in chunks)


def test_the_pieces_of_streamed_completions_are_the_whole_ones(complete):
    fields = {
        "prompt": ["one", "two", "é"],
        "n": 2,
        "temperature": 1.0,
        "seed": 5,
        "echo": True,
        "logprobs": 2,
        "max_tokens": 6,
    }
    whole, chunks = complete(**fields), list(complete(**fields, stream=True))
    assert [choice.index for choice in whole.choices] == list(range(6))
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        told = {
            name: [value for part in parts for value in getattr(part.logprobs, name)]
            for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs")
        }
        assert told["tokens"] == choice.logprobs.tokens
        assert told["text_offset"] == choice.logprobs.text_offset == offsets(choice.logprobs.tokens)
        assert told["token_logprobs"] == pytest.approx(choice.logprobs.token_logprobs, abs=1e-4)
        assert [top and sorted(top) for top in told["top_logprobs"]] == [
            top and sorted(top) for top in choice.logprobs.top_logprobs
        ]


def test_a_stream_ends_with_the_counts_of_the_whole_answer_where_they_are_asked_for(chat, complete):
    for ask in (chat, complete):
        *_, last = ask(stream=True, stream_options={"include_usage": True}, max_tokens=5)
        assert last.choices == []
        assert last.usage == ask(max_tokens=5).usage
    assert complete("four", max_tokens=3).usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7,
    }  # fmt: skip


def test_a_seed_decides_a_sampled_answer_and_those_behind_it(chat):
    def texts(seed, **fields):
        return [choice.message.content for choice in chat(seed=seed, temperature=1.0, **fields).choices]

    assert texts(1) == texts(1) != texts(2)
    assert texts(1, n=3) == texts(1) + texts(2) + texts(3)
    assert texts(2**63 - 2, n=3) != texts(-(2**63), n=3)


def test_temperature_0_is_greedy_and_a_tiny_nucleus_too_whatever_the_seed(chat):
    greedy = text_of(chat())  # as the experiment says
    assert text_of(chat(temperature=0, seed=1)) == greedy
    assert text_of(chat(temperature=1.0, top_p=1e-6, seed=2)) == greedy
    assert text_of(chat(temperature=1.0, extra_body={"top_k": 1}, seed=3)) == greedy
    assert text_of(chat(temperature=1.0, seed=1)) != greedy


def test_an_answer_ends_before_a_stop_string_of_several_tokens(complete):
    whole = complete(LONG, max_tokens=60).choices[0].text
    pairs = [(place, whole[place : place + 2]) for place in range(5, len(whole) - 1) if whole[place : place + 2].isascii()]
    assert pairs
    for place, stop in pairs[:4]:
        place = whole.find(stop)
        answer = complete(LONG, max_tokens=60, stop=["never in it", stop]).choices[0]
        assert (answer.text, answer.finish_reason) == (whole[:place], "stop")
        streamed = [chunk.choices[0] for chunk in complete(LONG, max_tokens=60, stop=stop, stream=True)]
        assert "".join(part.text for part in streamed) == whole[:place]
        assert streamed[-1].finish_reason == "stop"


def test_max_tokens_cut_an_answer_short(chat, complete):
    for most in (1, 2, 7):
        for answer in (chat(max_tokens=most), chat(max_completion_tokens=most), complete(max_tokens=most)):
            assert answer.usage.completion_tokens == most
            assert answer.choices[0].finish_reason == "length"
    assert complete(max_tokens=0, echo=True).choices[0].text == "say yes"


def logprobs_of(ensemble, ids, weights):
    """(T - 1, V): of the token behind each."""
    mixture, _ = ensemble
    with torch.no_grad():
        row = torch.tensor(mixture.in_order(weights), dtype=torch.float32)
        return torch.log_softmax(mixture(input_ids=torch.tensor([ids]), weights=row).logits[0].float(), -1)[:-1]


def test_log_probabilities_are_those_of_the_ensembles_own_logits(ensemble, chat, complete):
    mixture, tokenizer = ensemble
    weights = {"brief": 0.2, "varied": 0.3, "fresh": 0.5}
    for prompt, ask in (
        (tokenizer("say yes")["input_ids"], lambda **fields: complete(**fields, logprobs=3)),
        (
            tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"],
            lambda **fields: chat(**fields, logprobs=True, top_logprobs=3),
        ),
    ):
        ids = mixture.generate(torch.tensor([prompt]), weights=weights, max_new_tokens=9, do_sample=False)[0].tolist()
        expected = logprobs_of(ensemble, ids, weights)[len(prompt) - 1 :]
        own, best = expected[range(len(expected)), ids[len(prompt) :]], expected.topk(3).values
        given = ask(max_tokens=9, extra_body={"weights": weights}).choices[0].logprobs
        if hasattr(given, "content"):
            told = [token.logprob for token in given.content]
            tops = [[alternative.logprob for alternative in token.top_logprobs] for token in given.content]
            assert torch.tensor(tops) == pytest.approx(best, abs=1e-4)
        else:
            told = given.token_logprobs
            assert [max(top.values()) for top in given.top_logprobs] == pytest.approx(best[:, 0].tolist(), abs=1e-4)
        assert told == pytest.approx(own.tolist(), abs=1e-4)


def test_the_prompts_tokens_are_scored_where_it_is_repeated(ensemble, complete):
    _, tokenizer = ensemble
    for prompt in ("say yes", "né 🙂", "<|user|>x<|end|>"):
        ids = tokenizer(prompt)["input_ids"]
        expected = logprobs_of(ensemble, ids, FRONT_BY_VALUE[0])[range(len(ids) - 1), ids[1:]].tolist()
        for given in (prompt, ids):
            answer = complete(given, echo=True, logprobs=0, max_tokens=0).choices[0]
            assert answer.text == prompt
            assert answer.logprobs.tokens == [tokenizer.decode([token]) for token in ids]
            assert answer.logprobs.token_logprobs[0] is answer.logprobs.top_logprobs[0] is None
            assert answer.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_a_token_that_is_part_of_a_character_has_no_bytes_of_its_own(chat):
    tokens = chat(logprobs=True, max_tokens=60, messages=[{"role": "user", "content": LONG}]).choices[0].logprobs.content
    assert {token.token == "\ufffd" for token in tokens} == {True, False}
    assert all(token.bytes == (None if token.token == "\ufffd" else list(token.token.encode())) for token in tokens)


def test_requests_with_different_weights_at_once_get_what_each_gets_alone(url, chat):
    trade_offs = [{"brief": 1 + number, "varied": 8 - number, "fresh": number % 3} for number in range(8)]

    def ask(number):
        sampling = {"temperature": 1.0, "seed": number} if number % 2 else {}
        said = [{"role": "user", "content": "tell me " + "more " * number}]
        answer = chat(messages=said, extra_body={"weights": trade_offs[number]}, max_tokens=40 + 10 * number, **sampling)
        return answer.choices[0].model_dump()

    alone, most = [ask(number) for number in range(8)], 0
    with ThreadPoolExecutor(8) as pool:
        together = [pool.submit(ask, number) for number in range(8)]
        while not all(answer.done() for answer in together):
            most = max(most, health(url)["running"])
            time.sleep(0.01)
    assert [answer.result() for answer in together] == alone
    assert most > 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_rows(url, client, chat, stream):
    """Written to their ends, these texts would take far longer than is waited for."""
    fields = {"messages": TALK, "n": 30, "max_tokens": 2000, "logprobs": True}
    if stream:
        with chat(**fields, stream=True) as chunks:
            next(chunks)
    else:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.5).chat.completions.create(model="emorl", **fields)
    assert not is_idle(url, 0)
    assert is_idle(url, 3)
    assert text_of(chat())


MISTAKES = [
    (
        {"model": "emorl/fornt/1"},
        openai.NotFoundError,
        "model",
        "no model is called 'emorl/fornt/1'; did you mean 'emorl/front/1'",
    ),
    ({"model": "emorl/front/9"}, openai.NotFoundError, "model", "the front has points 1 to 3"),
    ({"model": "gpt-4"}, openai.NotFoundError, "model", "no model is called 'gpt-4'"),
    ({"extra_body": {"weights": {"breif": 1}}}, openai.BadRequestError, "weights", "no policy is called 'breif'; did you mean"),
    ({"extra_body": {"weights": {"brief": -1}}}, openai.BadRequestError, "weights", "none below 0"),
    ({"extra_body": {"weights": {"brief": 0}}}, openai.BadRequestError, "weights", "not all 0"),
    ({"extra_body": {"prefer": {"breif": 1}}}, openai.BadRequestError, "prefer", "breif"),
    ({"extra_body": {"weights": {"brief": 1}, "prefer": {"brief": 1}}}, openai.BadRequestError, "prefer", "send one of both"),
    (
        {"model": "emorl/base", "extra_body": {"weights": {"brief": 1}}},
        openai.BadRequestError,
        "weights",
        "without a trade-off",
    ),
    ({"model": "emorl/front/1", "extra_body": {"weights": {"brief": 1}}}, openai.BadRequestError, "model", "names a trade-off"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "temprature", "did you mean 'temperature'"),
    ({"temperature": -1}, openai.BadRequestError, "temperature", "greater than or equal to 0"),
    ({"max_tokens": 5000}, openai.BadRequestError, "max_tokens", "the model has 2,048"),
    ({"n": 100}, openai.BadRequestError, "n", "more than the 32 texts"),
    ({"presence_penalty": 1.0}, openai.BadRequestError, "presence_penalty", "not served here"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, openai.BadRequestError, "messages", "must be the user's"),
    ({"messages": []}, openai.BadRequestError, "messages", "at least 1 item"),
]


def test_fields_that_would_say_nothing_here_are_refused(complete):
    for fields in ({"best_of": 2}, {"suffix": "x"}, {"frequency_penalty": 0.5}, {"logit_bias": {"5": 1}}):
        with pytest.raises(openai.BadRequestError) as refusal:
            complete(**fields)
        assert refusal.value.param == next(iter(fields))
    plain = complete().choices[0].text
    assert complete(best_of=1, suffix="", frequency_penalty=0, logit_bias={}, user="someone").choices[0].text == plain


@pytest.mark.parametrize(("fields", "kind", "field", "message"), MISTAKES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_is_openais_error_with_the_field_to_blame(chat, fields, kind, field, message, stream):
    with pytest.raises(kind) as refusal:
        chat(**fields, stream=stream)
    assert message in refusal.value.body["message"]
    assert refusal.value.param == field
    assert refusal.value.type == "invalid_request_error"


def test_a_key_is_asked_for_by_what_openai_sends(serve):
    with serve(key="a secret") as where:
        for key, is_right in (("a secret", True), ("a secre", False), ("A secret", False)):
            with openai.OpenAI(base_url=f"{where}/v1", api_key=key, max_retries=0) as client:
                if is_right:
                    assert len(list(client.models.list())) == 12
                    continue
                with pytest.raises(openai.AuthenticationError, match="asks for its key"):
                    client.chat.completions.create(model="emorl", messages=TALK)


def test_a_full_queue_says_when_to_come_back(serve):
    with serve(rows=1, queue=1) as where, openai.OpenAI(base_url=f"{where}/v1", api_key="none", max_retries=0) as client:

        def ask(**fields):
            return client.chat.completions.create(model="emorl", messages=TALK, **fields)

        with ask(stream=True, max_tokens=2000) as running, ThreadPoolExecutor(1) as pool:
            next(running)
            waiting = pool.submit(ask)
            while not health(where)["waiting"]:
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError, match="waiting already; try again later") as refusal:
                ask()
            assert refusal.value.response.headers["Retry-After"] == "2"
            running.close()
            assert text_of(waiting.result()) == text_of(ask())
        assert text_of(client.with_options(max_retries=2).chat.completions.create(model="emorl", messages=TALK))
