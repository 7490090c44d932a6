"""Different models that write together: against each model alone, a slow reference without caches, and models made to order."""

from copy import deepcopy

import pytest
import torch
from tokenizers import decoders
from transformers import LlamaConfig, LlamaForCausalLM

from emorl.dynamic.engines.engine import SIGNALS, Decoding
from emorl.dynamic.engines.union import VOCABULARIES, UnionEngine
from emorl.dynamic.engines.vocabulary import UnionVocabulary, is_complete

PROMPTS = ["Hello there", "How are you, my friend?", "ö", "Tell me a story about the sea and the wind"]


@pytest.fixture(scope="module")
def trio(make_causal_model, tokenizer, words, letters):
    """Three models of two families with a tokenizer each; sharper than usual, so that their greedy tokens differ clearly."""
    made = [
        make_causal_model("llama", 1, initializer_range=0.3, vocab_size=len(tokenizer) + 7),
        make_causal_model("gpt2", 2, initializer_range=0.3, vocab_size=len(words), n_positions=512),
        make_causal_model("llama", 3, initializer_range=0.3, vocab_size=len(letters)),
    ]
    return made, [tokenizer, words, letters]


def engine_of(trio, which, **options):
    chosen = [[part[i] for i in which] for part in trio]
    return UnionEngine(*chosen, names=[f"model {i}" for i in range(len(which))], **options)


def written(engine, prompts, schedule, seeds=None, **decoding):
    """The finished writing; `schedule` is a list of (weights (K,) or (B, K), span), of which the last one is repeated."""
    writing = engine.begin(prompts, Decoding(**{"max_new_tokens": 24} | decoding), seeds)
    for weights, span in [*schedule, *[schedule[-1]] * 30]:
        weights = torch.tensor(weights)
        writing.write(weights.expand(len(prompts), -1), span)
    assert writing.finished.all()
    return writing


def data_of(writing):
    return [bytes(data) for data in writing._data]


def alone(model, tokenizer, prompt, count=24):
    """The bytes that `generate()` writes greedily where special tokens but the end are left out."""
    union = UnionVocabulary([tokenizer], [model.config.vocab_size], [[1]])
    special = [i for i, data in enumerate(union.spellings[0].token_bytes) if data is None and i != 1]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    mask = torch.ones_like(inputs["input_ids"])
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": count, "suppress_tokens": special}
    ids = model.generate(inputs["input_ids"], **options)[0, mask.shape[1] :].tolist()
    return b"".join(union.spellings[0].token_bytes[id_] or b"" for id_ in ids), len(ids)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_model_alone_or_with_all_weight_or_with_its_equal_writes_as_generate_does(trio, vocabulary, which):
    model, tokenizer = trio[0][which], trio[1][which]
    expected = [alone(model, tokenizer, prompt) for prompt in PROMPTS]
    other = (which + 1) % 3
    for models_, schedule in (
        ([which], [([1.0], 5)]),
        ([other, which], [([0.0, 1.0], 5)]),
        ([which, which, which], [([0.2, 0.5, 0.3], 5)]),
    ):
        writing = written(engine_of(trio, models_, vocabulary=vocabulary), PROMPTS, schedule)
        assert list(zip(data_of(writing), writing.tokens, strict=True)) == expected


class SlowReference:
    """Writes one text with all models always run: each reads all of it again at every step, without any cache."""

    def __init__(self, engine, prompt):
        self.engine, self.prompt, self.strings, self.ended = engine, prompt, [], False

    def ids(self, i):
        """Words are cut before spaces; those with a string that is no token are tokenized again."""
        tokenizer, spelling = self.engine.tokenizers[i], self.engine.union.spellings[i]
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template([{"role": "user", "content": self.prompt}], add_generation_prompt=True)
            ids = list(ids["input_ids"])
        else:
            ids = tokenizer(self.prompt)["input_ids"]
        found = [[]]
        for string in self.strings:
            if found[-1] and (string[:1].isspace() or len(b"".join(found[-1])) >= 32) and is_complete(b"".join(found[-1])):
                found.append([])
            found[-1].append(string)
        for word in found:
            own = [spelling.id_of.get(string) for string in word]
            ids += own if None not in own and not self.spelled(word, spelling) else spelling.encode(b"".join(word))
        return ids

    def spelled(self, word, spelling):
        """Whether a character that has a token was written byte by byte."""
        ends, joined = {sum(map(len, word[:i])) for i in range(len(word))}, b"".join(word)
        text, place = joined.decode("utf-8", "surrogateescape"), 0
        for character in text:
            size = len(character.encode("utf-8", "surrogateescape"))
            if size > 1 and ends & set(range(place + 1, place + size)) and character.encode() in spelling.id_of:
                return True
            place += size
        return False

    @torch.no_grad()
    def distributions(self):
        union, found = self.engine.union, []
        for i, model in enumerate(self.engine.models):
            logits = model(torch.tensor([self.ids(i)])).logits[:, -1]
            found.append(union.probabilities(i, logits)[0].double())
        return found

    def step(self, weights):
        found = self.distributions()
        if self.engine.top_k is None:
            mixed = sum(weight * own for weight, own in zip(weights, found, strict=True))
        else:
            best = {int(n) for own, w in zip(found, weights, strict=True) for n in own.topk(self.engine.top_k).indices if w}
            mixed = torch.zeros(len(self.engine.union), dtype=torch.double)
            for i, (own, weight) in enumerate(zip(found, weights, strict=True)):
                if not weight:
                    continue
                firsts = self.engine.union.first_tokens(i)
                scores = {n: float(own[firsts[n]]) if firsts[n] >= 0 else 0.0 for n in best}
                for n in best:
                    mixed[n] += weight * scores[n] / sum(scores.values())
        number = int(mixed.argmax())
        self.ended = number == UnionVocabulary.END
        if not self.ended:
            self.strings.append(self.engine.union.strings[number])

    def write(self, schedule, limit):
        tokens = 0
        for weights, span in [*schedule, *[schedule[-1]] * 30]:
            for count in range(span + 3):
                if self.ended or tokens == limit or (count >= span and is_complete(b"".join(self.strings))):
                    break
                self.step(weights)
                tokens += 1
        return b"".join(self.strings)


SCHEDULES = {
    "constant": [([0.5, 0.3, 0.2], 4)],
    "one leaves and returns": [([0.4, 0.3, 0.3], 3), ([0.6, 0.0, 0.4], 5), ([0.3, 0.5, 0.2], 4)],
    "all leave in turn": [([0.0, 1.0, 0.0], 3), ([0.5, 0.0, 0.5], 3), ([0.0, 0.4, 0.6], 3), ([0.4, 0.3, 0.3], 2)],
}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_caches_that_are_kept_and_cut_back_write_what_reading_all_anew_writes(trio, vocabulary, schedule):
    engine = engine_of(trio, [0, 1, 2], vocabulary=vocabulary, top_k=5)
    expected = [SlowReference(engine, prompt).write(schedule, 24) for prompt in PROMPTS]
    assert data_of(written(engine, PROMPTS, schedule)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("decoding", [{}, {"temperature": 1.0, "top_p": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_a_text_does_not_depend_on_its_batch(trio, vocabulary, decoding):
    engine = engine_of(trio, [0, 1, 2], vocabulary=vocabulary)
    rows = [[0.5, 0.3, 0.2], [0.0, 0.5, 0.5], [0.7, 0.3, 0.0], [0.0, 0.0, 1.0]]
    schedule = [(rows, 3), (rows[::-1], 4), (rows, 2)]
    together = written(engine, PROMPTS, schedule, seeds=[5, 6, 7, 8], **decoding)
    for i, prompt in enumerate(PROMPTS):
        own = [([weights[i]], span) for weights, span in schedule]
        single = written(engine, [prompt], own, seeds=[5 + i], **decoding)
        assert data_of(single) == [data_of(together)[i]]
        assert single.tokens == [together.tokens[i]]
        torch.testing.assert_close(single.signals[0], together.signals[i], atol=1e-4, rtol=0)


def test_spans_do_not_matter_where_weights_stay(trio):
    engine = engine_of(trio, [0, 1, 2])
    once, often = (written(engine, PROMPTS, [([0.5, 0.3, 0.2], span)]) for span in (24, 1))
    assert data_of(once) == data_of(often)


def test_samples_come_again_with_their_seed_only(trio):
    engine = engine_of(trio, [0, 1])
    options = {"schedule": [([0.5, 0.5], 8)], "temperature": 1.0}
    first, again = (data_of(written(engine, PROMPTS[:1] * 3, seeds=[1, 2, 1], **options)) for _ in range(2))
    assert first == again
    assert first[0] == first[2] != first[1]
    assert data_of(written(engine, PROMPTS[:1], seeds=[0], seed=1, **options)) == first[:1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_distributions_to_choose_from_sum_to_1(trio, vocabulary):
    engine = engine_of(trio, [0, 1, 2], vocabulary=vocabulary)
    writing = engine.begin(PROMPTS, Decoding(24))
    active = torch.tensor([[True, True, True], [True, False, True], [False, False, True], [True, True, False]])
    for _ in range(3):
        _, shares = writing._shares([0, 1, 2, 3], active)
        torch.testing.assert_close(shares.sum(-1), active.float())
        writing.write(torch.tensor([0.3, 0.3, 0.4]).expand(4, -1), 2)


def chain(tokenizer, following, size=None):
    """A model whose next token depends on the last one only, and is almost certain: {token: next token}."""
    size = size or len(tokenizer)
    hidden = 8 * ((size + 7) // 8)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=hidden,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=hidden // 8,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=0,
        max_position_embeddings=40,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    model.model.embed_tokens.weight.data[:, :size] = torch.eye(size)
    model.model.norm.weight.data.fill_(1)
    for token, successor in following.items():
        model.lm_head.weight.data[successor, token] = 10 / hidden**0.5
    return model


def looping(tokenizer, text):
    """A model that writes the bytes of a text over and over."""
    ids = tokenizer(text)["input_ids"]
    assert len(set(ids)) == len(ids)
    following = dict.fromkeys(range(len(tokenizer)), ids[0]) | dict(zip(ids, ids[1:] + ids[:1], strict=True))
    return chain(tokenizer, following)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("character", ["é", "中", "👩"])
def test_a_span_ends_with_a_whole_character(tokenizer, character, vocabulary):
    engine = UnionEngine([looping(tokenizer, character)], [tokenizer], names=["bytes"], vocabulary=vocabulary)
    size = len(character.encode())
    writing = engine.begin(["a", "b"], Decoding(max_new_tokens=3 * size - 1))
    writing.write(torch.ones(2, 1), 1)
    assert writing.texts == [character] * 2
    assert writing.tokens == [size] * 2
    writing.write(torch.ones(2, 1), size)
    assert writing.texts == [character * 2] * 2
    assert writing.tokens == [2 * size] * 2
    writing.write(torch.ones(2, 1), 1)
    assert writing.texts == [character * 2] * 2  # no room to complete the third
    assert writing.finished.all()


def test_a_span_that_cannot_end_with_a_character_ends_after_3_more_tokens(tokenizer):
    lead = tokenizer("é")["input_ids"][0]  # again and again: completes nothing
    model = chain(tokenizer, dict.fromkeys(range(len(tokenizer)), lead))
    writing = UnionEngine([model], [tokenizer], names=["lead"]).begin(["a"], Decoding(max_new_tokens=20))
    writing.write(torch.ones(1, 1), 2)
    assert writing.tokens == [5]
    assert writing.texts == [""]


def test_a_character_from_one_model_is_read_by_others_as_their_own_token(tokenizer, letters):
    """The second model answers "ö" by the end of the text, and anything else by "h"."""
    umlaut, letter = letters.convert_tokens_to_ids(["ö", "h"])
    second = chain(letters, dict.fromkeys(range(len(letters)), letter) | {umlaut: letters.eos_token_id})
    engine = UnionEngine([looping(tokenizer, "ö"), second], [tokenizer, letters], names=["bytes", "letters"])
    writing = engine.begin(["hello"], Decoding(max_new_tokens=9))
    writing.write(torch.tensor([[1.0, 0.0]]), 1)
    assert writing.texts == ["ö"]
    writing.write(torch.tensor([[0.0, 1.0]]), 4)
    assert writing.finished.tolist() == [True]
    assert writing.texts == ["ö"]
    assert writing.tokens == [3]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_end_token_of_any_model_ends_a_text(tokenizer, letters, vocabulary):
    ending = chain(letters, dict.fromkeys(range(len(letters)), 5))
    ending.generation_config.eos_token_id = [1, 5]
    engine = UnionEngine(
        [looping(tokenizer, "abc"), ending], [tokenizer, letters], names=["goes on", "ends"], vocabulary=vocabulary
    )
    writing = engine.begin(["a", "b"], Decoding(max_new_tokens=6))
    writing.write(torch.tensor([[0.2, 0.8], [0.8, 0.2]]), 2)
    assert writing.finished.tolist() == [True, False]
    assert writing.tokens == [1, 2]
    assert writing.texts[0] == ""
    writing.write(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 50)
    assert writing.tokens == [1, 6]
    assert writing.texts[1] == "abcabc"


def test_a_text_ends_where_the_context_of_a_model_that_writes_it_is_full(tokenizer, letters):
    models_ = [looping(tokenizer, "abc"), looping(letters, "he")]
    models_[0].config.max_position_embeddings = 30
    engine = UnionEngine(models_, [tokenizer, letters], names=["short", "long"])
    writing = engine.begin([[{"role": "user", "content": "hello"}]] * 2, Decoding(max_new_tokens=30))
    writing.write(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), 30)
    assert writing.tokens == [30 - 8 + 1, 30]  # the last one needs no reading
    writing = engine.begin([[{"role": "user", "content": "hello"}]], Decoding(max_new_tokens=30))
    writing.write(torch.tensor([[0.0, 1.0]]), 26)
    assert writing.finished.tolist() == [False]
    writing.write(torch.tensor([[0.5, 0.5]]), 1)
    assert writing.finished.tolist() == [True]
    assert writing.tokens == [26]
    with pytest.raises(ValueError, match=r"Prompt 0 has 33 tokens for model 'short'; expected 1 to 30"):
        engine.begin(["a" * 30], Decoding(2))


def test_a_model_is_run_only_for_texts_that_give_it_weight_and_are_unfinished(tokenizer, letters):
    models_ = [looping(tokenizer, "abc"), looping(letters, "he")]
    batches = [[], []]
    for model, seen in zip(models_, batches, strict=True):
        model.register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
        )
    engine = UnionEngine(models_, [tokenizer, letters], names=["a", "b"])
    writing = engine.begin(["h", "e", "l"], Decoding(max_new_tokens=9))
    assert [len(seen) for seen in batches] == [1, 1]
    writing.write(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), 3)
    assert batches[0][1:] == [(2, 1)] * 3
    assert batches[1][1:] == [(1, 1)] * 3
    writing.write(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 3)
    assert batches[0][4:] == [(1, 1)] * 3
    assert batches[1][4:] == [(2, 3), *[(2, 1)] * 3]  # one prefill of what was missed
    writing.write(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 3)
    assert len(batches[0]) == 9  # the last token is not read
    assert writing.finished.all()
    writing.write(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]), 3)
    assert len(batches[0]) == 9


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_signals_of_two_certain_models_that_disagree(tokenizer, letters, vocabulary):
    models_ = [looping(tokenizer, "abc"), looping(letters, "he")]
    for model in models_:
        model.lm_head.weight.data *= 10
    engine = UnionEngine(models_, [tokenizer, letters], names=["a", "b"], vocabulary=vocabulary)
    writing = engine.begin(["x"], Decoding(max_new_tokens=9))
    divergence = 2 - 0.75 * torch.tensor(3.0).log2() - 0.5  # of (1, 0) from (1/2, 1/2): entropy of (3/4, 1/4) less 1/2
    expected = torch.tensor([0.0, 1.0, float(divergence), 0.0])
    torch.testing.assert_close(writing.signals[0], expected.expand(2, len(SIGNALS)), atol=1e-5, rtol=0)
    writing.write(torch.tensor([[1.0, 0.0]]), 2)
    torch.testing.assert_close(writing.signals[0, 0], torch.tensor([0.0, 1.0, 0.0, 0.0]), atol=1e-5, rtol=0)
    torch.testing.assert_close(writing.signals[0, 1], expected + torch.tensor([0, 0, 0, 1.0]), atol=1e-5, rtol=0)


def test_entropy_of_a_uniform_model_is_1(tokenizer):
    model = chain(tokenizer, {})
    for vocabulary in VOCABULARIES:
        engine = UnionEngine([model], [tokenizer], names=["any"], vocabulary=vocabulary, top_k=4)
        size = 257 if vocabulary == "full" else 4
        found = engine.begin(["x"], Decoding(max_new_tokens=9)).signals
        torch.testing.assert_close(found, torch.tensor([[[1.0, 1 / size, 0.0, 0.0]]]))


def test_conversations_reach_models_without_a_template_as_lines(tokenizer, letters):
    engine = UnionEngine([looping(tokenizer, "abc"), looping(letters, "he")], [tokenizer, letters], names=["a", "b"])
    turns = [{"role": "system", "content": "hello"}, {"role": "user", "content": "you"}]
    writing = engine.begin([turns], Decoding(2))
    chat = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert writing._readers[0].transcripts[0].ids == chat
    assert writing._readers[1].transcripts[0].ids == letters("hello\nyou")["input_ids"]


def test_mistakes_are_refused_in_one_line(trio, make_causal_model, make_seq2seq_model, tokenizer, words):
    model = trio[0][0]
    with pytest.raises(ValueError, match="2 models, 1 tokenizers"):
        UnionEngine([model, model], [tokenizer], names=["a", "b"])
    with pytest.raises(ValueError, match="name of its own"):
        UnionEngine([model, model], [tokenizer, tokenizer], names=["a", "a"])
    with pytest.raises(ValueError, match="at least one model"):
        UnionEngine([], [], names=[])
    with pytest.raises(ValueError, match="vocabulary='exact'"):
        UnionEngine([model], [tokenizer], names=["a"], vocabulary="exact")
    with pytest.raises(ValueError, match="top_k=0"):
        UnionEngine([model], [tokenizer], names=["a"], top_k=0)
    with pytest.raises(ValueError, match="'t5' is a T5ForConditionalGeneration"):
        UnionEngine([make_seq2seq_model()], [tokenizer], names=["t5"])
    with pytest.raises(ValueError, match="its tokenizer more"):
        UnionEngine([make_causal_model(vocab_size=40)], [words], names=["small"])
    unreadable = deepcopy(tokenizer)
    unreadable.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="expected byte-level BPE or SentencePiece"):
        UnionEngine([model], [unreadable], names=["a"])
    engine = UnionEngine([model, trio[0][1]], [tokenizer, words], names=["a", "b"])
    writing = engine.begin(["x"], Decoding(4))
    for weights in ([[0.5, 0.4]], [[1.5, -0.5]], [[1.0]], [0.5, 0.5], [[float("nan"), 1.0]]):
        with pytest.raises(ValueError, match="at least 0 and of sum 1"):
            writing.write(torch.tensor(weights), 2)
    with pytest.raises(ValueError, match="span=0"):
        writing.write(torch.tensor([[0.5, 0.5]]), 0)
