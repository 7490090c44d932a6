"""Training on SmolLM2: one step of ours is one step of TRL's own trainer, and the whole job runs."""

import json

import pandas as pd
import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from emorl.cli import main
from emorl.config.experiment import load_experiment
from emorl.data import load_prompts

pytestmark = [
    pytest.mark.realmodel,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

GRPO = {"max_steps": 1, "per_device_train_batch_size": 8, "num_generations": 4, "learning_rate": 1e-3, "beta": 0.05}
LORA = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
LENGTH = 12


def e_share(prompts, completions, **columns):
    """Share of the letter e."""
    return [text.count("e") / max(1, len(text)) for text in (completion[0]["content"] for completion in completions)]


@pytest.fixture
def experiment(real_model, tmp_path):
    """An experiment file of one objective and one step."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say something about the number {i}."}) + "\n" for i in range(10)))
    content = {
        "output": str(tmp_path / "run"), "seed": 3, "base": {"model": str(real_model("smollm2"))},
        "data": {"path": str(prompts), "validation": 2, "test": 2},
        "objectives": {"letters": f"{__name__}:e_share"},
        "generation": {"max_new_tokens": LENGTH, "do_sample": False},
        "train": {"lora": LORA, "grpo": GRPO},
    }  # fmt: skip
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def trl_step(base, data, output):
    """The step by TRL alone, with the settings that emorl's documents name: (loss, adapter)."""
    config = GRPOConfig(
        **GRPO, output_dir=str(output), seed=3, max_completion_length=LENGTH, lr_scheduler_type="constant", max_grad_norm=2.0,
        bf16=False, gradient_checkpointing=False, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        reward_funcs=e_share,
        args=config,
        train_dataset=data,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
    )
    trainer.train()
    trainer.save_model(str(output))
    return next(entry for entry in trainer.state.log_history if "reward" in entry), load_file(
        output / "adapter_model.safetensors"
    )


def test_one_step_is_trls_own(experiment, real_model, tmp_path):
    assert main(["train", str(experiment)]) == 0
    folder = tmp_path / "run" / "train" / "letters"
    result = json.loads((folder / "result.json").read_text())
    ours = next(entry for entry in result["log"] if "reward" in entry)
    settings = load_experiment(experiment)
    splits = load_prompts(settings.data, settings.seed, conversational=True)
    theirs, adapter = trl_step(real_model("smollm2"), Dataset.from_list(list(splits.train)), tmp_path / "trl")
    assert {key: ours[key] for key in ("loss", "reward", "grad_norm")} == pytest.approx(
        {key: theirs[key] for key in ("loss", "reward", "grad_norm")}, abs=1e-6
    )
    found = load_file(folder / "policy" / "adapter_model.safetensors")
    assert found.keys() == adapter.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, adapter[name], atol=1e-7, rtol=0, msg=name)
    assert theirs["grad_norm"] > 0


def test_the_whole_job_runs_for_two_steps(experiment, tmp_path):
    content = yaml.safe_load(experiment.read_text())
    content["objectives"] = {"letters": f"{__name__}:e_share", "varied": "distinct_2"}
    content["train"]["grpo"] = GRPO | {"max_steps": 2, "eval_steps": 2}
    content["search"] = {"levels": 1}
    experiment.write_text(yaml.safe_dump(content))
    assert main(["run", str(experiment)]) == 0
    summary = pd.read_csv(tmp_path / "run" / "evaluate" / "summary.csv")
    assert {"base", "policy letters", "policy varied", "ensemble, best found"} <= set(summary["system"])
    completions = pd.read_parquet(tmp_path / "run" / "evaluate" / "completions.parquet")
    assert len(completions) == 2 * len(summary)
    assert completions["completion"].str.contains("[a-z]").all()
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
