"""Candidates over layers: which layers there are, and what a candidate does to each module."""

import pytest

from emorl.config import UserError
from emorl.fusion.operators import Fusion
from emorl.search.spaces.layer_space import LayerSpace

T5 = (
    "decoder.block.0.layer.0.SelfAttention.q",
    "decoder.block.1.layer.1.EncDecAttention.v",
    "encoder.block.0.layer.0.SelfAttention.q",
    "encoder.block.1.layer.1.DenseReluDense.wo",
)


def test_an_encoder_s_layers_come_first_and_every_family_s_are_found():
    assert LayerSpace(("a", "b"), ("ties",), T5).layers == [
        ("encoder.block", 0), ("encoder.block", 1), ("decoder.block", 0), ("decoder.block", 1)
    ]  # fmt: skip
    for name in ("model.layers.3.mlp.up_proj", "transformer.h.3.attn.c_attn", "bert.encoder.layer.3.output.dense"):
        assert [number for _, number in LayerSpace(("a",), ("linear",), (name,)).layers] == [3]
    with pytest.raises(UserError, match=r"no layers among the adapted modules, such as 'classifier.dense'"):
        assert LayerSpace(("a",), ("linear",), ("classifier.dense",)).layers


def test_a_candidate_says_what_happens_to_each_module():
    space = LayerSpace(("a", "b"), ("ties", "slerp"), (*T5, "lm_head"))
    params = dict(zip(space.merging.names, (0, 3, 1, 2), strict=True))
    fusion_of = space.fusion_of(params)
    assert fusion_of(T5[2]) == Fusion("keep", (1.0, 0.0))
    assert fusion_of(T5[3]) == Fusion("slerp", (0.5, 0.5))
    assert fusion_of(T5[0]) == Fusion("keep", (0.0, 1.0))
    assert fusion_of(T5[1]) == fusion_of("lm_head") == Fusion("ties", (0.5, 0.5))
    assert space.describe(params) == {
        "layers": {"encoder.block.0": "a", "encoder.block.1": "slerp", "decoder.block.0": "b", "decoder.block.1": "ties"}
    }
    assert len(space.corners()) == 4
