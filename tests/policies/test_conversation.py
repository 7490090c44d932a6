import pytest

from emorl.policies.conversation import as_completion, completion_text, prompt_text

TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}]


def test_completions_of_both_formats_are_text():
    assert completion_text("a") == completion_text([{"role": "assistant", "content": "a"}]) == "a"


def test_a_prompts_text_is_what_the_user_said():
    assert prompt_text("a\nb") == prompt_text(TURNS) == "a\nb"


@pytest.mark.parametrize("prompt", ["a", TURNS])
def test_a_completion_has_its_prompts_format_and_its_own_text(prompt):
    completion = as_completion(prompt, "hi")
    assert isinstance(completion, str) == isinstance(prompt, str)
    assert completion_text(completion) == "hi"
