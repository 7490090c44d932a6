"""The benchmark of distillation compares what it says, on one tiny run; its timings are not tested."""

import json

import pytest
import yaml

from benchmarks.distillation import main

REWARDS = """\
def vowels(completions, **columns):
    return [sum(map(text[0]["content"].count, "aeiou")) / 50 for text in completions]
"""


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_routed_rival_is_trained_alike_and_all_are_compared(
    tmp_path, tiny_base_dir, make_causal_model, write_adapter, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tiny_rewards.py").write_text(REWARDS)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {i}"}) + "\n" for i in range(16)))
    run = tmp_path / "run"
    for seed, name in enumerate(("vowels", "brief")):
        write_adapter(make_causal_model("llama"), run / "train" / name / "policy", seed=seed)
    experiment = {
        "output": str(run),
        "base": {"model": str(tiny_base_dir)},
        "data": {"path": "prompts.jsonl", "validation": 4, "test": 4},
        "objectives": {"vowels": "tiny_rewards:vowels", "brief": "length"},
        "generation": {"max_new_tokens": 4, "do_sample": False},
        "train": {"lora": {"r": 2, "target_modules": "all-linear"}},
        "distill": {"trainer": {"max_steps": 2, "eval_steps": 1, "per_device_train_batch_size": 4}},
    }
    (run / "experiment.yaml").write_text(yaml.safe_dump(experiment))
    weights = "distill.weights={vowels: 1, brief: 3}"
    for _ in range(2):  # the second time, all is read
        main([str(run), "--set", weights, "--repeats", "1", "--json", str(tmp_path / "found.json")])
    [found] = json.loads((tmp_path / "found.json").read_text())
    rows = {row["system"]: row for row in found["rows"]}
    assert list(rows) == ["ensemble", "soup", "distilled", "routed"]
    assert rows["ensemble"]["KL"] == pytest.approx(0, abs=1e-6)
    assert rows["soup"]["KL"] == pytest.approx(found["gain"]["divergence"]["gain"])
    assert rows["routed"]["answers"] == 8
    assert rows["routed"]["KL"] != rows["distilled"]["KL"]
    assert set(found["time"]) == {"one policy", "distilled", "ensemble"}
    assert capsys.readouterr().out.count("| routed |") == 2
