"""The line that tells a policy its weights: known texts, where it stands, and what it cannot say."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from emorl.config import UserError
from emorl.policies.preference_line import PreferenceLine, shares

LINE = PreferenceLine("Priorities: {weights}.", ("helpful", "brief", "kind"))
WEIGHTS = {"helpful": 0.5, "kind": 0.5}
TOLD = "Priorities: helpful 50 %, brief 0 %, kind 50 %."


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1.0, 0.0], [100, 0]),
        ([1, 1, 1], [34, 33, 33]),
        ([2, 1], [67, 33]),
        ([0.005, 0.995], [1, 99]),  # halves go to the first
        ([1 / 7] * 7, [15, 15, 14, 14, 14, 14, 14]),
        ([1e-9, 1.0], [0, 100]),
        ([30, 60, 10], [30, 60, 10]),
    ],
)
def test_weights_are_whole_percents_that_sum_to_a_hundred(weights, expected):
    assert shares(weights, 100) == expected
    assert sum(shares(weights, 100)) == 100
    assert shares([share / 100 for share in expected], 100) == expected  # what is said is what is meant


@pytest.mark.parametrize("weights", [[0.0, 0.0], [-0.1, 1.1], [float("inf"), 1.0], [float("nan"), 1.0]])
def test_what_is_no_share_is_refused(weights):
    with pytest.raises(UserError, match="expected weights of at least 0, not all 0"):
        shares(weights, 100)


def test_the_line_stands_where_a_prompt_can_hold_it():
    user, system = {"role": "user", "content": "Hi."}, {"role": "system", "content": "Be kind."}
    assert LINE.put_into("Hi.", WEIGHTS) == f"{TOLD}\nHi."
    assert LINE.put_into([user], WEIGHTS) == [{"role": "system", "content": TOLD}, user]
    assert LINE.put_into([system, user], WEIGHTS) == [{"role": "system", "content": f"Be kind.\n\n{TOLD}"}, user]
    without = PreferenceLine(LINE.wording, LINE.names, has_system_turn=False)
    talk = [user, {"role": "assistant", "content": "Hello."}, user]
    assert without.put_into(talk, WEIGHTS) == [{"role": "user", "content": f"{TOLD}\nHi."}, *talk[1:]]
    assert talk[0] == user == {"role": "user", "content": "Hi."}  # what was given stays as it is


def test_a_policy_s_card_gives_the_line_back(tmp_path):
    assert PreferenceLine.read(tmp_path) is None
    (tmp_path / "policy.json").write_text(json.dumps({"objective": "x"}))
    assert PreferenceLine.read(tmp_path) is None
    (tmp_path / "policy.json").write_text(json.dumps({"objective": "x", **LINE.card()}))
    assert PreferenceLine.read(tmp_path) == LINE


def test_names_may_be_repeated_instead_of_numbers():
    line = PreferenceLine("{words}: be so.", ("kind", "brief"))
    assert line.text({"kind": 3.0, "brief": 1.0}) == f"{' '.join(['kind'] * 15 + ['brief'] * 5)}: be so."
    assert line.text({"brief": 1.0}) == f"{' '.join(['brief'] * 20)}: be so."
    assert line.rounded({"kind": 0.52, "brief": 0.48}) == {"kind": 0.5, "brief": 0.5}
    assert LINE.rounded({"helpful": 1.0, "kind": 2.0}) == {"helpful": 0.33, "brief": 0.0, "kind": 0.67}


def test_a_line_that_the_base_cannot_read_is_refused(tokenizer):
    for wording in ("Priorities: {weights}.", "{words}"):
        assert PreferenceLine.of(wording, ["kind", "brief"], tokenizer).has_system_turn
    blind = Tokenizer(models.WordLevel({"<unk>": 0, "Priorities": 1, "kind": 2, "brief": 3}, unk_token="<unk>"))
    blind.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=blind, unk_token="<unk>")
    assert not PreferenceLine.of("{words}", ["kind", "brief"], words).has_system_turn
    with pytest.raises(UserError, match=r"cannot tell .* from .*; choose a wording with \{words\}"):
        PreferenceLine.of("Priorities: {weights}.", ["kind", "brief"], words)
