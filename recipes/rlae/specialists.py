"""Three small specialists and their prompts: reverse, sort or increment three digits (`python -m recipes.rlae.specialists`).

A base of 0.5M parameters knows the format alone: it names each operation and repeats the digits. Each specialist is a LoRA
adapter fine-tuned on prompts of its own operation only, as specialists are, and does the same to whatever it is asked. A prompt
asks for three operations in any order, so the model that is right changes within the answer:
"reverse 274 sort 918 increment 305 =" -> "r472;s189;i416".
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

OPERATIONS = {
    "reverse": lambda digits: digits[::-1],
    "sort": lambda digits: "".join(sorted(digits)),
    "increment": lambda digits: "".join(str((int(digit) + 1) % 10) for digit in digits),
}
PARTS = 3


def problem(operations: Sequence[str], numbers: Sequence[int]) -> tuple[str, str]:
    """Prompt and answer of one operation after the other."""
    asked = list(zip(operations, (f"{number:03d}" for number in numbers), strict=True))
    return " ".join(f"{name} {digits}" for name, digits in asked) + " =", ";".join(
        name[0] + OPERATIONS[name](digits) for name, digits in asked
    )


def repeated(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same prompts, whose answers name the operations and repeat the digits."""
    words = [(prompt, prompt.split(" ")) for prompt, _ in pairs]
    return [(prompt, ";".join(said[2 * part][0] + said[2 * part + 1] for part in range(PARTS))) for prompt, said in words]


def problems(count: int, seed: int, names: Sequence[str] = tuple(OPERATIONS)) -> list[tuple[str, str]]:
    """Prompts and answers with operations and digits at random."""
    generator = np.random.default_rng(seed)
    chosen: Any = generator.integers(len(names), size=(count, PARTS)).tolist()
    numbers: Any = generator.integers(1000, size=(count, PARTS)).tolist()
    return [problem([names[int(i)] for i in row], asked) for row, asked in zip(chosen, numbers, strict=True)]


def tokenizer() -> PreTrainedTokenizerFast:
    """Words are operations; every other character is a token, and a space."""
    tokens = ["<pad>", "<end>", *OPERATIONS, *"0123456789=; rsi"]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join([*OPERATIONS, "[0-9=; rsi]"])), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left", model_max_length=128
    )


def train(
    model: PreTrainedModel,
    pairs: Sequence[tuple[str, str]],
    steps: int,
    learning_rate: float,
    seed: int,
    ignored: str = "",
) -> None:
    """Cross-entropy on the answers but for some characters, AdamW with one cycle of learning rates; changes the model."""
    words, batch = tokenizer(), 64
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    generator = np.random.default_rng(seed)
    model.train()
    for _ in range(steps):
        chosen = [pairs[index] for index in generator.integers(len(pairs), size=batch)]
        rows = [words(f"{prompt}{answer}<end>")["input_ids"] for prompt, answer in chosen]
        ids = torch.tensor(rows)  # every problem is as long as every other
        labels = ids.clone()
        labels[:, : len(words(chosen[0][0])["input_ids"])] = -100
        labels[torch.isin(labels, torch.tensor(words.convert_tokens_to_ids(list(ignored)), dtype=torch.long))] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def right_parts(model: PreTrainedModel, pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Share of right parts by operation, decoded greedily."""
    words = tokenizer()
    inputs = words([prompt for prompt, _ in pairs], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=15, do_sample=False)  # type: ignore[operator]
    said = words.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    found: dict[str, list[bool]] = {name: [] for name in OPERATIONS}
    for (prompt, answer), text in zip(pairs, said, strict=True):
        parts = [*text.split(";"), "", "", ""]
        for place, part in enumerate(answer.split(";")):
            found[prompt.split(" ")[2 * place]].append(parts[place] == part)
    return {name: float(np.mean(each)) if each else float("nan") for name, each in found.items()}


def make(output: Path, base_steps: int = 300, specialist_steps: int = 300, seed: int = 0) -> None:
    """Base, specialists and data below `output`; what is there already stays."""
    output.mkdir(parents=True, exist_ok=True)
    data, test = output / "problems.jsonl", problems(300, 1000 * seed + 99)
    if not data.exists():
        rows = [{"prompt": prompt, "answer": answer} for prompt, answer in problems(6000, 1000 * seed + 1)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base_directory = output / "base"
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    if not (base_directory / "model.safetensors").exists():
        start = time.perf_counter()
        torch.manual_seed(seed)
        base = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer()), pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)  # type: ignore[arg-type]
        )
        train(base, repeated(problems(50_000, 1000 * seed + 2)), base_steps, 2e-3, seed)
        tokenizer().save_pretrained(base_directory)
        base.save_pretrained(base_directory)
        print(f"base: {right_parts(base, test)}, {time.perf_counter() - start:.0f} s", flush=True)
    for name in OPERATIONS:
        directory = output / name
        if (directory / "adapter_config.json").exists():
            continue
        start = time.perf_counter()
        torch.manual_seed(seed)
        base = LlamaForCausalLM.from_pretrained(base_directory)
        specialist = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
        train(specialist, problems(50_000, 1000 * seed + 3, [name]), specialist_steps, 3e-3, seed, ignored="rsi")  # type: ignore[arg-type]
        print(f"{name}: {right_parts(specialist, test)}, {time.perf_counter() - start:.0f} s", flush=True)  # type: ignore[arg-type]
        specialist.save_pretrained(str(directory))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/rlae/specialists"), help="(%(default)s)")
    parser.add_argument("--base-steps", type=int, default=300, help="of the base's training (%(default)s)")
    parser.add_argument("--specialist-steps", type=int, default=300, help="of each specialist's (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of models and problems (%(default)s)")
    options = parser.parse_args(arguments)
    make(options.output, options.base_steps, options.specialist_steps, options.seed)


if __name__ == "__main__":
    main()
