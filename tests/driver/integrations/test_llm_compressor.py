"""What the integration into llm-compressor decides without it: which masks are causal."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import reap_kernels as rk
from reap_driver.base.requirements import Unmet
from reap_driver.integrations.llm_compressor_attention import check_causal, sees_later_tokens

LOWEST = torch.finfo(torch.bfloat16).min


def additive(tokens: int = 6, padded_left: int = 0) -> Tensor:
    """A causal mask as eager attention adds it; a row of padding sees nothing."""
    seen = torch.ones(tokens, tokens).tril().bool()
    seen[:, :padded_left] = False
    return torch.zeros(tokens, tokens).masked_fill(~seen, LOWEST)[None, None].bfloat16()


@pytest.mark.parametrize(
    ("implementation", "mask", "sees"),
    [
        ("eager", additive(), False),
        ("eager", additive(padded_left=2), False),
        ("eager", torch.zeros(2, 1, 6, 6), True),
        ("eager", torch.cat([additive(), torch.zeros(1, 1, 6, 6).bfloat16()]), True),
        ("eager", None, True),
        ("eager", torch.ones(6, 6).tril().bool()[None, None], True),
        ("sdpa", None, False),
        ("sdpa", torch.ones(6, 6).tril().bool()[None, None], False),
        ("sdpa", torch.ones(1, 1, 6, 6).bool(), True),
        ("flash_attention_2", torch.ones(2, 6), False),
    ],
)
def test_masks(implementation: str, mask: Tensor | None, sees: bool) -> None:
    assert sees_later_tokens(implementation, mask, 6) is sees


def test_one_token_has_no_later_one() -> None:
    assert not sees_later_tokens("eager", None, 1)


def test_the_error_names_layer_and_remedy() -> None:
    attention = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    hidden = torch.zeros(1, 6, 4)
    given = {"hidden_states": hidden, "attention_mask": None}
    with pytest.raises(rk.errors.UnsupportedModel, match=r"^layers\.0: .* causal_attention"):
        check_causal("layers.0", attention, (), given)
    with pytest.raises(rk.errors.UnsupportedModel, match='pipeline="basic"'):
        check_causal("layers.0", attention, (hidden,), {"attention_mask": None})


def test_modules_that_take_no_mask_are_not_checked() -> None:
    attention = SimpleNamespace(config=SimpleNamespace(_attn_implementation="eager"))
    assert check_causal("layers.0", attention, (torch.zeros(1, 6, 4),), {}) is None


def test_without_llm_compressor_the_extra_is_named() -> None:
    with pytest.raises(Unmet, match=r"pip install reap-kernels\[llmcompressor\]"):
        import_module("reap_driver.integrations.llm_compressor")
