"""Tokenizers of other kinds than the byte-level one that all tests share."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = ["hello there, how are you, my friend?", "tell me a story about the sea and the wind", "Größe 中文 hello"]


@pytest.fixture(scope="module")
def words():
    """As Llama 2: words, single letters, and bytes for all other letters."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=80, show_progress=False))
    vocabulary = {token: i + 3 for token, i in backend.get_vocab().items()} | {"<pad>": 0, "</s>": 1, "<unk>": 2}
    fallback = [*range(128, 256), *(value for value in range(128) if chr(value) not in vocabulary and value != ord(" "))]
    vocabulary |= {f"<0x{value:02X}>": len(vocabulary) + i for i, value in enumerate(fallback)}
    merges = [tuple(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def letters():
    """Single letters without byte fallback; padding on the right, as many tokenizers come."""
    names = ["<pad>", "</s>", "<unk>", "▁", *sorted({letter for text in TEXTS for letter in text} - {" "})]
    backend = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    options = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)
