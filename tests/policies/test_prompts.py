"""Prompts are rendered as TRL renders them, by a dozen shapes of templates; answers are read behind their mark."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, T5Config
from trl import GRPOTrainer

from emorl.config import UserError
from emorl.policies.conversation import answer_in
from emorl.policies.prompts import answers_begin_after, check_fits, check_prompts, decode, encode, prepare_tokenizer

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "thinking": "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}No thoughts. "
    "{% endif %}{% endif %}",
    "thinking by default": "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt and enable_thinking | default(true) %}<think>{% endif %}",
    "no generation prompt": "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}",
    "begins with a blank line": "\n{% for m in messages %}{{ m.content }}{% endfor %}\n",
    "begins indented": "   {% for m in messages %}{{ m.content }}{% if enable_thinking is false %}!{% endif %}{% endfor %}",
    "strips": "{%- for m in messages -%} {{ m.content | trim }} {%- endfor -%}",
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
    "macro": "{% macro turn(m) %}{% if enable_thinking is false %}quick {% endif %}{{ m.content }}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "begins itself": "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
    "system first": "{% if messages[0].role == 'system' %}<<{{ messages[0].content }}>>{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}",
    "a namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}"
    "{% endfor %}{{ style | default('plain') }}",
    "options": "{% for m in messages %}{{ m.content }}{% endfor %}{{ (options or {}).get('depth', 0) }}{{ style }}",
}
ARGUMENTS = [
    {},
    {"enable_thinking": False},
    {"enable_thinking": True, "style": 'a "quoted" %} {{ line\n é 😀 \\n'},
    {"options": {"depth": 3, "names": ["x", None, 1.5]}, "style": None},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
]
CONVERSATIONS = [
    [{"role": "user", "content": "I cannot sleep. "}],
    [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."},
     {"role": "user", "content": "And?\n"}],
]  # fmt: skip


@pytest.fixture
def chat(tokenizer):
    """A tokenizer with a template of one's own."""

    def make(template):
        made = deepcopy(tokenizer)
        made.chat_template = template
        return made

    return make


def rendered_by_trl(tokenizer, conversations, arguments):
    """What `GRPOTrainer` tokenises."""
    trainer = SimpleNamespace(
        _is_vlm=False, environment_factories=None, processing_class=tokenizer, tools=None, chat_template=None,
        chat_template_kwargs=arguments,
    )  # fmt: skip
    return GRPOTrainer._tokenize_prompts(trainer, conversations)[0]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: "+".join(arguments) or "none")
@pytest.mark.parametrize("template", TEMPLATES)
def test_arguments_of_a_template_are_rendered_as_trl_renders_them(chat, template, arguments):
    given = dict(arguments)
    tools = given.pop("tools", None)  # an argument of its own there
    plain, told = chat(TEMPLATES[template]), prepare_tokenizer(chat(TEMPLATES[template]), arguments, None)
    options = {**given, **({"tools": tools} if tools else {})}
    expected = [
        plain.apply_chat_template([one], add_generation_prompt=True, tokenize=True, return_dict=True, **options)["input_ids"][0]
        for one in CONVERSATIONS
    ] if tools else rendered_by_trl(plain, CONVERSATIONS, given)  # fmt: skip
    encoded = encode(told, CONVERSATIONS)
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(encoded["input_ids"], encoded["attention_mask"], strict=True)]
    assert rows == expected
    assert rendered_by_trl(told, CONVERSATIONS, {}) == expected  # so training needs no setting of its own


def test_preparing_again_replaces_what_was_told(chat, tmp_path):
    tokenizer = prepare_tokenizer(chat(TEMPLATES["options"]), {"style": "a", "options": {"depth": 1}}, "</think>")
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert answers_begin_after(again) == "</think>"
    assert encode(again, CONVERSATIONS[:1])["input_ids"].tolist() == encode(tokenizer, CONVERSATIONS[:1])["input_ids"].tolist()
    prepare_tokenizer(again, {"style": "b"}, None)
    assert again.chat_template == prepare_tokenizer(chat(TEMPLATES["options"]), {"style": "b"}, None).chat_template


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported') }}", "refuses a conversation of user .System role not supported."),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x", "leave data.system_prompt out"),
        ("{{ messages[0].content.nothing.more }}", "refuses a conversation"),
        ("{{ messages[0]['content'] + 1 }}", "refuses a conversation"),
    ],
)
def test_a_template_that_refuses_a_conversation_is_one_line(chat, template, message):
    conversation = CONVERSATIONS[1] if "system_prompt" in message else CONVERSATIONS[0]
    with pytest.raises(UserError, match=message) as caught:
        encode(chat(template), [conversation])
    assert "\n" not in str(caught.value)


def test_conversations_without_a_template_and_arguments_without_one_are_refused(plain_tokenizer, tokenizer):
    with pytest.raises(UserError, match="the base has no chat template"):
        encode(plain_tokenizer, [CONVERSATIONS[0]])
    with pytest.raises(UserError, match=r"data.chat_template_kwargs needs a base with a chat template"):
        prepare_tokenizer(deepcopy(plain_tokenizer), {"enable_thinking": False}, None)
    with pytest.raises(UserError, match="is a special token"):
        prepare_tokenizer(deepcopy(tokenizer), None, tokenizer.eos_token)


@pytest.mark.parametrize(
    ("text", "answer"),
    [("I think.</think> Yes.", "Yes."), ("a</think>b</think> c", "c"), ("no mark", ""), ("</think>", ""), ("", "")],
)
def test_an_answer_is_what_comes_behind_the_last_mark(text, answer):
    assert answer_in(text, "</think>") == answer
    assert answer_in(text, None) == text


@pytest.mark.parametrize(
    ("config", "tokens", "new", "fits"),
    [
        (GPT2Config(n_positions=16), 10, 6, True),
        (GPT2Config(n_positions=16), 10, 7, False),
        (LlamaConfig(max_position_embeddings=16), 17, 0, False),
        (LlamaConfig(max_position_embeddings=16), 16, None, True),
        (T5Config(), 100_000, 100_000, True),
    ],
)
def test_a_prompt_longer_than_the_model_is_refused_with_its_numbers(config, tokens, new, fits):
    if fits:
        check_fits(config, tokens, new, "say it")
        return
    with pytest.raises(
        UserError, match=rf"a prompt of {tokens} tokens .*={new} need {tokens + new} positions.* has 16; .*'say it'"
    ):
        check_fits(config, tokens, new, "say it")


def test_only_long_prompts_are_looked_at_and_the_first_is_named(tokenizer):
    config = LlamaConfig(max_position_embeddings=64)
    prompts = [[{"role": "user", "content": text}] for text in ("short", "x" * 60, "y" * 70)]
    length = encode(tokenizer, prompts[1:2])["input_ids"].shape[1]
    with pytest.raises(UserError, match=rf"a prompt of {length} tokens .*x{{9}}"):
        check_prompts(tokenizer, config, prompts, 8)
    check_prompts(tokenizer, config, prompts[:1], 8)


def test_ids_become_texts_without_special_tokens(tokenizer):
    ids = tokenizer(["hello"])["input_ids"][0]
    assert decode(tokenizer, torch.tensor([[*ids, tokenizer.eos_token_id, tokenizer.pad_token_id]])) == ["hello"]
