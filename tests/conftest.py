"""Random tiny models, adapters and a tokenizer made in memory: no download, no network, one thread."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]  # ids 0 to 4; <|end|> ends a text
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HIDDEN = 32
VOCABULARY = len(SPECIAL_TOKENS) + 256
# Names differ by family; the sizes do not. Initial values are larger than usual so that greedy tokens are decided
# clearly.
_LLAMA_LIKE = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_SLIDING_AND_FULL = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": False,
}
_FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_LIKE,
    "qwen2": {k: v for k, v in _LLAMA_LIKE.items() if k != "head_dim"},
    "qwen3": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE | {"sliding_window": 8},
    "gemma": _LLAMA_LIKE | {"tie_word_embeddings": False},
    "gemma2": _LLAMA_LIKE | _SLIDING_AND_FULL,
    "gemma3_text": _LLAMA_LIKE | _SLIDING_AND_FULL,
    "gpt2": {"n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "phi": {"hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
}
_TARGETS: dict[str, list[str]] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "phi": ["q_proj", "v_proj", "dense", "fc1", "fc2"],
}
_TARGETS["gpt_neox"] = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """PEFT 0.21 still asks transformers 5.23 for an attribute renamed there; everything else that warns is an error."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges: 5 special tokens and the 256 bytes, so any text survives the round trip."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    built = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        padding_side="left",
        model_max_length=512,
    )
    built.chat_template = CHAT_TEMPLATE
    return built


@pytest.fixture(scope="session")
def make_causal_model() -> Callable[..., PreTrainedModel]:
    """Factory: `make_causal_model(family="llama", seed=0, **config)`, a random 2-layer model in eval mode, float32."""

    def make(family: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
        shared = {
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
            "initializer_range": 0.15,
        }
        settings = shared | _FAMILY_SETTINGS[family] | config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def make_seq2seq_model() -> Callable[..., PreTrainedModel]:
    """Factory: `make_seq2seq_model(seed=0, **config)` gives a random 2+2-layer T5 in eval mode, fp32."""

    def make(seed: int = 0, **config: Any) -> PreTrainedModel:
        settings = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        settings |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0} | config
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = T5ForConditionalGeneration(T5Config(**settings))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def save_word_encoder() -> Callable[..., str]:
    """Factory: `save_word_encoder(folder, words)`, a random 1-layer BERT whose tokens are words, saved like a hub model."""

    def save(folder: Path, words: Sequence[str], positions: int = 128) -> str:
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
        backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            BertModel(BertConfig(vocab_size=len(names), max_position_embeddings=positions, **sizes)).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., Path]:
    """Factory: writes a random LoRA adapter (A and B both non-zero) for a model, which stays unchanged, through PEFT.

    `write_adapter(model, directory, rank=4, alpha=8, target_modules=None, rslora=False, seed=0, **lora_config)`;
    without target modules, every projection of the model's family is adapted.
    """

    def write(
        model: PreTrainedModel,
        directory: Path,
        rank: int = 4,
        alpha: float = 8,
        target_modules: Sequence[str] | str | None = None,
        rslora: bool = False,
        seed: int = 0,
        **lora_config: Any,
    ) -> Path:
        if target_modules is None:
            everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
            target_modules = _TARGETS.get(model.config.model_type, everything)
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=targets,
            use_rslora=rslora,
            fan_in_fan_out=model.config.model_type == "gpt2",
            **{"task_type": "CAUSAL_LM"} | lora_config,
        )
        adapted = get_peft_model(deepcopy(model), config)  # pyright: ignore[reportArgumentType]
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
        adapted.save_pretrained(str(directory))
        return Path(directory)

    return write


@pytest.fixture(scope="session")
def tiny_base_dir(
    tmp_path_factory: pytest.TempPathFactory,
    make_causal_model: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Directory of a saved tiny Llama with its tokenizer: read only, shared by the whole session."""
    directory = tmp_path_factory.mktemp("base")
    make_causal_model("llama").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer as an encoder-decoder's: no chat template, padding on the right."""
    plain = deepcopy(tokenizer)
    plain.chat_template, plain.padding_side = None, "right"
    return plain


@pytest.fixture(scope="session")
def tiny_seq2seq_dir(
    tmp_path_factory: pytest.TempPathFactory,
    make_seq2seq_model: Callable[..., PreTrainedModel],
    plain_tokenizer: PreTrainedTokenizerFast,
) -> Path:
    """Directory of a saved tiny T5 with its tokenizer: read only, shared by the whole session."""
    directory = tmp_path_factory.mktemp("seq2seq")
    make_seq2seq_model().save_pretrained(directory)
    plain_tokenizer.save_pretrained(directory)
    return directory
