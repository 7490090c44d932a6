import math
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from emorl.config import UserError
from emorl.config.library import library_settings


@dataclass
class Theirs:
    """As libraries write them: types that nothing checks."""

    rate: float = 0.1
    steps: int = 1
    limit: int | None = None
    kind: str = "a"
    scale: "str | bool" = "group"
    modules: list[str] | str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    bias: Literal["none", "all"] = "none"

    def __post_init__(self):
        if self.kind == "impossible":
            raise RuntimeError("a kind that\n  is none")


def settings(**block):
    return library_settings(Theirs, block, "train.theirs", "theirs.Theirs", {"steps": 5, "rate": 0.5}, {"kind": "fixed"})


def test_a_block_goes_over_defaults_and_under_what_is_fixed():
    assert settings(steps=7, kind="mine") == Theirs(rate=0.5, steps=7, kind="fixed")


def test_numbers_are_read_as_the_fields_declare_them():
    read = settings(rate="1e-4", steps=3.0, limit=None)
    assert (read.rate, read.steps, type(read.steps)) == (1e-4, 3, int)


@pytest.mark.parametrize("given", [["q_proj"], "all-linear", None])
def test_one_of_several_types_passes(given):
    assert settings(modules=given).modules == given


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"rat": 1}, r"unknown key 'train.theirs.rat' \(it goes to theirs.Theirs\); did you mean 'rate'"),
        ({"rate": "abc"}, "train.theirs.rate: expected a number, got 'abc'"),
        ({"rate": None}, "train.theirs.rate: expected a number, got None"),
        ({"rate": True}, "train.theirs.rate: expected a number, got True"),
        ({"rate": math.nan}, "train.theirs.rate: expected a finite number, got nan"),
        ({"rate": -math.inf}, "train.theirs.rate: expected a finite number, got -inf"),
        ({"steps": 1.5}, "train.theirs.steps: expected a whole number, got 1.5"),
        ({"limit": "many"}, "train.theirs.limit: expected a whole number or nothing, got 'many'"),
        ({"options": [1]}, "train.theirs.options: expected a block, got"),
        ({"modules": 3}, "train.theirs.modules: expected .* or a text or nothing, got 3"),
        ({"bias": "some"}, "train.theirs.bias: expected 'none' or 'all', got 'some'"),
    ],
)
def test_a_wrong_value_is_one_line(block, message):
    with pytest.raises(UserError, match=message):
        settings(**block)


def test_what_the_library_refuses_is_one_line():
    with pytest.raises(UserError, match=r"^x: a kind that is none$"):
        library_settings(Theirs, {"kind": "impossible"}, "x", "theirs.Theirs")
