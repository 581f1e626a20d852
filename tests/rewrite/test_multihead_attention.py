"""torchvision's nn.MultiheadAttention, called as its block does and otherwise."""

from __future__ import annotations

import pytest
import torch
from small_models import difference

from attnrewrite.errors import ConversionError


def test_multihead_attention_returns_the_pair_it_did(pairs):
    pair = pairs("torchvision_vit")
    query = torch.randn(2, 17, 48, dtype=torch.float64)
    name = "encoder.layers.encoder_layer_0.self_attention"
    expected, actual = (
        model.get_submodule(name)(query, query, query, need_weights=False) for model in (pair.donor, pair.converted)
    )
    assert isinstance(actual, tuple)
    assert len(actual) == 2
    assert actual[1] is None
    assert difference(actual[0], expected[0]) < 1e-12


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda mha, x: mha(x, x, x), "need_weights was False when this module was converted and is True now"),
        (
            lambda mha, x: mha(x, x + 1, x, need_weights=False),
            "query and key were the same tensor when this module was converted and differ now",
        ),
        (
            lambda mha, x: mha(x, x, x, need_weights=False, attn_mask=torch.ones(17, 17).triu(1).bool()),
            "attn_mask was None when this module was converted",
        ),
        (
            lambda mha, x: mha(x, x, x, need_weights=False, key_padding_mask=torch.arange(17).expand(2, -1) > 8),
            "key_padding_mask was None when this module was converted",
        ),
    ],
    ids=["need_weights", "another_key", "attn_mask", "key_padding_mask"],
)
def test_multihead_attention_called_otherwise_is_refused(pairs, call, reason):
    pair = pairs("torchvision_vit")
    query = torch.randn(2, 17, 48, dtype=torch.float64)
    name = "encoder.layers.encoder_layer_0.self_attention"
    assert call(pair.donor.get_submodule(name), query)[0].shape == query.shape
    with pytest.raises(ConversionError, match=reason):
        call(pair.converted.get_submodule(name), query)
