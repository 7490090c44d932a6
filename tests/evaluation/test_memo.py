"""The memo: each text is scored once, in one call, over calls, over restarts, by several processes."""

import signal
import subprocess
import sys
import time

import pytest

from emorl.config import UserError
from emorl.evaluation.memo import ScoreMemo
from emorl.objectives.loading import Objective
from emorl.objectives.scale import Scale


def counting(name="length"):
    """An objective that scores length, and the list of all it was asked."""
    asked = []

    def function(prompts, completions, **columns):
        asked.extend(zip(prompts, completions, strict=True))
        return [None if completion == "none" else float(len(completion)) for completion in completions]

    return Objective(name, function), asked


def test_a_text_is_scored_once_and_scores_keep_their_order():
    objective, asked = counting()
    with ScoreMemo(None) as memo:
        scores = memo.score(objective, ["p", "p", "q", "p"], ["long", "x", "long", "long"], {})
        assert scores == [4.0, 1.0, 4.0, 4.0]
        assert asked == [("q", "long"), ("p", "x"), ("p", "long")] or sorted(asked) == [
            ("p", "long"),
            ("p", "x"),
            ("q", "long"),
        ]
        assert memo.score(objective, ["p", "p"], ["x", "new"], {}) == [1.0, 3.0]
        assert len(asked) == 4
        assert (memo.known, memo.scored) == (2, 4)


def test_it_survives_a_restart_and_tries_again_what_had_no_score(tmp_path):
    objective, asked = counting()
    for _ in range(2):
        with ScoreMemo(tmp_path / "scores.sqlite") as memo:
            assert memo.score(objective, ["p", "p"], ["none", "some"], {}) == [None, 4.0]
    assert len(asked) == 3


def test_objectives_prompts_and_columns_are_told_apart():
    (first, one), (second, other) = counting("a"), counting("b")
    chat = [{"role": "user", "content": "p"}]
    with ScoreMemo(None) as memo:
        memo.score(first, ["p"], ["text"], {"topic": [1]})
        memo.score(second, ["p"], ["text"], {"topic": [1]})
        memo.score(first, ["p"], ["text"], {"topic": [2]})
        memo.score(first, [chat], [[{"role": "assistant", "content": "text"}]], {"topic": [1]})
        memo.score(first, ["p"], ["text"], {"topic": [1]})
    assert (len(one), len(other)) == (3, 1)


def test_scores_of_another_scale_are_not_taken_for_known(tmp_path):
    objective, asked = counting()
    halved = Objective(objective.name, objective, Scale(range=(0.0, 8.0)))
    for one, expected in ((objective, [4.0]), (halved, [0.5]), (objective, [4.0]), (halved, [0.5])):
        with ScoreMemo(tmp_path / "scores.sqlite") as memo:
            assert memo.score(one, ["p"], ["long"], {}) == expected
    assert len(asked) == 2


def test_thousands_of_texts_in_one_call():
    objective, asked = counting()
    with ScoreMemo(None) as memo:
        texts = [f"{number:0{number % 7 + 4}}" for number in range(3000)]
        for _ in range(2):
            assert memo.score(objective, ["p"] * 3000, texts, {}) == [float(len(text)) for text in texts]
    assert len(asked) == 3000


WORKER = """
import sys, time
from pathlib import Path
from emorl.evaluation.memo import ScoreMemo
from emorl.objectives.loading import Objective

def function(prompts, completions, **columns):
    time.sleep(float(sys.argv[3]))
    return [float(completion) for completion in completions]

with ScoreMemo(Path(sys.argv[1])) as memo:
    for number in range(int(sys.argv[2])):
        memo.score(Objective("o", function), ["p"], [str(number)], {})
        print(number, flush=True)
"""


def worker(path, calls, pause=0.0):
    command = [sys.executable, "-c", WORKER, str(path), str(calls), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_share_one_file(tmp_path):
    path = tmp_path / "scores.sqlite"
    with worker(path, 200) as one, worker(path, 200) as other:
        assert len(one.communicate(timeout=60)[0].split()) == len(other.communicate(timeout=60)[0].split()) == 200
    objective, asked = counting("o")
    with ScoreMemo(path) as memo:
        assert memo.score(objective, ["p"] * 200, list(map(str, range(200))), {}) == [float(n) for n in range(200)]
    assert asked == []


def test_what_was_scored_before_a_kill_is_known_after_it(tmp_path):
    path = tmp_path / "scores.sqlite"
    with worker(path, 10_000, 0.005) as process:
        done = [process.stdout.readline() for _ in range(20)]
        time.sleep(0.003)
        process.send_signal(signal.SIGKILL)
    objective, asked = counting("o")
    with ScoreMemo(path) as memo:
        memo.score(objective, ["p"] * len(done), [line.strip() for line in done], {})
    assert asked == []


def test_a_damaged_file_is_one_line_with_the_remedy(tmp_path):
    path = tmp_path / "scores.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(UserError, match=r"scores.sqlite is damaged .*move it away, its texts are then scored again"):
        ScoreMemo(path)
