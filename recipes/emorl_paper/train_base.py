"""Trains the recipe's small stand-in for T5-base: a T5 whose layers begin as those of ../shared/models/counsel-3m.

    python -m recipes.emorl_paper.train_base --data ../shared/data --decoder ../shared/models/counsel-3m \\
        --output runs/emorl_paper/base

6 + 6 layers, 7.0M parameters (transformers caches as many decoder layers as the encoder has); relative positions, tied
embeddings and output scaling are T5's. The authors start from google-t5/t5-base, which has seen no dialogues; this one
answers, so that few steps of reinforcement learning on two cores have something to reward. Trained from scratch, 2,000 steps
(40 minutes) left a T5 that says the same to everyone. No prompt that the recipe validates or tests on is trained on here, but
counsel-3m has seen PAIR's training file.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from transformers.models.t5.modeling_t5 import T5LayerCrossAttention, T5LayerFF

from emorl.config import UserError
from emorl.config.experiment import load_experiment
from emorl.data import load_prompts
from emorl.training.checkpoints import last_complete_checkpoint
from reward_models.dialogues import SOURCES, responses
from reward_models.pair_data import Pair, cut, hold_out

RECIPE = Path(__file__).with_name("cpu.yaml")
PER_SOURCE = 12_000
PAIR_REPEATS = 6  # reflections, which the recipe rewards, are few
PROMPT_WORDS, RESPONSE_WORDS = 60, 30


def read_pairs(data: Path, seed: int) -> list[Pair]:
    """What clients said and people answered, without the recipe's validation and test prompts."""
    splits = load_prompts(load_experiment(RECIPE).data, 0, conversational=False)
    kept_apart = {*splits.validation["prompt"], *splits.test["prompt"]}
    pairs = [pair for pair in responses(data, per_source=PER_SOURCE, seed=seed) if pair.prompt not in kept_apart]
    pairs += [pair for pair in pairs if pair.kind == SOURCES[0]] * (PAIR_REPEATS - 1)
    return [cut(pair, prompt_words=PROMPT_WORDS, response_words=RESPONSE_WORDS) for pair in pairs]


def tokenizer_from(decoder: str) -> PreTrainedTokenizerFast:
    """The decoder's tokenizer as T5's: every text ends with the end token, and there is no chat."""
    tokenizer = AutoTokenizer.from_pretrained(decoder)
    end = tokenizer.eos_token
    single = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)])
    before = tokenizer.backend_tokenizer.post_processor
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([*([before] if before else []), single])
    tokenizer.chat_template, tokenizer.padding_side = None, "right"
    return tokenizer


def encoder_decoder_from(decoder: LlamaForCausalLM) -> T5ForConditionalGeneration:
    """A T5 (gated, tied embeddings) whose layers begin as those of a decoder of the Llama family, cross-attention as its
    self-attention; rotary positions are left behind, T5's relative ones begin at zero (warm start: Rothe et al. 2020)."""
    sizes = decoder.config
    options: dict[str, Any] = {
        "vocab_size": sizes.vocab_size, "d_model": sizes.hidden_size, "d_kv": sizes.head_dim, "d_ff": sizes.intermediate_size,
        "num_layers": sizes.num_hidden_layers, "num_heads": sizes.num_attention_heads,
        "feed_forward_proj": "gated-silu", "dropout_rate": 0.0, "layer_norm_epsilon": sizes.rms_norm_eps,
        "pad_token_id": sizes.pad_token_id, "eos_token_id": sizes.eos_token_id, "tie_word_embeddings": True,
        "decoder_start_token_id": sizes.pad_token_id,
    }  # fmt: skip
    model = T5ForConditionalGeneration(T5Config(**options))
    with torch.no_grad():
        model.shared.weight.copy_(decoder.model.embed_tokens.weight)
        stacks: list[Any] = [model.encoder, model.decoder]
        layers: list[Any] = list(decoder.model.layers)
        for stack in stacks:
            for block, source in zip(stack.block, layers, strict=True):
                for sublayer in block.layer:
                    _begin_as(sublayer, source)
            stack.final_layer_norm.weight.copy_(decoder.model.norm.weight)
            stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
        stacks[-1].final_layer_norm.weight *= sizes.hidden_size**0.5  # T5 divides its output by that
    return model


def _begin_as(sublayer: Any, source: Any) -> None:
    """Copies attention or feed-forward with the norm before it, of a T5's layer from a Llama's."""
    if isinstance(sublayer, T5LayerFF):
        feed_forward: Any = sublayer.DenseReluDense
        norm: Any = sublayer.layer_norm
        pairs = ((feed_forward.wi_0, source.mlp.gate_proj), (feed_forward.wi_1, source.mlp.up_proj))
        for own, other in (*pairs, (feed_forward.wo, source.mlp.down_proj)):
            own.weight.copy_(other.weight)
        norm.weight.copy_(source.post_attention_layernorm.weight)
        return
    attention: Any = sublayer.EncDecAttention if isinstance(sublayer, T5LayerCrossAttention) else sublayer.SelfAttention
    for name in "qkvo":
        getattr(attention, name).weight.copy_(getattr(source.self_attn, f"{name}_proj").weight)
    attention.q.weight *= source.self_attn.head_dim**-0.5  # T5 does not scale attention
    sublayer.layer_norm.weight.copy_(source.input_layernorm.weight)


def tokenized(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    source = tokenizer([pair.prompt for pair in pairs])
    labels = tokenizer([pair.response for pair in pairs])["input_ids"]
    return Dataset.from_dict({**source, "labels": labels, "length": [len(ids) for ids in source["input_ids"]]})


def main(arguments: argparse.Namespace) -> None:
    set_seed(arguments.seed)
    pairs = read_pairs(arguments.data, arguments.seed)
    training, validation = hold_out(pairs, 0.02, arguments.seed)
    random.Random(arguments.seed).shuffle(training)
    tokenizer = tokenizer_from(arguments.decoder)
    model = encoder_decoder_from(LlamaForCausalLM.from_pretrained(arguments.decoder))
    print(f"{len(training)} pairs, {model.num_parameters() / 1e6:.1f}M parameters")
    settings = Seq2SeqTrainingArguments(
        output_dir=str(arguments.output / "checkpoints"),
        max_steps=arguments.steps,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=128,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=arguments.steps // 20,
        weight_decay=0.01,
        train_sampling_strategy="group_by_length",
        eval_strategy="steps",
        eval_steps=125,
        save_steps=125,
        save_total_limit=1,
        logging_steps=25,
        bf16=True,  # a third of the time where the processor multiplies in it
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        seed=arguments.seed,
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=settings,
        train_dataset=tokenized(training, tokenizer),
        eval_dataset=tokenized(validation, tokenizer),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(arguments.output / "checkpoints"))
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, decoder_start_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    print(f"{arguments.output}: {trainer.evaluate()['eval_loss']:.3f} nats a token on {len(validation)} held-out answers")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the JSON-lines files")
    parser.add_argument("--decoder", required=True, metavar="PATH_OR_HUB_ID", help="a language model of the Llama family")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="where the model goes; a killed run continues"
    )
    parser.add_argument("--steps", type=int, default=500, help="of 64 pairs (default 500)")
    parser.add_argument("--seed", type=int, default=0, help="(default 0)")
    try:
        main(parser.parse_args())
    except UserError as error:
        sys.exit(f"train_base: {error}")
