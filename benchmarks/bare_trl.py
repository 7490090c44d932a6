"""One GRPO policy by TRL alone, in the shortest script that does it: what `benchmarks.training` holds `emorl train` against.

python -m benchmarks.bare_trl SETTINGS.json    # written by benchmarks.training
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

LOG = "log.json"


def vowels(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
    """The reward of both ways: share of vowels, which takes no time."""
    texts = [one if isinstance(one, str) else one[0]["content"] for one in completions]
    return [sum(map(text.lower().count, "aeiou")) / max(1, len(text)) for text in texts]


def train(settings: dict[str, Any]) -> None:
    """Checkpoints and `log.json` in the folder `output`; the settings that emorl's documents name as its own are `fixed`."""
    fixed = {"lr_scheduler_type": "constant", "max_grad_norm": 2.0, "gradient_checkpointing": False, "logging_steps": 1,
             "report_to": "none", "disable_tqdm": True, "save_strategy": "steps", "save_total_limit": 2,
             "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}  # fmt: skip
    dtype = getattr(torch, settings["dtype"])
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(settings["base"], dtype=dtype),
        processing_class=AutoTokenizer.from_pretrained(settings["base"], padding_side="left"),
        reward_funcs=vowels,
        args=GRPOConfig(**fixed, **settings["grpo"], bf16=dtype == torch.bfloat16, output_dir=settings["output"]),
        train_dataset=Dataset.from_list([json.loads(line) for line in Path(settings["prompts"]).read_text().splitlines()]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", **settings["lora"]),
    )
    trainer.train()
    Path(settings["output"], LOG).write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))
