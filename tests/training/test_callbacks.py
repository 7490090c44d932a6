from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from emorl.training.callbacks import CollapseCallback, ConvergenceCallback, has_converged


@pytest.fixture
def arguments(tmp_path):
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True)


def validate(callback, arguments, rewards, shares):
    """Replays validations as the trainer logs them; the metrics and control after the last."""
    state, control, metrics = TrainerState(), TrainerControl(), {}
    for step, (reward, share) in enumerate(zip(rewards, shares, strict=True)):
        state.log_history.append({"eval_reward": reward, "eval_distinct_share": share, "step": step})
        metrics = {"eval_reward": reward}
        callback.on_evaluate(arguments, state, control, metrics=metrics)
    return SimpleNamespace(metrics=metrics, stop=control.should_training_stop)


def test_convergence_is_the_papers_rule():
    assert not has_converged([0.5] * 19, window=20, threshold=0.015)
    assert has_converged([0.1, 0.9] + [0.5] * 20, window=20, threshold=0.015)
    swinging = [0.49, 0.51] * 10  # sd .01, mean .5: coefficient .02
    assert not has_converged(swinging, window=20, threshold=0.015)
    assert has_converged(swinging, window=20, threshold=0.021)
    assert not has_converged([0.5] * 20, window=20, threshold=0.0)


def test_training_stops_on_convergence_with_the_reason(arguments):
    callback = ConvergenceCallback(window=3, threshold=0.01)
    assert not validate(callback, arguments, [0.1, 0.3, 0.5], [1] * 3).stop
    assert validate(callback, arguments, [0.1, 0.5, 0.5, 0.5], [1] * 4).stop
    assert "converged" in callback.reason


def test_a_collapsed_checkpoint_is_never_selected_over_one_that_is_not(arguments, caplog):
    callback = CollapseCallback(share=0.8, patience=3)
    honest = validate(callback, arguments, [0.2, 0.6], [0.9, 0.82])
    assert honest.metrics["eval_selection"] == 0.6
    nearly = validate(callback, arguments, [0.2, 0.6, 0.7], [0.9, 0.82, 0.75])
    assert nearly.metrics["eval_selection"] == 0.2
    hacked = validate(callback, arguments, [0.2, 0.6, 0.95], [0.9, 0.82, 0.1])
    assert hacked.metrics["eval_selection"] == 0.2
    assert "collapsing: distinct completions 0.10, base 0.90" in caplog.text


def test_training_stops_after_collapsing_for_long(arguments):
    callback = CollapseCallback(share=0.8, patience=2)
    assert not validate(callback, arguments, [0.2, 0.5, 0.6], [1, 0.5, 0.9]).stop
    assert validate(callback, arguments, [0.2, 0.5, 0.6, 0.7], [1, 0.9, 0.5, 0.3]).stop
    assert "collapsed" in callback.reason
