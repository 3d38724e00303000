"""Uses of an observer that could give plausible wrong numbers: each is right, or an error."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import reap_driver as rd
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError, ReapError, UnsupportedModel, UsageError
from tests.driver import zoo
from tests.driver.observation import remote_blocks as remote

Batch = dict[str, torch.Tensor]


def tiny(name: str = "qwen3_moe", seed: int = 0, **changed: Any) -> tuple[Any, Batch]:
    config, model = zoo.tiny(name, seed, **changed)
    return model, zoo.tiny_inputs(name, config)


def same(found: SaliencyStats, expected: SaliencyStats) -> bool:
    """Whether two observations have the same bits."""
    return found.layers.keys() == expected.layers.keys() and all(
        torch.equal(a, b)
        for name, layer in found.layers.items()
        for a, b in zip(layer.packed(), expected.layers[name].packed(), strict=True)
    )


def observed(model: Any, *batches: Batch) -> SaliencyStats:
    with rd.observe(model) as obs:
        for batch in batches:
            obs(**batch)
    return obs.stats


# Calls where nothing would be counted, or twice


def test_a_call_before_or_after_the_block_is_refused() -> None:
    model, batch = tiny()
    obs = rd.observe(model)
    with pytest.raises(UsageError, match="outside its `with` block"):
        obs(**batch)
    with obs:
        obs(**batch)
    with pytest.raises(UsageError, match="outside its `with` block"):
        obs(**batch)
    assert {int(layer.tokens.sum()) for layer in obs.stats.layers.values()} == {24}


def test_entering_an_observer_twice_is_refused_and_leaves_it_as_it_was() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs:
        with pytest.raises(UsageError, match="entered already"), obs:
            pass
        obs(**batch)
    assert same(obs.stats, observed(model, batch))


def test_an_observer_entered_again_goes_on() -> None:
    model, batch = tiny()
    obs = rd.observe(model)
    for _ in range(2):
        with obs:
            obs(**batch)
    assert same(obs.stats, observed(model, batch, batch))


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "llama4", "inline"])
def test_two_observers_of_one_model_are_refused(name: str) -> None:
    model, batch = inline() if name == "inline" else tiny(name)
    with rd.observe(model) as obs:
        with pytest.raises(UnsupportedModel, match="observed already"), rd.observe(model):
            pass
        obs(**batch)
    assert same(obs.stats, observed(model, batch))


def test_another_thread_is_refused() -> None:
    model, batch = tiny()
    caught: list[BaseException] = []

    def call() -> None:
        try:
            obs(**batch)
        except ReapError as error:
            caught.append(error)

    with rd.observe(model) as obs:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        obs(**batch)
    assert "another thread" in str(caught[0])
    assert same(obs.stats, observed(model, batch))


# The model changes inside the block


def inline() -> tuple[Any, Batch]:
    """A model whose blocks call their experts themselves."""
    model, batch = tiny()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = remote.InlineBlock().eval()
    return model, batch


def _layer_of_another(model: Any) -> None:
    model.model.layers[0] = tiny(seed=1)[0].model.layers[0]


def _experts_of_another(model: Any) -> None:
    model.model.layers[0].mlp.experts = copy.deepcopy(model.model.layers[0].mlp.experts)


def _block_removed(model: Any) -> None:
    model.model.layers[1].mlp = nn.Identity()


def _router_in_training(model: Any) -> None:
    model.model.layers[1].mlp.train()


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "half": (lambda m: m.half(), "observed in torch.float32 and computes in torch.float16"),
    "bfloat16": (lambda m: m.bfloat16(), "computes in torch.bfloat16"),
    "double": (lambda m: m.double(), "computes in torch.float64"),
    "layer": (_layer_of_another, r"layers\.0\.mlp\.experts is another module"),
    "experts": (_experts_of_another, r"layers\.0\.mlp\.experts is another module"),
    "no block": (_block_removed, r"layers\.1\.mlp\.experts is another module"),
    "training": (lambda m: m.train(), "training mode.*model.eval"),
    "one block in training": (_router_in_training, r"layers\.1\.mlp is in training mode"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_changes_inside_is_refused(change: str) -> None:
    model, batch = tiny()
    before = observed(model, batch)
    with rd.observe(model) as obs:
        obs(**batch)
        CHANGES[change][0](model)
        with pytest.raises(UnsupportedModel, match=CHANGES[change][1]):
            obs(**batch)
    assert same(obs.stats, before)


def test_a_part_in_training_mode_is_refused_at_once() -> None:
    model, _ = tiny()
    model.model.layers[0].self_attn.train()
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.self_attn is in training mode"):
        rd.observe(model).__enter__()


@pytest.mark.parametrize("function", ["compare_models", "orphans", "search_plan"])
def test_every_run_of_a_model_in_training_mode_is_refused(function: str) -> None:
    """Dropout and router noise would change its statistics."""
    model, batch = tiny()
    scores = rd.score(observed(model, batch))
    plan = rd.make_plan(scores, 0.25)
    model.train()
    given: dict[str, Any] = {
        "compare_models": (model, plan, [batch]),
        "orphans": (model, [batch], plan),
        "search_plan": (model, scores, [batch], 0.25),
    }
    with pytest.raises(UnsupportedModel, match="in training mode"):
        getattr(rd, function)(*given[function])


def test_a_dtype_chosen_before_the_first_forward_is_the_models() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs:
        model.double()
        obs(**batch)
    assert same(obs.stats, observed(model, batch))


def test_gradients_are_off_inside_and_as_before_outside() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs:
        assert not model(**batch).logits.requires_grad
        with torch.enable_grad(), pytest.raises(UsageError, match="gradients are enabled"):
            model(**batch)
    assert torch.is_grad_enabled()
    assert same(obs.stats, observed(model, batch))


# Wrappers of the model


def _wrapped(model: Any, kind: str, file: str) -> Any:
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "DataParallel":
        return nn.DataParallel(model)
    if kind == "both":
        return nn.DataParallel(torch.compile(model, backend="eager"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    return DistributedDataParallel(model)


@pytest.mark.parametrize("kind", ["compile", "DataParallel", "both", "DistributedDataParallel"])
def test_wrappers_are_observed_as_the_model_inside(kind: str, tmp_path: Any) -> None:
    model, batch = tiny()
    expected = observed(model, batch)
    name = next(iter(expected.layers))
    try:
        wrapped = _wrapped(model, kind, str(tmp_path / "ranks"))
        assert same(observed(wrapped, batch), expected)
        if kind.endswith("Parallel"):  # a compiled one is run below
            with rd.observe(model) as obs:
                wrapped(**batch)
            assert same(obs.stats, expected)
        kept = {name: [0, 1, 2, 3]}
        with rd.masked_experts(wrapped, kept) as mask:
            model(**batch)
        assert not mask.unused
        assert [layer.name for layer in rd.find_moe_layers(wrapped)] == list(expected.layers)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_a_graph_compiled_before_observing_is_left_out_of_account() -> None:
    """Its tokens are counted, and those its attention mask leaves out are not."""
    model, batch = tiny(num_hidden_layers=1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, :5] = 0
    expected = observed(model, batch)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(**batch)
    with rd.observe(model) as obs:
        compiled(**batch)
    assert same(obs.stats, expected)


def test_wrappers_that_hold_a_part_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which needs a process group."""

    with pytest.raises(UnsupportedModel, match="FullyShardedDataParallel"):
        rd.observe(FullyShardedDataParallel())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["qwen3_moe", "gpt_oss", "llama4", "step3p7", "nemotron_h", "inline"]
)
def test_autocast_is_what_the_model_computes_in(name: str) -> None:
    """Experts run in bfloat16 as in the model; the float64 statistics are of these outputs."""
    model, batch = inline() if name == "inline" else tiny(name)
    with torch.autocast("cpu", torch.bfloat16), rd.observe(model) as obs:
        logits = obs(**batch).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        own = model(**batch, use_cache=False).logits[:, -1:]
    assert (logits.float() - own.float()).norm() <= 0.03 * own.float().norm()
    exact = observed(model, batch)
    for layer, known in zip(obs.stats.layers.values(), exact.layers.values(), strict=True):
        assert torch.equal(layer.tokens, known.tokens)
        found, expected = (one.weighted_norm_sum.sum() for one in (layer, known))
        assert found != expected
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_a_model_that_fails_under_autocast_says_so() -> None:
    """DBRX's own experts add bfloat16 into float32."""
    model, batch = tiny("dbrx")
    with (
        torch.autocast("cpu", torch.bfloat16),
        rd.observe(model) as obs,
        pytest.raises(UnsupportedModel, match=r"own forward fails.*without autocast"),
    ):
        obs(**batch)


def test_autocast_for_some_batches_only_is_refused() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs:
        obs(**batch)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(UnsupportedModel, match=r"computes in torch\.bfloat16 now"),
        ):
            obs(**batch)


@pytest.mark.parametrize("around", ["inference_mode", "gradient_checkpointing"])
def test_what_changes_no_number_is_allowed(around: str) -> None:
    model, batch = tiny()
    expected = observed(model, batch)
    if around == "gradient_checkpointing":
        model.gradient_checkpointing_enable()
        assert same(observed(model, batch), expected)
    else:
        with torch.inference_mode():
            assert same(observed(model, batch), expected)


def test_masked_experts_inside_observe_and_around_it_are_one() -> None:
    model, batch = tiny()
    name = rd.find_moe_layers(model)[0].name
    with rd.masked_experts(model, {name: [0, 1, 2, 5]}):
        around = observed(model, batch)
    with rd.observe(model) as obs, rd.masked_experts(model, {name: [0, 1, 2, 5]}):
        obs(**batch)
    assert same(obs.stats, around)
    assert obs.stats.layers[name].count[0, [3, 4, 6, 7]].sum() == 0


# A forward that fails


@pytest.mark.parametrize("how", ["observer", "model"])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_that_fails_counts_nothing(how: str, error: type[BaseException]) -> None:
    """The first layer had counted its tokens when the second one failed."""
    model, batch = tiny()

    def fail(*_: Any) -> None:
        raise error("on purpose")

    with rd.observe(model) as obs:
        obs(**batch)
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error), obs.group("other"):
            obs(**batch) if how == "observer" else model(**batch)
        handle.remove()
        obs(**batch)
    assert same(obs.stats, observed(model, batch, batch))
    assert obs.groups == ["default"]


@pytest.mark.parametrize("registered", ["before", "inside"])
def test_a_forward_whose_hook_fails_counts_nothing(registered: str) -> None:
    """A caller's hook on the model runs before or after those of the observer."""
    model, batch = tiny()

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    handles = [model.register_forward_hook(fail)] if registered == "before" else []
    with rd.observe(model) as obs:
        if registered == "inside":
            handles.append(model.register_forward_hook(fail))
        with pytest.raises(ValueError, match="on purpose"), obs.group("other"):
            obs(**batch)
        handles[0].remove()
        obs(**batch)
    assert same(obs.stats, observed(model, batch))
    assert obs.groups == ["default"]


def test_orphans_of_a_forward_that_fails_are_not_counted() -> None:
    from reap_driver.evaluation.routing import RoutingObserver

    model, batch = tiny()
    plan = rd.make_plan(rd.score(observed(model, batch)), 0.5)

    def fail(*_: Any) -> None:
        raise ValueError("on purpose")

    with RoutingObserver(model, plan) as obs:
        obs(**batch)
        handle = model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="on purpose"):
            obs(**batch)
        handle.remove()
    assert obs.orphans == rd.orphans(model, [batch], plan)


def test_an_observation_ended_by_an_error_says_so_in_its_statistics_and_plans() -> None:
    model, batch = tiny()
    obs = rd.observe(model)

    def interrupted() -> None:
        with obs:
            obs(**batch)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        interrupted()
    note = "the observation was ended early by RuntimeError"
    assert obs.stats.provenance["notes"] == [note]
    assert rd.make_plan(rd.score(obs.stats)).notes == [note]
    assert "notes" not in observed(model, batch).provenance


# Groups


@pytest.mark.parametrize("name", ["", 3, None, ["code"]])
def test_groups_have_names(name: Any) -> None:
    with (
        rd.observe(tiny()[0]) as obs,
        pytest.raises(UsageError, match="must be a non-empty string"),
    ):
        obs.group(name)


def test_groups_inside_groups_are_refused() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs, obs.group("code"):
        with pytest.raises(UsageError, match="'text' is entered inside group 'code'"):
            obs.group("text").__enter__()
        obs(**batch)
    assert obs.groups == ["code"]


def test_a_group_that_is_not_entered_is_noticed() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs:
        obs.group("code")
        with pytest.raises(UsageError, match=r"with obs\.group\('code'\):"):
            obs(**batch)


# Masks and other arguments


def _mask(dtype: torch.dtype = torch.bool, value: float = 1, shape: Any = (2, 12)) -> torch.Tensor:
    mask = torch.full(shape, value, dtype=dtype)
    mask.reshape(-1)[:5] = 0
    return mask


@pytest.mark.parametrize("name", ["token_mask", "attention_mask"])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int64, torch.float16, torch.float32]
)
def test_ones_and_zeros_of_any_dtype_are_a_mask(name: str, dtype: torch.dtype) -> None:
    model, batch = tiny()
    expected = observed(model, {**batch, name: _mask()})
    assert same(observed(model, {**batch, name: _mask(dtype)}), expected)
    assert {int(layer.tokens.sum()) for layer in expected.layers.values()} == {19}


@pytest.mark.parametrize("name", ["token_mask", "attention_mask"])
@pytest.mark.parametrize(
    "mask",
    [
        _mask(torch.int8, 2),
        _mask(torch.int64, -1),
        _mask(torch.float32, 0.5),
        _mask(torch.float32, torch.nan),
        _mask(torch.float32, -torch.inf),
        _mask(shape=(24,)),
        _mask(shape=(2, 12, 1)),
        _mask(shape=(12, 2)),
        [[True] * 12] * 2,
    ],
    ids=lambda m: f"{m.dtype} {list(m.shape)} {float(m.max())}" if hasattr(m, "dtype") else "list",
)
def test_masks_of_other_values_or_shapes_are_refused(name: str, mask: Any) -> None:
    model, batch = tiny()
    with rd.observe(model) as obs, pytest.raises(DataError, match=r"mask"):
        obs(**batch, **{name: mask})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "holds nothing"),
        ({"attention_mask": torch.ones(1, 3)}, "holds attention_mask; give input_ids"),
        ({"input_ids": "text"}, "input_ids is 'text'"),
        ({"input_ids": [[3, 4]]}, r"input_ids is \[\[3, 4\]\]"),
        ({"input_ids": torch.rand(2, 3)}, r"torch.float32 \[2, 3\]"),
        ({"input_ids": torch.ones(2, 3).bool()}, r"torch.bool \[2, 3\]"),
        ({"input_ids": torch.tensor([3, 4])}, r"torch.int64 \[2\]"),
        (
            {"input_ids": torch.ones(1, 3).long(), "atention_mask": torch.ones(1, 3)},
            "no argument 'atention_mask'.*did you mean attention_mask",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "token_type_ids": torch.ones(1, 3)},
            "no argument 'token_type_ids'",
        ),
    ],
)
def test_batches_that_are_none_are_refused(batch: Any, message: str) -> None:
    with rd.observe(tiny()[0]) as obs, pytest.raises(DataError, match=message):
        obs(**batch)


def test_arguments_have_names() -> None:
    model, batch = tiny()
    with rd.observe(model) as obs, pytest.raises(UsageError, match=r"obs\(\*\*batch\)"):
        obs(batch)


# Numbers that are none


def test_the_first_layer_that_is_not_finite_is_named_with_its_experts() -> None:
    """One of eight experts returns NaN on few tokens; the next layer receives NaN everywhere."""
    model, batch = tiny()
    counts = observed(model, batch).layers["model.layers.0.mlp.experts"].count[0]
    rare = int(counts.where(counts > 0, 99).argmin())
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[rare] = torch.nan
    message = rf"layer model\.layers\.0\.mlp\.experts, group 'default': .*\(experts \[{rare}\]\)"
    with rd.observe(model) as obs, pytest.raises(DataError, match=message):
        obs(**batch)


@pytest.mark.parametrize("name", ["qwen3_moe", "llama4", "inline"])
def test_inputs_that_are_not_finite_are_no_experts_fault(name: str) -> None:
    model, batch = inline() if name == "inline" else tiny(name)
    expected = next(iter(observed(model, batch).layers))
    norms = [n for n, _ in model.named_parameters() if "post_attention_layernorm" in n]
    with torch.no_grad():
        model.get_parameter(norms[0]).fill_(torch.inf)
    with pytest.raises(DataError, match=f"layer {expected}: the input of its experts was NaN"):
        observed(model, batch)
