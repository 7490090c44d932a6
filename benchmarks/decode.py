"""How fast is decoding with K policies? Tokens per second of `HiddenStateEnsemble` and its rivals, in one run.

Rivals: one LoRA policy under PEFT's own `generate()` (the price of a single policy), PEFT switching adapters policy by
policy at every step, PEFT's mixed batch (`adapter_names`), and `ParameterAverage`. The rivals' loops keep a KV cache
and do nothing but the forward, the weighted mean of hidden states and argmax. All ways of one K must give identical
tokens (in float32). Random models: speed does not depend on the values, except of speculative decoding
(`--speculative`, batch 1): there the parameter average drafts and the ensemble verifies through transformers' own
assisted generation, and how much is accepted depends on `--distance`, the standard deviation of the adapters' B. Methods
are interleaved within each repeat, so that a busy machine slows all of them alike; a ratio is the median over repeats of
the ratio inside one repeat. `--compile` adds the ensemble with a static cache and every decoder layer under
`torch.compile`.

    python -m benchmarks.decode --sizes tiny 134m --batch 1 8 --repeats 7 --threads 2
    python -m benchmarks.decode --sizes 134m --batch 64 --rivals none
    python -m benchmarks.decode --sizes 134m --batch 1 --policies 3 --rivals none --speculative --distance 0.002
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from types import MethodType

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from emorl.aggregation.ensemble import HiddenStateEnsemble, ParameterAverage
from emorl.aggregation.stacked_lora import SharedProjection, StackedLoraLinear
from emorl.policies.adapters import read_adapter

SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 1024},
    "134m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SINGLE = "peft, one policy"

Decode = Callable[[Tensor], Tensor]


def make_policies(
    size: str,
    rank: int,
    count: int,
    directory: Path,
    distance: float = 0.05,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[PreTrainedModel, list[Path]]:
    """A random base and the directories of `count` random adapters on all its projections."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES[size], tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    with torch.device(device):
        base = LlamaForCausalLM(config).eval().to(dtype)
    paths = []
    for index in range(count):
        adapted = get_peft_model(deepcopy(base), LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=distance)
        adapted.save_pretrained(str(directory / f"policy{index}"))
        paths.append(directory / f"policy{index}")
    return base, paths


def load_peft(base: PreTrainedModel, paths: list[Path]) -> PeftModel:
    """PEFT's own model with all adapters, named by their directories."""
    model = PeftModel.from_pretrained(deepcopy(base), str(paths[0]), adapter_name=paths[0].name)
    for path in paths[1:]:
        model.load_adapter(str(path), adapter_name=path.name)
    return model.eval()


def generating(model: torch.nn.Module, new_tokens: int) -> Decode:
    """Greedy `generate()` of a fixed number of new tokens."""
    options = {"max_new_tokens": new_tokens, "do_sample": False}
    return lambda prompts: model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)


def switching(model: PeftModel, names: list[str], new_tokens: int) -> Decode:
    """Every step: for each policy, set its adapter and run it with its own cache; average, head, argmax."""
    inner = model.get_base_model()

    @torch.no_grad()
    def decode(prompts: Tensor) -> Tensor:
        caches = {name: DynamicCache(config=inner.config) for name in names}
        tokens, step = prompts, prompts
        for _ in range(new_tokens):
            hidden = []
            for name in names:
                model.set_adapter(name)
                output = inner.model(input_ids=step, past_key_values=caches[name])
                hidden.append(output.last_hidden_state[:, -1])  # (B, H)
            step = inner.lm_head(torch.stack(hidden).mean(0)).argmax(-1, keepdim=True)  # (B, 1)
            tokens = torch.cat([tokens, step], 1)
        return tokens

    return decode


def mixed_batch(model: PeftModel, names: list[str], new_tokens: int) -> Decode:
    """Every step: one forward of K*B rows whose adapters PEFT picks by `adapter_names`; average, head, argmax."""
    inner = model.get_base_model()

    @torch.no_grad()
    def decode(prompts: Tensor) -> Tensor:
        batch, cache = prompts.shape[0], DynamicCache(config=inner.config)
        rows = [name for name in names for _ in range(batch)]
        tokens, step = prompts, prompts
        with model._enable_peft_forward_hooks(adapter_names=rows):
            for _ in range(new_tokens):
                repeated = step.repeat(len(names), 1)
                hidden = inner.model(input_ids=repeated, past_key_values=cache).last_hidden_state[:, -1]  # (K*B, H)
                step = inner.lm_head(hidden.view(len(names), batch, -1).mean(0)).argmax(-1, keepdim=True)
                tokens = torch.cat([tokens, step], 1)
        return tokens

    return decode


def speculating(ensemble: HiddenStateEnsemble, drafter: ParameterAverage, new_tokens: int) -> Decode:
    """Assisted generation: what it gives is the ensemble's greedy output, whatever the drafter says."""
    options = {"max_new_tokens": new_tokens, "do_sample": False, "assistant_model": drafter}
    return lambda prompts: ensemble.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)


def compiling(ensemble: HiddenStateEnsemble, new_tokens: int) -> Decode:
    """Static shapes, one compiled graph per decoder layer. A compiled graph cannot look up which policies are active, so the
    layers here compute all of them."""
    torch._dynamo.config.recompile_limit = 256  # each layer is a graph of its own

    def project(self: SharedProjection, x: Tensor) -> Tensor:
        return torch.bmm(x.unflatten(0, (-1, self.a.shape[0])).transpose(0, 1).flatten(1, 2), self.a)

    def adapt(self: StackedLoraLinear, x: Tensor) -> Tensor:
        delta = torch.bmm(self.projection(x)[..., self.columns], self.b)  # (K, B*T, out)
        return self.linear(x) + delta.unflatten(1, (-1, x.shape[1])).transpose(0, 1).flatten(0, 1)

    for module in ensemble.policies.modules():
        if isinstance(module, SharedProjection | StackedLoraLinear):
            module.forward = MethodType(project if isinstance(module, SharedProjection) else adapt, module)
    for layer in ensemble.policies.model.layers:
        layer.compile()
    options = {"max_new_tokens": new_tokens, "do_sample": False, "cache_implementation": "static"}
    return lambda prompts: ensemble.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), **options)


def make_methods(
    base: PreTrainedModel, paths: list[Path], counts: list[int], new_tokens: int, wanted: set[str]
) -> dict[str, Decode]:
    """Every way of decoding, by a label that starts with K where there is one."""
    methods = {SINGLE: generating(load_peft(base, paths[:1]), new_tokens)}
    for count in counts:
        adapters = {path.name: read_adapter(path) for path in paths[:count]}
        peft_model, names = load_peft(base, paths[:count]), list(adapters)
        ensemble, average = HiddenStateEnsemble(base, adapters), ParameterAverage(base, adapters)
        methods[f"K={count} ensemble"] = generating(ensemble, new_tokens)
        if "compile" in wanted:
            methods[f"K={count} compiled"] = compiling(HiddenStateEnsemble(base, adapters), new_tokens)
        if count > 1 and "speculative" in wanted:
            methods[f"K={count} speculative"] = speculating(ensemble, average, new_tokens)
        if count > 1 and "rivals" in wanted:
            methods[f"K={count} peft switching"] = switching(peft_model, names, new_tokens)
            methods[f"K={count} peft mixed batch"] = mixed_batch(peft_model, names, new_tokens)
            methods[f"K={count} parameter average"] = generating(average, new_tokens)
    return methods


def check_same_tokens(methods: dict[str, Decode], prompts: Tensor, exact: bool) -> None:
    """Also the warm-up. Everything that aggregates must agree, in float32; the parameter average is another model."""
    tokens = {label: decode(prompts) for label, decode in methods.items()}
    for label, found in tokens.items():
        reference = SINGLE if label.startswith("K=1 ") else label.split()[0] + " ensemble"
        if exact and label != SINGLE and "average" not in label and not torch.equal(found, tokens[reference]):
            raise SystemExit(f"{label} gives other tokens than {reference}: they do not compute the same thing.")


def measure(methods: dict[str, Decode], prompts: Tensor, repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds per decode, by method; the order is rotated from repeat to repeat."""
    seconds: dict[str, list[float]] = {label: [] for label in methods}
    labels = list(methods)
    for repeat in range(repeats):
        for label in labels[repeat % len(labels) :] + labels[: repeat % len(labels)]:
            start = clock()
            methods[label](prompts).cpu()  # waits for a GPU
            seconds[label].append(clock() - start)
    return seconds


def measure_machine(dtype: torch.dtype, device: str = "cpu") -> tuple[float, float]:
    """(bytes/s read from memory, on a GPU read and written by a copy; FLOP/s in this precision): best of several."""
    entries, side = (64 * 2**20, 1536) if device == "cpu" else (512 * 2**20, 8192)  # 256 MiB, 2 GiB
    large, square = torch.ones(entries, device=device), torch.rand(side, side, dtype=dtype, device=device)
    copied = None if device == "cpu" else torch.empty_like(large)
    moving = min(_seconds(large.sum if copied is None else lambda: copied.copy_(large)) for _ in range(7))
    multiplying = min(_seconds(lambda: square @ square) for _ in range(7))
    return entries * 4 * (1 if copied is None else 2) / moving, 2 * side**3 / multiplying


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def lower_bound(base: PreTrainedModel, paths: list[Path], batch: int, tokens: int, machine: tuple[float, float]) -> float:
    """Seconds no forward of `tokens` tokens can beat: read all parameters once, or do the multiplications."""
    head = base.get_output_embeddings().weight.numel()
    parameters = sum(parameter.numel() for parameter in base.parameters())  # the head is the embedding, counted once
    lora = sum(factor.numel() for path in paths for pair in read_adapter(path).factors.values() for factor in pair)
    multiplications = batch * (tokens * (len(paths) * (parameters - head) + lora) + head)
    element = base.dtype.itemsize
    return max((parameters + lora) * element / machine[0], 2 * multiplications / machine[1])


def run_case(size: str, batch: int, options: argparse.Namespace, machine: tuple[float, float]) -> list[dict[str, object]]:
    """One row per method for one model size and batch size."""
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        dtype = getattr(torch, options.dtype)
        base, paths = make_policies(
            size, options.rank, max(options.policies), Path(directory), options.distance, dtype, options.device
        )
        wanted = {"rivals"} if options.rivals == "all" else set()
        wanted |= {"compile"} if options.compile else set()
        wanted |= {"speculative"} if options.speculative and batch == 1 else set()
        methods = make_methods(base, paths, options.policies, options.new_tokens, wanted)
        prompts = torch.randint(1, base.config.vocab_size, (batch, options.prompt_tokens), device=options.device)
        check_same_tokens(methods, prompts, exact=dtype == torch.float32)
        seconds = measure(methods, prompts, options.repeats, CLOCKS[options.clock])
        bounds = {
            count: lower_bound(base, paths[:count], batch, options.prompt_tokens, machine)
            + (options.new_tokens - 1) * lower_bound(base, paths[:count], batch, 1, machine)
            for count in {1, *options.policies}
        }
    rows: list[dict[str, object]] = []
    for label, values in seconds.items():
        ratios = [value / single for value, single in zip(values, seconds[SINGLE], strict=True)]
        rates = [batch * options.new_tokens / value for value in values]
        bound = bounds[1 if label == SINGLE else int(label.split()[0][2:])]
        rows.append(
            {
                "model": size,
                "batch": batch,
                "method": label,
                "tokens_per_second": statistics.median(rates),
                "lowest": min(rates),
                "highest": max(rates),
                "time_to_single": statistics.median(ratios),
                "time_to_bound": None if "average" in label else statistics.median(values) / bound,
            }
        )
    return rows


def print_rows(rows: list[dict[str, object]]) -> None:
    """Rows of the table whose heading `main` prints."""
    for row in rows:
        bound = "" if row["time_to_bound"] is None else f"{row['time_to_bound']:.1f}"
        spread = f"{row['tokens_per_second']:.1f} ({row['lowest']:.1f}–{row['highest']:.1f})"
        cells = [row["model"], row["batch"], row["method"], spread, f"{row['time_to_single']:.2f}", bound]
        print("| " + " | ".join(str(cell) for cell in cells) + " |", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sequences decoded at once")
    parser.add_argument("--policies", nargs="+", type=int, default=[1, 2, 3, 4], help="numbers of policies K")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of this process, for a busy machine; use 1 thread"
    )
    parser.add_argument("--rivals", choices=["all", "none"], default="all", help="none: only one policy and the ensemble")
    parser.add_argument("--speculative", action="store_true", help="also draft with the parameter average, at batch 1")
    parser.add_argument("--compile", action="store_true", help="also the ensemble under torch.compile (minutes to compile)")
    parser.add_argument("--distance", type=float, default=0.05, help="standard deviation of the adapters' B")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    machine = measure_machine(getattr(torch, options.dtype), options.device)
    print(
        f"{options.dtype}, {options.threads} threads, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{machine[0] / 1e9:.1f} GB/s, {machine[1] / 1e9:.0f} GFLOP/s\n"
    )
    print("| model | batch | method | tokens/s (lowest–highest) | time / one policy | time / bound |")
    print("|---|---|---|---|---|---|")
    rows = []
    for size in options.sizes:
        for batch in options.batch:
            case = run_case(size, batch, options, machine)
            print_rows(case)
            rows += case
            if options.json:  # what is measured stays, whatever comes
                options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
