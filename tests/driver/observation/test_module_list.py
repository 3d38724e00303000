"""Blocks with one module per expert: remote code and transformers 4.x."""

import contextlib

import pytest
import torch
from torch import Tensor

from reap_driver.model.discover import find_moe_layers
from reap_driver.observation.observer import observe
from reap_kernels.errors import UnsupportedModel
from tests.driver.observation import remote_blocks as remote
from tests.driver.observation.oracle import assert_matches

SHAPES = {"method": "module-list", "inline": "module-list-inline", "in place": "module-list-inline"}


def _ids(batch: int = 2, seq: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, remote.VOCAB, (batch, seq), generator=generator)


def _truth(model: remote.RemoteModel, ids: Tensor) -> list[dict[str, Tensor]]:
    """Statistics of each layer in float64, computed from the definition."""
    truths = []
    hidden = model.embed_tokens(ids)
    for layer in model.layers:
        block = layer["mlp"]
        flat = hidden.reshape(-1, remote.WIDTH)
        chosen, weights = block.route(flat)
        # [T, E, H]: every expert on every token, in float64.
        every = [expert.double()(flat.double()) for expert in block.experts]
        block.experts.float()
        outputs = torch.stack(every, dim=1)
        gates = torch.zeros(len(flat), remote.EXPERTS, dtype=torch.float64)
        gates.scatter_(1, chosen, weights.double())
        hit = gates != 0
        norms = outputs.norm(dim=-1) * hit
        masked = outputs.where(hit[..., None], -torch.inf)
        truths.append(
            {
                "count": hit.sum(0).double(),
                "router_weight_sum": gates.sum(0),
                "norm_sum": norms.sum(0),
                "weighted_norm_sum": (gates * norms).sum(0),
                "norm_sq_sum": norms.square().sum(0),
                "weighted_norm_sq_sum": (gates * norms).square().sum(0),
                "out_max": masked.amax(dim=(0, 2)),
                "out_min": outputs.where(hit[..., None], torch.inf).amin(dim=(0, 2)),
                "tokens": torch.tensor(len(flat)),
            }
        )
        hidden = hidden + block(hidden)
    return truths


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_and_output(shape: str) -> None:
    """Statistics equal the definition, output equals the block's own."""
    model, ids = remote.remote(shape), _ids()
    with torch.no_grad():
        truths = _truth(model, ids)
        plain = model(ids).logits
    with observe(model) as obs:
        observed = obs(input_ids=ids).logits
    torch.testing.assert_close(observed, plain, rtol=1e-5, atol=1e-6)
    assert [layer.adapter for layer in obs.layers] == [SHAPES[shape]] * 2
    assert list(obs.stats.layers) == ["layers.0.mlp.experts", "layers.1.mlp.experts"]
    for stats, truth in zip(obs.stats.layers.values(), truths, strict=True):
        assert_matches(stats, truth, 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_facts_and_restore(shape: str) -> None:
    """Sizes are found on the modules, and the block is as before afterwards."""
    model, ids = remote.remote(shape), _ids()
    layer = find_moe_layers(model)[0]
    assert (layer.num_experts, layer.top_k) == (remote.EXPERTS, remote.TOP_K)
    assert (layer.hidden_size, layer.intermediate_size) == (remote.WIDTH, remote.INNER)
    before = [dict(vars(module)) for module in model.modules()]
    with torch.no_grad():
        plain = model(ids).logits
    with contextlib.suppress(KeyboardInterrupt), observe(model) as obs:
        obs(input_ids=ids)
        raise KeyboardInterrupt
    with torch.no_grad():
        assert torch.equal(plain, model(ids).logits)
    for old, module in zip(before, model.modules(), strict=True):
        assert old.keys() == vars(module).keys()


def test_groups_and_low_precision() -> None:
    """The inline form supports groups and bf16 like any other."""
    model = remote.remote("inline").to(torch.bfloat16)
    with observe(model) as obs:
        for group in ("a", "b", "a"):
            with obs.group(group):
                obs(input_ids=_ids(batch=1))
    for stats in obs.stats.layers.values():
        assert stats.tokens.tolist() == [24, 12]
        assert int(stats.count.sum()) == 36 * remote.TOP_K


def test_masks_reach_a_method_and_are_refused_inline() -> None:
    """If tokens cannot be left out, padding is refused by name; otherwise it is masked."""
    ids, mask = _ids(), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with observe(remote.remote("method")) as obs:
        obs(input_ids=ids, attention_mask=mask)
    assert all(int(layer.tokens.sum()) == 19 for layer in obs.stats.layers.values())
    with observe(remote.remote("inline")) as obs:
        with pytest.raises(
            UnsupportedModel, match=r"layers\.0\.mlp\.experts routes inside its block"
        ):
            obs(input_ids=ids, attention_mask=mask)
        obs(input_ids=ids, attention_mask=torch.ones_like(mask))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("gathered", "reached stack before being multiplied by its router weight"),
        ("ungated", "before being multiplied by its router weight"),
        ("row gate", "not by a column of router weights"),
        ("capacity", "weighted 48 rows for 24 tokens, expected 72"),
    ],
)
def test_blocks_that_cannot_be_followed(block: str, message: str) -> None:
    """Anything but output times a column of router weights, for each selected slot, is refused."""
    with observe(remote.remote(block)) as obs, pytest.raises(UnsupportedModel, match=message):
        obs(input_ids=_ids())


def test_method_that_computes_something_else_is_refused() -> None:
    """The check of the first call covers the replaced method as well."""
    model = remote.remote("method")
    for expert in model.layers[1]["mlp"].experts:
        expert.down_proj.register_forward_hook(lambda _, __, out: out.tanh())
    with observe(model) as obs, pytest.raises(UnsupportedModel, match=r"layers\.1\.mlp\.experts"):
        obs(input_ids=_ids())
