"""How much memory does an ensemble of K policies need? Peak resident memory of decoding, each case in a process of its own.

What must be there is the base once, K adapters and K caches; *needed* adds up these bytes, *measured* is the peak resident
size minus that of the same process before anything was loaded. Decoding also holds activations and logits for a moment.

    python -m benchmarks.memory --policies 1 8 --batch 8
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.decode import SIZES, generating, make_policies
from emorl.aggregation.ensemble import HiddenStateEnsemble
from emorl.policies.adapters import read_adapter

PEFT = 0  # stands for one policy under PEFT where a number of policies is expected


def peak() -> int:
    """Bytes: the largest resident size of this process (Linux; getrusage would include the one that started it)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def measure(directory: Path, policies: int, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    """Loads and decodes in this process."""
    torch.set_num_threads(2)
    torch.ones(512, 512) @ torch.ones(512, 512)  # what the libraries allocate once
    before = peak()
    base = AutoModelForCausalLM.from_pretrained(directory / "base")
    paths = [directory / f"policy{index}" for index in range(max(1, policies))]
    if policies == PEFT:
        model = PeftModel.from_pretrained(base, str(paths[0])).eval()
    else:
        model = HiddenStateEnsemble(base, {path.name: read_adapter(path) for path in paths})
    prompts = torch.randint(1, base.config.vocab_size, (batch, prompt_tokens))
    generating(model, new_tokens)(prompts)
    config, adapter = base.config, read_adapter(paths[0])
    heads = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return {
        "measured": peak() - before,
        "base": sum(parameter.nbytes for parameter in base.parameters()),
        "adapters": len(paths) * sum(factor.nbytes for pair in adapter.factors.values() for factor in pair),
        "caches": len(paths) * batch * (prompt_tokens + new_tokens) * heads * base.dtype.itemsize,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="134m")
    parser.add_argument("--policies", nargs="+", type=int, default=[1, 3, 8])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        directory, policies = Path(options.child[0]), int(options.child[1])
        print(json.dumps(measure(directory, policies, options.batch, options.prompt_tokens, options.new_tokens)))
        return
    rows = []
    print("| method | base | adapters | caches | needed, MB | measured, MB | measured / needed |\n|" + "---|" * 7)
    with tempfile.TemporaryDirectory() as folder:
        base, _ = make_policies(options.size, options.rank, max(options.policies), Path(folder))
        base.save_pretrained(f"{folder}/base")
        for policies in [PEFT, *options.policies]:
            command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--child", folder, str(policies)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(output.splitlines()[-1])
            needed = row["base"] + row["adapters"] + row["caches"]
            label = "peft, one policy" if policies == PEFT else f"ensemble, K={policies}"
            parts = " | ".join(f"{row[key] / 1e6:.0f}" for key in ("base", "adapters", "caches"))
            print(
                f"| {label} | {parts} | {needed / 1e6:.0f} | {row['measured'] / 1e6:.0f} | {row['measured'] / needed:.2f} |",
                flush=True,
            )
            rows.append({"method": label, "needed": needed, **row})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
