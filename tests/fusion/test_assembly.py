"""Assembled models are what their plans say: blocks of several models one after another."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from emorl.config import UserError
from emorl.fusion.assembly import assemble, count_blocks

MIXED = ((0, 0), (2, 1), (1, 0), (2, 1))  # skips layer 1, returns to it, repeats a block
TOKENS = torch.tensor([[7, 40, 9, 11, 30], [50, 6, 80, 8, 5]])
DEPTH = {"gpt2": "n_layer"}
KINDS = ["sliding_attention", "full_attention", "full_attention"]


@pytest.fixture(scope="module")
def make_columns(make_causal_model, make_seq2seq_model):
    def make(family, count=2):
        if family == "t5":
            return [make_seq2seq_model(seed, num_layers=3, initializer_factor=4.0) for seed in range(count)]
        depth = {DEPTH.get(family, "num_hidden_layers"): 3} | ({"layer_types": KINDS} if family == "gemma3_text" else {})
        return [make_causal_model(family, seed, **depth) for seed in range(count)]

    return make


def logits(model):
    inputs = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **inputs).logits


def generate(model, **settings):
    """Tokens and, of each step, logits; a repetition penalty keeps random models from saying one thing only."""
    settings |= {"max_new_tokens": 10, "min_new_tokens": 10, "repetition_penalty": 4.0, "do_sample": False}
    mask = torch.ones_like(TOKENS)
    made = model.generate(TOKENS, attention_mask=mask, return_dict_in_generate=True, output_logits=True, **settings)
    return made.sequences, torch.stack(made.logits)


FAMILIES = ["llama", "gpt2", "gemma3_text", "t5"]
PLANS = {"t5": ((1, 1), (1, 1), (0, 0), (2, 1), (3, 1), (5, 0), (4, 1), (5, 0), (5, 1))}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_of_one_column_are_that_column(make_columns, family):
    columns = make_columns(family)
    layers = range(count_blocks(columns[0]))
    for host, column in enumerate(columns):
        model = assemble(columns, tuple((layer, host) for layer in layers), host=host)
        assert torch.equal(logits(model), logits(column))
        assert not torch.equal(logits(model), logits(columns[1 - host]))


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_generation_equals_uncached_where_layers_are_skipped_and_repeated(make_columns, family):
    plan = PLANS.get(family, MIXED)
    model = assemble(make_columns(family), plan).double()  # in float32 a random T5 shows the kernels' roundings
    assert count_blocks(model) == len(plan)
    (tokens, cached), (others, uncached) = generate(model, use_cache=True), generate(model, use_cache=False)
    assert torch.equal(tokens, others)
    torch.testing.assert_close(cached, uncached, atol=1e-9, rtol=1e-9)
    assert len(set(tokens[0].tolist())) > 5


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded_it_is_the_same_model(make_columns, family, tmp_path):
    model = assemble(make_columns(family), PLANS.get(family, MIXED))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert torch.equal(generate(loaded)[0], generate(model)[0])


def test_layers_keep_their_kind_of_attention(make_columns):
    assert assemble(make_columns("gemma3_text"), ((2, 1), (0, 0), (0, 1))).config.layer_types == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
    ]


def test_hidden_states_are_those_of_the_plan_even_if_the_columns_have_recorded_theirs(make_columns):
    columns = make_columns("llama")
    columns[0](TOKENS, output_hidden_states=True)
    hidden = assemble(columns, MIXED)(TOKENS, output_hidden_states=True).hidden_states
    assert len(hidden) == len(MIXED) + 1


def test_the_columns_stay_as_they_were_and_lend_their_tensors(make_columns):
    columns = make_columns("llama")
    before = [{name: tensor.clone() for name, tensor in column.state_dict().items()} for column in columns]
    configs = [column.config.to_dict() for column in columns]
    model = assemble(columns, MIXED)
    generate(model)
    for column, tensors, config in zip(columns, before, configs, strict=True):
        assert column.config.to_dict() == config
        assert column.state_dict().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in column.state_dict().items())
    blocks = model.model.layers
    assert blocks[1].mlp.up_proj.weight is columns[1].model.layers[2].mlp.up_proj.weight
    assert blocks[3].mlp.up_proj.weight is not blocks[1].mlp.up_proj.weight  # used again: a copy, so that it can be saved
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2, 3]


def test_a_t5_stack_takes_the_position_bias_of_the_column_it_begins_with(make_columns):
    columns = make_columns("t5")
    model = assemble(columns, ((2, 1), (1, 0), (0, 0), (5, 1)), host=0)
    bias = columns[1].encoder.block[0].layer[0].SelfAttention.compute_bias(TOKENS.shape[1], TOKENS.shape[1])
    hidden = columns[0].shared(TOKENS)
    for layer, column in ((2, 1), (1, 0), (0, 0)):
        hidden = columns[column].encoder.block[layer](hidden, position_bias=bias)[0]
    hidden = columns[0].encoder.final_layer_norm(hidden)
    torch.testing.assert_close(model.encoder(TOKENS).last_hidden_state, hidden)


def test_a_mixed_bert_classifier_is_a_loop_over_its_blocks():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    columns = [BertForSequenceClassification(BertConfig(vocab_size=99, num_labels=3 + i, **sizes)).eval() for i in range(2)]
    hidden = columns[1].bert.embeddings(TOKENS)
    for layer, column in MIXED:
        hidden = columns[column].bert.encoder.layer[layer](hidden)
    expected = columns[1].classifier(columns[1].bert.pooler(hidden))
    torch.testing.assert_close(logits(assemble(columns, MIXED, host=1)), expected)


def test_a_mixed_vit_is_a_loop_over_its_blocks():
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    columns = [ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes)).eval() for _ in range(2)]
    image = torch.randn(2, 3, 8, 8)
    hidden = columns[0].vit.embeddings(image)
    for layer, column in MIXED:
        hidden = columns[column].vit.layers[layer](hidden)
    expected = columns[0].classifier(columns[0].vit.layernorm(hidden)[:, 0])
    torch.testing.assert_close(assemble(columns, MIXED)(image).logits, expected)


def test_columns_of_other_shapes_are_refused_with_the_first_tensor(make_causal_model):
    columns = [make_causal_model("llama"), make_causal_model("llama", intermediate_size=40)]
    with pytest.raises(UserError, match=r"column 1 .* model\.layers\.0\.mlp\.gate_proj\.weight is \(40, 32\)"):
        assemble(columns, ((0, 0), (1, 1)))


def test_columns_of_other_depths_are_refused(make_causal_model):
    columns = [make_causal_model("llama"), make_causal_model("llama", num_hidden_layers=3)]
    with pytest.raises(UserError, match=r"model\.layers\.2\.\S+ is .*, in column 0 missing"):
        assemble(columns, ((0, 0), (1, 1)))


@pytest.mark.parametrize("plan", [(), ((2, 0),), ((0, 1),)])
def test_a_plan_beyond_the_columns_is_refused(make_causal_model, plan):
    with pytest.raises(UserError, match="a plan of 2 layers and 1 columns was expected"):
        assemble([make_causal_model("llama")], plan)
