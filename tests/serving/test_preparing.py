"""How requests are made ready: template arguments of any kind, and prompts that cannot fit, before they are read."""

import contextlib
import json

import pytest

from emorl.serving.requests import ChatRequest, CompletionRequest, FieldError, parse
from emorl.stages.generate import Wish
from emorl.stages.served import load_served

TALK = {"messages": [{"role": "user", "content": "say yes"}]}


@pytest.fixture
def prepare(searched):
    """Prepares a chat, for a template where one is given."""
    preparing = load_served(searched.output, Wish(), longest_prompt=40)

    def of(template=None, **fields):
        preparing.tokenizer.chat_template = template or preparing.tokenizer.chat_template
        _, [asked] = preparing.prepare(parse(ChatRequest, json.dumps(TALK | fields).encode()))
        return preparing.tokenizer.decode(asked.ids)

    of.preparing = preparing
    return of


def test_a_template_reads_a_requests_own_arguments(prepare):
    template = "{% if thinks is defined and thinks %}think: {% endif %}{{ messages[0]['content'] }}"
    assert prepare(template) == "say yes"
    assert prepare(template, chat_template_kwargs={"thinks": True}) == "think: say yes"
    assert prepare(template, chat_template_kwargs={"thinks": False}) == "say yes"


@pytest.mark.parametrize(
    "template",
    [
        *("{{ 12 // x }}", "{{ x.a.b.c }}", "{{ x['a']['b'] }}", "{{ 'abc'[x] }}", "{% for i in range(x) %}{% endfor %}"),
        *("{{ x | int + 1 }}", "{{ x | length }}", "{{ x + 1 }}", "{{ x() }}", "{{ '%d' | format(x) }}", "{{ x | tojson }}"),
        *(
            "{{ '{}'.format(x.y) }}",
            "{{ strftime_now(x) }}",
            "{{ x | join(',') }}",
            "{{ x | items }}",
            "{{ raise_exception(x) }}",
        ),
        "{{ [1, 2] | batch(x) | list }}",
    ],
)
def test_whatever_a_template_does_with_an_argument_is_answered_or_refused(prepare, template):
    for value in (None, True, 0, -1, 5, 10**12, 0.5, "", "a", "9" * 30, [], [1, [2]], {}, {"a": 1}, {"a": {"b": 1}}):
        with contextlib.suppress(FieldError):
            assert "say yes" in prepare(template + "{{ messages[0]['content'] }}", chat_template_kwargs={"x": value})


def test_a_text_of_more_characters_than_tokens_can_have_is_not_even_read(prepare, monkeypatch):
    preparing = prepare.preparing
    longest = max(map(len, preparing.tokenizer.get_vocab()))
    for fields in ({"messages": [{"role": "user", "content": "x" * (40 * longest + 1)}]},):
        with pytest.raises(FieldError, match="characters cannot be the 40 tokens that this server takes"):
            prepare(**fields)
    with pytest.raises(FieldError, match="tokens is longer than this server takes: 40"):
        prepare(messages=[{"role": "user", "content": "x" * (40 * longest)}])


def test_tokens_that_the_model_has_no_embedding_for_are_refused(prepare):
    preparing = prepare.preparing
    preparing.tokenizer.add_tokens(["<|beyond|>"], special_tokens=True)
    for prompt in ("a <|beyond|>", [261], [5, 261]):
        with pytest.raises(FieldError, match="token 261 is beyond the vocabulary of 261"):
            preparing.prepare(parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()))
