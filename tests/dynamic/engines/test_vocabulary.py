"""Bytes of tokens in three kinds of tokenizers, the union of vocabularies, and texts that grow by foreign strings."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from emorl.dynamic.engines.vocabulary import Spelling, Transcript, UnionVocabulary, is_complete, token_bytes

TEXTS = ["Hello world, hello there!", "Größe und Übermut", "hello hello worlds of words", "中文 字"]
SCRIPTS = ["Hello  world\n\tyes", "Größe, Übermut", "Γειά σου Κόσμε", "中文字符，你好", "مرحبا بالعالم", "👩‍👩‍👧 🇩🇪 ❤️ x"]


def trained(backend, alphabet=()):
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 60, special_tokens=["<pad>", "<end>"], initial_alphabet=list(alphabet), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def fast(backend, **options):
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", **options)


def byte_level():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(trained(backend, sorted(pre_tokenizers.ByteLevel.alphabet())))


def byte_level_with_prefix():
    """As RoBERTa: a space is put in front of every text; pre-tokenizer and decoder within sequences, as Llama 3 has."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True)])
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return fast(trained(backend, sorted(pre_tokenizers.ByteLevel.alphabet())))


def sentencepiece():
    """As Llama 2: a normalizer puts "▁" in front and the decoder takes it away; every byte has a token beside letters' own."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    state = json.loads(trained(backend).to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    for token in ["<unk>", "<s>", *(f"<0x{value:02X}>" for value in range(256))]:
        vocabulary[token] = len(vocabulary)
    pairs = [tuple(pair) for pair in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return fast(backend, unk_token="<unk>", bos_token="<s>")


def characters():
    """Single characters and no byte fallback: what is unknown has no token."""
    letters = ["<pad>", "<end>", "<unk>", "▁", *sorted({letter for text in TEXTS for letter in text if letter != " "})]
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(backend, unk_token="<unk>")


def unigram():
    scores = [("<unk>", 0.0), ("▁", -2.0), ("▁hello", -3.0), ("he", -3.0), ("llo", -3.5), ("o", -4.0), ("l", -4.0)]
    backend = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(backend, unk_token="<unk>")


def text_of(tokenizer, ids):
    table = token_bytes(tokenizer, len(tokenizer))
    return b"".join(table[id_] or b"" for id_ in ids)


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("make", [byte_level, byte_level_with_prefix, sentencepiece])
def test_bytes_of_tokens_give_back_a_text(make, text):
    tokenizer = make()
    prefix = b"" if make is byte_level else b" "
    assert text_of(tokenizer, tokenizer(text)["input_ids"]) == prefix + text.encode()
    assert text_of(tokenizer, Spelling(tokenizer, len(tokenizer)).encode(text.encode())) == text.encode()


@pytest.mark.parametrize("text", SCRIPTS)
@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_every_fragment_of_a_text_has_tokens(make, text):
    tokenizer, data = make(), text.encode()
    spelling = Spelling(tokenizer, len(tokenizer))
    for cut in range(1, len(data)):
        assert text_of(tokenizer, spelling.encode(data[:cut])) == data[:cut]
        assert text_of(tokenizer, spelling.encode(data[cut:])) == data[cut:]


def test_special_tokens_and_padding_have_no_bytes_and_ordinary_added_tokens_do():
    for tokenizer, space in ((byte_level(), " "), (sentencepiece(), "▁▁"), (characters(), "▁▁")):
        tokenizer.add_tokens([AddedToken("<tool>ü", special=False), AddedToken(space * 2, special=False)])
        tokenizer.add_tokens([AddedToken("<control>", special=True)], special_tokens=True)
        table = token_bytes(tokenizer, len(tokenizer) + 3)
        assert table[-3:] == [None] * 3
        assert [table[tokenizer.convert_tokens_to_ids(token)] for token in ("<pad>", "<end>", "<control>")] == [None] * 3
        assert table[tokenizer.convert_tokens_to_ids("<tool>ü")] == "<tool>ü".encode()
        assert table[tokenizer.convert_tokens_to_ids(space * 2)] == b" " * len(space * 2)


def test_a_byte_token_is_text_where_the_tokenizer_has_no_byte_fallback():
    backend = Tokenizer(models.BPE({"<0x41>": 0, "a": 1}, []))
    backend.decoder = decoders.Metaspace()
    assert token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend), 2) == [b"<0x41>", b"a"]


def test_a_letter_is_written_as_its_own_token_rather_than_its_byte():
    tokenizer = sentencepiece()
    spelling = Spelling(tokenizer, len(tokenizer))
    assert spelling.id_of[b"H"] == tokenizer.convert_tokens_to_ids("H")
    assert spelling.token_bytes[tokenizer.convert_tokens_to_ids("<0x48>")] == b"H"
    assert spelling.encode(b"H") == [tokenizer.convert_tokens_to_ids("H")]


def test_what_has_no_token_becomes_the_unknown_one():
    tokenizer = characters()
    spelling, unknown = Spelling(tokenizer, len(tokenizer)), tokenizer.unk_token_id
    ids = spelling.encode("he é".encode())
    assert tokenizer.convert_ids_to_tokens(ids) == ["h", "e", "▁", "<unk>"]
    assert spelling.encode("é".encode()[:1]) == [unknown]


def test_a_continuation_gets_no_start_token_and_no_space():
    for make in (byte_level, byte_level_with_prefix, sentencepiece, characters, unigram):
        tokenizer = make()
        ids = Spelling(tokenizer, len(tokenizer)).encode(b"hello")
        assert text_of(tokenizer, ids) == b"hello"
        spaced = tokenizer(" hello" if make is byte_level else "hello", add_special_tokens=False)["input_ids"]
        assert Spelling(tokenizer, len(tokenizer)).encode(b" hello") == spaced  # as within a text


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]")), "WordPiece"),
        (Tokenizer(models.BPE({"a": 0}, [])), "byte-level BPE or SentencePiece"),
    ],
)
def test_other_kinds_of_tokenizers_are_refused(backend, message):
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match=message):
        token_bytes(PreTrainedTokenizerFast(tokenizer_object=backend), 2)


def test_a_tokenizer_in_python_is_refused():
    with pytest.raises(ValueError, match="ByT5Tokenizer is written in Python"):
        token_bytes(ByT5Tokenizer(), 384)


def test_characters_are_complete_where_utf8_says_so():
    for text in SCRIPTS:
        data = text.encode()
        ends = {len(text[:i].encode()) for i in range(len(text) + 1)}
        assert [is_complete(data[:i]) for i in range(len(data) + 1)] == [i in ends for i in range(len(data) + 1)]
    assert is_complete(b"a\x80")  # nothing can complete these
    assert is_complete(b"\xff")
    assert not is_complete(b"\xff\xc3")


def union_of(*tokenizers, sizes=None):
    ends = [[tokenizer.eos_token_id] for tokenizer in tokenizers]
    return UnionVocabulary(tokenizers, sizes or [len(tokenizer) for tokenizer in tokenizers], ends)


def vocabulary_of(tokens, **options):
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], **options))
    backend.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def test_probabilities_over_a_union_by_hand():
    first = vocabulary_of(["<end>", "<pad>", "a", "▁b"])
    second = vocabulary_of(["▁b", "c", "<pad>", "<end>"])
    union = union_of(first, second, sizes=[5, 4])  # one padding id more
    assert union.strings == [b"", b"a", b" b", b"c"]
    odds = torch.tensor([[1.0, 50.0, 2.0, 5.0, 90.0]])
    assert union.probabilities(0, odds.log()).tolist() == [pytest.approx([1 / 8, 2 / 8, 5 / 8, 0])]
    odds = torch.tensor([[4.0, 3.0, 70.0, 1.0]])
    assert union.probabilities(1, odds.log()).tolist() == [pytest.approx([1 / 8, 0, 4 / 8, 3 / 8])]


def test_all_mass_arrives_whatever_the_tokenizers():
    tokenizers = [byte_level(), sentencepiece(), characters(), unigram()]
    sizes = [len(tokenizer) + 5 for tokenizer in tokenizers]
    union = union_of(*tokenizers, sizes=sizes)
    for i, size in enumerate(sizes):
        mass = union.probabilities(i, 5 * torch.randn(7, size, generator=torch.Generator().manual_seed(i)))
        assert mass.shape == (7, len(union))
        torch.testing.assert_close(mass.sum(-1), torch.ones(7))
    assert len(set(union.strings)) == len(union.strings)


def test_chinese_meets_across_kinds_of_tokenizers():
    first, second = byte_level(), characters()
    shared = set(Spelling(first, len(first)).id_of) & set(Spelling(second, len(second)).id_of)
    assert "中".encode() in shared or "字".encode() in shared or "文".encode() in shared
    assert b" " in shared


def test_several_end_tokens_are_one():
    tokenizer = vocabulary_of(["<end>", "<pad>", "a", "b"])
    union = UnionVocabulary([tokenizer], [4], [[0, 3]])
    assert union.strings == [b"", b"a"]
    odds = torch.tensor([[1.0, 9.0, 2.0, 5.0]])
    assert union.probabilities(0, odds.log()).tolist() == [pytest.approx([6 / 8, 2 / 8])]


def test_first_tokens_of_strings_that_a_model_lacks():
    words, letters = vocabulary_of(["<end>", "<pad>", "hello", "q", "▁é"]), characters()
    union = union_of(words, letters)
    number = {string: i for i, string in enumerate(union.strings)}
    first = union.first_tokens(1)
    assert first[number[b"hello"]] == number[b"h"]
    assert first[number[" é".encode()]] == number[b" "]
    assert first[number[b"q"]] == -1  # no letter of the texts
    assert first[number[b"h"]] == number[b"h"]
    assert first[UnionVocabulary.END] == UnionVocabulary.END


def transcript(tokenizer, strings, prompt=(7,)):
    made = Transcript(Spelling(tokenizer, len(tokenizer)), prompt)
    for string in strings:
        made.append(string)
    return made


def test_own_tokens_are_kept_as_they_were_written():
    tokenizer = sentencepiece()
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("▁", "h", "e", "l", "l", "o")]
    assert transcript(tokenizer, [b" ", *(bytes([letter]) for letter in b"hello")]).ids == [7, *ids]


def test_a_word_with_a_foreign_string_is_tokenized_again_and_only_it():
    tokenizer = sentencepiece()
    spelling = Spelling(tokenizer, len(tokenizer))
    assert b" hel" not in spelling.id_of
    begun = transcript(tokenizer, [b" ", b"w", b" hel"])
    space_w = [spelling.id_of[b" "], spelling.id_of[b"w"]]
    assert begun.ids == [7, *space_w, *spelling.encode(b" hel")]
    begun.read = len(begun.ids)
    begun.append(b"l")
    begun.append(b"o")
    assert begun.ids == [7, *space_w, *spelling.encode(b" hello")]
    assert begun.read <= 3  # what changed is to be read again


def test_a_character_in_fragments_ends_as_one_token():
    for make in (characters, sentencepiece):
        tokenizer = make()
        data = "ö".encode()
        assert transcript(tokenizer, [b"h", data[:1], data[1:]]).ids == [
            7,
            tokenizer.convert_tokens_to_ids("h"),
            tokenizer.convert_tokens_to_ids("ö"),
        ]


def test_a_long_text_without_spaces_is_tokenized_again_in_pieces():
    tokenizer = characters()
    spelled = transcript(tokenizer, ["中".encode()[:2], "中".encode()[2:]] * 50)
    assert spelled.ids == [7, *[tokenizer.convert_tokens_to_ids("中")] * 50]
    assert len(spelled._word) <= 35
