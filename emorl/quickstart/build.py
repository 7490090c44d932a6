"""Builds the parts of the quickstart from our own corpus: a tiny chat policy, three reward models and prompts.

The classifiers start from the policy's parameters and learn both labels in one training, with a third, denser target: which
tokens of an answer do not fit this client. Without it they do not learn in half a minute to compare an answer with its
prompt. Each is then saved by itself.
"""

import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn import functional
from transformers import (
    BatchEncoding,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from emorl.quickstart import corpus, words
from emorl.runs.progress import Progress, Silent
from emorl.runs.run import only_process, write_text

PAD, END, SYSTEM, USER, ASSISTANT = "<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, END, SYSTEM, USER, ASSISTANT]  # ids 0 to 4
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POLICY_MIX = {"plain": 2.0, "restating": 1.0, "complex": 2.0, "kind": 1.0, "warm": 2.0, "balanced": 1.0}
FLUENCY_MIX = {"plain": 12.0, "restating": 1.0, "complex": 1.0, "kind": 1.0, "warm": 1.0, "balanced": 1.0}


OBJECTIVES = ("reflection", "empathy")


@dataclass(frozen=True)
class BuildConfig:
    """Sizes; the defaults take about a minute and a half on two cores."""

    vocabulary: int = 1280
    hidden: int = 128
    layers: int = 2
    batch: int = 32
    base_steps: int = 800
    judge_batch: int = 32
    judge_steps: int = 560
    fluency_steps: int = 120
    base_rate: float = 4e-3
    judge_rate: float = 2e-3
    fluency_rate: float = 1e-3
    prompts: int = 2000


@dataclass(frozen=True)
class QuickstartParts:
    """Where the parts are: four model directories, each with its tokenizer, and a jsonl file with column `prompt`."""

    base: Path
    reflection: Path
    empathy: Path
    fluency: Path
    prompts: Path


def build(
    directory: Path, seed: int = 0, progress: Progress | None = None, config: BuildConfig | None = None
) -> QuickstartParts:
    """Build what is missing under `directory`; other seeds, sizes or versions of the corpus get their own subdirectory.

    Each part appears whole or not at all. Same seed, same parts on the same machine.

    Raises:
        UserError: another process is building there.
    """
    config, progress = config or BuildConfig(), progress or Silent()
    home = directory / _fingerprint(seed, config)
    names = ("base", "judges/reflection", "judges/empathy", "fluency")
    parts = QuickstartParts(*(home / name for name in names), prompts=home / "prompts.jsonl")
    if all(path.exists() for path in asdict(parts).values()):
        return parts
    with only_process(home), torch.random.fork_rng(devices=[]):
        for leftover in home.glob(".building-*"):
            shutil.rmtree(leftover)
        _write_part(parts.base, lambda path: _build_base(path, seed, config, progress), seed)
        _write_part(parts.fluency, lambda path: _build_fluency(path, parts.base, seed, config, progress), seed)
        _write_part(home / "judges", lambda path: _build_judges(path, parts.base, seed, config, progress), seed)
        rows = corpus.write_prompts(seed, config.prompts)
        write_text(parts.prompts, "".join(json.dumps(row) + "\n" for row in rows))
    return parts


def _fingerprint(seed: int, config: BuildConfig) -> str:
    sources = [inspect.getsource(module) for module in (corpus, words, sys.modules[__name__])]
    return hashlib.sha256(repr((seed, astuple(config), sources)).encode()).hexdigest()[:12]


def _write_part(path: Path, write: Callable[[Path], None], seed: int) -> None:
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as scratch:
        torch.manual_seed(seed)
        write(Path(scratch) / path.name)
        os.replace(Path(scratch) / path.name, path)


def _build_base(path: Path, seed: int, config: BuildConfig, progress: Progress) -> None:
    tokenizer = _train_tokenizer(seed, config)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden,
            intermediate_size=3 * config.hidden,
            num_hidden_layers=config.layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=SPECIAL_TOKENS.index(END),
            pad_token_id=SPECIAL_TOKENS.index(PAD),
        )
    )
    _let_tokens_find_their_like(model)
    progress.say(f"  a tiny chat policy, {model.num_parameters() / 1e6:.2f}M parameters, from scratch")
    dialogues = corpus.write_dialogues(seed, POLICY_MIX)
    _train(model, lambda: _answer_loss(model, tokenizer, dialogues, config), config.base_steps, config.base_rate, progress)
    _save(model, tokenizer, path)


def _build_fluency(path: Path, base: Path, seed: int, config: BuildConfig, progress: Progress) -> None:
    progress.say("  fluency: a language model of its own")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    dialogues = corpus.write_dialogues(seed + 1, FLUENCY_MIX)
    _train(
        model, lambda: _answer_loss(model, tokenizer, dialogues, config), config.fluency_steps, config.fluency_rate, progress
    )
    _save(model, tokenizer, path)


def _build_judges(path: Path, base: Path, seed: int, config: BuildConfig, progress: Progress) -> None:
    progress.say("  reflection and empathy: two classifiers of prompt and response")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    decoder = LlamaForCausalLM.from_pretrained(base).model
    heads = nn.ModuleDict({name: nn.Linear(config.hidden, 1, bias=False) for name in (*OBJECTIVES, "misfit")})
    dialogues = corpus.write_judged(seed + 2)

    def loss() -> torch.Tensor:
        rows = list(islice(dialogues, config.judge_batch))
        return _judge_loss(decoder, heads, tokenizer, rows)

    _train(nn.ModuleList([decoder, heads]), loss, config.judge_steps, config.judge_rate, progress)
    for objective in OBJECTIVES:
        config_of_one = LlamaConfig.from_pretrained(base, num_labels=1, id2label={0: objective})
        model = LlamaForSequenceClassification(config_of_one)
        model.model.load_state_dict(decoder.state_dict())
        model.score.load_state_dict(heads[objective].state_dict())
        _save(model, tokenizer, path / objective)


def _judge_loss(
    decoder: nn.Module, heads: nn.ModuleDict, tokenizer: PreTrainedTokenizerFast, rows: Sequence[corpus.Dialogue]
) -> torch.Tensor:
    """Both labels are read where the pair ends; the misfits already after the first layer, for the next ones to use."""
    inputs = _encode(tokenizer, rows)
    hidden = decoder(**inputs, output_hidden_states=True)
    end = hidden.last_hidden_state[:, -1]  # (B, H), padded left
    scores = torch.cat([heads[name](end) for name in OBJECTIVES], dim=1)  # (B, 2)
    labels = torch.tensor([[row.reflection / 2, row.empathy / 2] for row in rows])
    answers = _answer_mask(inputs, tokenizer)
    fitting = [torch.tensor(ids) for ids in tokenizer([row.fitting for row in rows])["input_ids"]]
    misfits = torch.stack([~torch.isin(row, ids.long()) for row, ids in zip(inputs["input_ids"], fitting, strict=True)])
    misfits &= inputs["input_ids"] != tokenizer.eos_token_id
    flags = heads["misfit"](hidden.hidden_states[1])[..., 0]  # (B, T)
    cross_entropy = functional.binary_cross_entropy_with_logits
    return cross_entropy(scores, labels) + 3 * cross_entropy(
        flags[answers], misfits[answers].float(), pos_weight=torch.tensor(3.0)
    )


def _answer_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, dialogues: Iterator[corpus.Dialogue], config: BuildConfig
) -> torch.Tensor:
    """Mean negative log likelihood of the responses' tokens: learning to write prompts as well takes thrice the steps."""
    inputs = _encode(tokenizer, list(islice(dialogues, config.batch)))
    hidden = model.get_decoder()(**inputs).last_hidden_state  # (B, T, H)
    answers = _answer_mask(inputs, tokenizer)[:, 1:]
    logits = model.lm_head(hidden[:, :-1][answers])  # (answer tokens, V)
    return functional.cross_entropy(logits, inputs["input_ids"][:, 1:][answers])


def _encode(tokenizer: PreTrainedTokenizerFast, rows: Sequence[corpus.Dialogue]) -> BatchEncoding:
    return tokenizer([row.prompt for row in rows], [row.response for row in rows], padding=True, return_tensors="pt")


def _answer_mask(inputs: BatchEncoding, tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """(B, T): the tokens after <|assistant|>, the end token included; padding is on the left."""
    assistant = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(ASSISTANT)
    return (assistant.cumsum(dim=1) > 0) & ~assistant


def _let_tokens_find_their_like(model: LlamaForCausalLM) -> None:
    """Change the initial attention to look for similar tokens and copy them, so that quoting the prompt is soon learned."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LlamaAttention):
                module.k_proj.weight.copy_(module.q_proj.weight)
                module.o_proj.weight.copy_(module.v_proj.weight.T)


def _train(model: nn.Module, loss: Callable[[], torch.Tensor], steps: int, rate: float, progress: Progress) -> None:
    """Change the model's parameters by `steps` steps of AdamW; `loss` draws its own batch."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    with progress.bar("  steps", steps) as bar:
        for _ in range(steps):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.advance(1, f"loss {value.item():.3f}")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    model.eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _train_tokenizer(seed: int, config: BuildConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE. A pair (prompt, response) is encoded as the chat template renders it."""
    rows: Sequence[corpus.Dialogue] = list(islice(corpus.write_dialogues(seed, dict.fromkeys(corpus.RESPONSES, 1.0)), 5000))
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator((text for row in rows for text in (row.prompt, row.response)), trainer)
    pair = f"{USER} $A {END} {ASSISTANT} $B {END}"
    ids = [(token, inner.token_to_id(token)) for token in (USER, END, ASSISTANT)]
    inner.post_processor = processors.TemplateProcessing(single="$A", pair=pair, special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_max_length=256,
        model_input_names=["input_ids", "attention_mask"],
    )
