"""Which tokens count: padding, token masks, groups, splitting, generation, decoding."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from reap_driver.observation import token_mask
from reap_driver.observation.observer import Observer, observe
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver import zoo
from tests.driver.observation import oracle
from tests.driver.observation.test_architectures import NAMES, Support

PADDING_SENSITIVE = {
    "axk2",
    "deepseek_v32",
    "deepseek_v4",
    "glm_moe_dsa",
    "hy_v4",
    "minimax_m3_vl",
}


def _tiny(name: str) -> tuple[PreTrainedModel, Tensor]:
    """A model and ids [2, 12]."""
    config, model = zoo.tiny(name)
    return model, zoo.tiny_inputs(name, config)["input_ids"]


def _padded(ids: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Ids and mask [2, 12] of a row of `ids` and of 7 tokens of the next, padded at `side`."""
    padded, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    padded[0], mask[0] = ids[0], 1
    place = slice(0, 7) if side == "right" else slice(5, 12)
    padded[1, place], mask[1, place] = ids[1, :7], 1
    return padded, mask


def _assert_same(got: SaliencyStats, want: SaliencyStats, rtol: float) -> None:
    for layer, stats in got.layers.items():
        other = want.layers[layer]
        assert torch.equal(stats.counts, other.counts)
        assert torch.equal(stats.tokens, other.tokens)
        torch.testing.assert_close(stats.sums, other.sums, rtol=rtol, atol=1e-9)


@dataclass(frozen=True)
class Sequences:
    """An architecture's model, and its statistics of two sequences one by one; never changed."""

    name: str
    model: PreTrainedModel
    ids: Tensor
    stats: SaliencyStats


@pytest.fixture(scope="module", params=[n for n in NAMES if n not in PADDING_SENSITIVE])
def sequences(request: pytest.FixtureRequest) -> Sequences:
    model, ids = _tiny(request.param)
    with observe(model) as single:
        for row in (ids[:1], ids[1:, :7]):
            single(input_ids=row)
    return Sequences(request.param, model, ids, single.stats)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_equals_sequences(side: str, sequences: Sequences, support: Support) -> None:
    """A padded batch with its mask gives the statistics of the sequences one by one."""
    padded, mask = _padded(sequences.ids, side)
    with observe(sequences.model) as batched:
        batched(input_ids=padded, attention_mask=mask)
    _assert_same(batched.stats, sequences.stats, 5e-6)
    support(sequences.name, f"{side} padding", "pass")


@pytest.mark.parametrize("name", sorted(PADDING_SENSITIVE))
def test_padding_is_refused_where_it_changes_the_model(name: str, support: Support) -> None:
    """Sparse attention over padded positions is refused by name, and works without padding."""
    model, ids = _tiny(name)
    padded, mask = _padded(ids, "left")
    with observe(model) as obs:
        obs(input_ids=ids[:1], attention_mask=torch.ones_like(ids[:1]))
        with pytest.raises(UnsupportedModel, match="without padding"):
            obs(input_ids=padded, attention_mask=mask)
    assert int(next(iter(obs.stats.layers.values())).tokens.sum()) == 12
    for refused in ("left padding", "right padding"):
        support(name, refused, "refused")


def test_token_mask_counts_only_its_tokens() -> None:
    """Tokens left out are computed (same output) and not counted."""
    config, model = zoo.tiny("deepseek_v3")
    inputs = zoo.tiny_inputs("deepseek_v3", config)
    mask = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.4
    obs = observe(model)
    names = [layer.name for layer in obs.layers]
    with obs, oracle.recorded(model, names) as calls:
        masked = obs(**inputs, token_mask=mask).logits
    with torch.no_grad():
        plain = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(masked, plain)
    for name, stats in obs.stats.layers.items():
        module = model.get_submodule(name)
        truth = oracle.expected(module, calls[name], 8, mask.flatten())
        oracle.assert_matches(stats, truth, 1e-6)


def test_token_mask_and_padding_combine() -> None:
    """A token counts if both masks say so."""
    model, ids = _tiny("qwen3_moe")
    padded, attention = _padded(ids, "right")
    given = torch.zeros(2, 12, dtype=torch.bool)
    given[:, 4:] = True
    with observe(model) as obs:
        obs(input_ids=padded, attention_mask=attention, token_mask=given)
    counted = int((attention.bool() & given).sum())
    assert all(int(layer.tokens.sum()) == counted for layer in obs.stats.layers.values())


def test_masks_are_read_before_they_go_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a copy on a GPU would wait for all queued work."""
    model, ids = _tiny("qwen3_moe")
    padded, attention = _padded(ids, "right")
    read: list[Any] = []
    own = token_mask._as_bool

    def spied(name: str, mask: Any) -> Tensor:
        read.append(mask)
        return own(name, mask)

    monkeypatch.setattr(token_mask, "_as_bool", spied)
    monkeypatch.setattr("reap_driver.model.forward._moved", lambda tensor, _: tensor.clone())
    with observe(model) as obs:
        obs(input_ids=padded, attention_mask=attention)
        assert [mask is attention for mask in read] == [True]
        model(padded, attention_mask=attention.clone(), use_cache=False)
    assert [mask is attention for mask in read] == [True, False]
    counted = 2 * int(attention.sum())
    assert all(int(layer.tokens.sum()) == counted for layer in obs.stats.layers.values())


def test_fully_masked_batch_counts_nothing() -> None:
    """If no token counts, none is added, and the layer is still checked on a later call."""
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    with observe(model) as obs:
        obs(**inputs, token_mask=torch.zeros(2, 12, dtype=torch.bool))
        assert not any(layer.count.any() for layer in obs.stats.layers.values())
        obs(**inputs)
    assert all(int(layer.tokens.sum()) == 24 for layer in obs.stats.layers.values())


def _observe_rows(model: torch.nn.Module, batches: list[tuple[str, Tensor]]) -> Observer:
    with observe(model) as obs:
        for group, ids in batches:
            with obs.group(group):
                obs(input_ids=ids)
    return obs


def test_groups_add_up_to_the_total() -> None:
    """Each group holds its own batches; together they are the ungrouped observation."""
    config, model = zoo.tiny("qwen3_moe")
    rows = zoo.tiny_inputs("qwen3_moe", config, batch=3)["input_ids"]
    batches = [("code", rows[:1]), ("tools", rows[1:2]), ("code", rows[2:])]
    grouped = _observe_rows(model, batches).stats
    plain = _observe_rows(model, [("all", ids) for _, ids in batches]).stats
    assert grouped.groups == ["code", "tools"]
    for name, stats in grouped.layers.items():
        assert stats.tokens.tolist() == [24, 12]
        total = stats.total()
        assert torch.equal(total.counts, plain.layers[name].counts)
        torch.testing.assert_close(total.sums, plain.layers[name].sums, rtol=1e-12, atol=0)
    code = _observe_rows(model, [batches[0], batches[2]]).stats
    for name, stats in grouped.layers.items():
        assert torch.equal(stats.sums[:, 0], code.layers[name].sums[:, 0])


def test_same_run_same_bits() -> None:
    """Two observations of the same batches are equal bit for bit."""
    config, model = zoo.tiny("gpt_oss")
    rows = zoo.tiny_inputs("gpt_oss", config, batch=2)["input_ids"]
    first, second = (_observe_rows(model, [("a", rows)]).stats for _ in range(2))
    for name, stats in first.layers.items():
        for key, value in stats.fields().items():
            assert torch.equal(value, second.layers[name].fields()[key])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "longcat_flash"])
def test_generation_works_inside(name: str) -> None:
    """Cached decoding with left padding: the same tokens, every step counted without padding."""
    model, ids = _tiny(name)
    padded, mask = _padded(ids, "left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        plain = model.generate(padded, attention_mask=mask, **options)
    with observe(model) as obs, torch.no_grad():
        observed = model.generate(padded, attention_mask=mask, **options)
    assert torch.equal(plain, observed)
    steps = int(mask.sum()) + 3 * 2
    assert all(int(layer.tokens.sum()) == steps for layer in obs.stats.layers.values())


def test_model_may_be_called_directly() -> None:
    """Calling the model inside the context counts like calling the observer."""
    model, ids = _tiny("mixtral")
    padded, mask = _padded(ids, "right")
    with observe(model) as obs:
        obs(input_ids=padded, attention_mask=mask)
    with observe(model) as direct, direct.group("default"), torch.no_grad():
        model(padded, mask)  # positional, as some callers do
    _assert_same(direct.stats, obs.stats, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "openai_privacy_filter", "nemotron_h"])
def test_low_precision(name: str, dtype: torch.dtype) -> None:
    """Low precision passes the check of the first call; counts exact, sums within 1e-3."""
    config, model = zoo.tiny(name, dtype=dtype)
    obs = observe(model)
    names = [layer.name for layer in obs.layers]
    with obs, oracle.recorded(model, names) as calls:
        obs(**zoo.tiny_inputs(name, config, seq=32))
    for layer, stats in obs.stats.layers.items():
        truth = oracle.expected(model.get_submodule(layer), calls[layer], 8)
        total: LayerStats = stats.total()
        assert torch.equal(total.count[0].double(), truth["count"])
        error = (total.weighted_norm_sum[0] - truth["weighted_norm_sum"]).abs()
        assert float((error / truth["weighted_norm_sum"].clamp_min(1e-30)).max()) < 1e-3


def test_masks_that_do_not_fit() -> None:
    """Each names the shape or value found."""
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    four = torch.ones(2, 1, 12, 12)
    with observe(model) as obs:
        with pytest.raises(DataError, match="not \\[batch, seq\\]"):
            obs(**inputs, attention_mask=four)
        with pytest.raises(DataError, match="does not fit inputs"):
            obs(**inputs, token_mask=torch.ones(2, 5, dtype=torch.bool))
        with pytest.raises(DataError, match="is empty"):
            obs(input_ids=torch.zeros(1, 0, dtype=torch.long))
        with pytest.raises(DataError, match="token id 96, outside the model's vocabulary of 96"):
            obs(input_ids=torch.tensor([[5, 96]]))
        with pytest.raises(DataError, match="token id -1"):
            obs(input_ids=torch.tensor([[5, -1]]))


@pytest.mark.parametrize("pinned", [True, False])
def test_only_pinned_batches_are_moved_without_waiting(
    pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asynchronous copy from memory that is not pinned could read later changes."""
    config, model = zoo.tiny("qwen3_moe")
    ids, moves, to = zoo.tiny_inputs("qwen3_moe", config)["input_ids"], [], Tensor.to

    def spied(tensor: Tensor, *args: object, **options: object) -> Tensor:
        if tensor is ids:
            moves.append(options)
        return to(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "is_pinned", lambda _: pinned)
    monkeypatch.setattr(Tensor, "to", spied)
    with observe(model) as obs:
        obs(input_ids=ids)
    assert moves[0] == {"non_blocking": pinned}


def test_layers_that_share_keys_and_values_see_every_token() -> None:
    """gemma4 would run them on the tokens whose logits are kept, in transformers 5.24."""
    types = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    fields = {"num_kv_shared_layers": 3, "layer_types": types, "hidden_size_per_layer_input": 8}
    config, model = zoo.tiny("gemma4", num_hidden_layers=6, **fields)
    inputs = zoo.tiny_inputs("gemma4", config)
    with observe(model) as obs:
        obs(**inputs)
    counts = [int(layer.tokens.sum()) for layer in obs.stats.layers.values()]
    assert counts == [inputs["input_ids"].numel()] * 6


def test_layers_that_get_few_of_the_tokens_are_refused() -> None:
    config, model = zoo.tiny("qwen3_moe")
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(lambda _, args: (args[0][:, -1:],))
    with (
        observe(model) as obs,
        pytest.raises(
            UnsupportedModel,
            match=r"layers\.1\.mlp\.experts received 2 of the 24 tokens .*logits_to_keep=0",
        ),
    ):
        obs(**zoo.tiny_inputs("qwen3_moe", config))
