"""Fitness compared with a float64 computation; inputs that cannot be evaluated are refused."""

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.memory.host_memory import Free
from reap_driver.plan_search import fitness as module
from reap_driver.plan_search.fitness import Candidate, Fitness, acceptance_by_sequence
from reap_kernels.errors import BackendUnavailable, DataError, ResourceError
from tests.driver import zoo
from tests.driver.writer.test_router_mask import FIRST, SECOND, bits, smaller_router

CANDIDATES = [
    {FIRST: [6, 0, 3], SECOND: [1, 2, 3, 4, 7]},
    {FIRST: list(range(8)), SECOND: [0, 2, 5]},
    {FIRST: [1, 2, 3, 4], SECOND: [4, 5, 6, 7]},
]
EVERYTHING = {FIRST: range(8), SECOND: range(8)}


@pytest.fixture(scope="module")
def model() -> Any:
    _, model = zoo.tiny("qwen3_moe", vocab_size=211)
    return model


def batches(*sizes: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Batches of random tokens, [rows, length] each."""
    draw = torch.Generator().manual_seed(7)
    return [{"input_ids": torch.randint(3, 211, size, generator=draw)} for size in sizes]


def masked(model: Any, kept: Mapping[str, Sequence[int]]) -> Candidate:
    return partial(rd.masked_experts, model, kept)


BATCHES = batches((3, 24), (2, 9), (1, 2))


def brute_force(
    model: Any, inputs: Mapping[str, Tensor], kept: Mapping[str, Sequence[int]]
) -> Tensor:
    """Acceptance of every next-token prediction [rows, length - 1], from smaller routers and
    probabilities in float64."""

    def probabilities() -> Tensor:
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        return logits[:, :-1].double().softmax(-1)

    full = probabilities()
    with contextlib.ExitStack() as stack:
        for name, ids in kept.items():
            block = model.get_submodule(name.rpartition(".")[0])
            stack.enter_context(smaller_router(block, sorted(ids)))
        return torch.minimum(full, probabilities()).sum(-1)


@pytest.mark.parametrize("kept", CANDIDATES)
def test_fitness_is_the_mean_over_predictions(model: Any, kept: dict[str, list[int]]) -> None:
    values = torch.cat([brute_force(model, inputs, kept).flatten() for inputs in BATCHES])
    fitness = Fitness(model, BATCHES)
    assert fitness.predictions == len(values) == 3 * 23 + 2 * 8 + 1
    assert fitness(masked(model, kept)) == pytest.approx(float(values.mean()), rel=1e-5)
    assert 0.05 < fitness(masked(model, kept)) < 0.95


def test_the_full_plan_has_fitness_one(model: Any) -> None:
    assert Fitness(model, BATCHES)(masked(model, EVERYTHING)) == pytest.approx(1, abs=1e-6)


def test_candidates_leave_no_trace(model: Any) -> None:
    """Repeated evaluations give the same bits, and the model is unchanged afterwards."""
    before = bits(model)
    fitness = Fitness(model, BATCHES)
    first = [fitness(masked(model, kept)) for kept in CANDIDATES]
    assert [fitness(masked(model, kept)) for kept in CANDIDATES] == first
    assert [Fitness(model, BATCHES)(masked(model, kept)) for kept in CANDIDATES] == first
    assert len(set(first)) == len(first)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_cache_holds_counted_predictions_in_the_dtype_of_the_head(model: Any) -> None:
    fitness = Fitness(model, BATCHES)
    assert fitness.nbytes == fitness.predictions * (211 * 4 + 4)
    _, half = zoo.tiny("qwen3_moe", vocab_size=211, dtype=torch.bfloat16)
    assert Fitness(half, BATCHES).nbytes == fitness.predictions * (211 * 2 + 4)


def test_padding_does_not_count(model: Any) -> None:
    [short], [long] = batches((1, 6)), batches((1, 11))
    padded = torch.cat([short["input_ids"], torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    together = {
        "input_ids": torch.cat([padded, long["input_ids"]]),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 5, [1] * 11]),
    }
    apart, padded_too = Fitness(model, [short, long]), Fitness(model, [together])
    assert padded_too.predictions == apart.predictions == 5 + 10
    assert padded_too(masked(model, CANDIDATES[0])) == pytest.approx(
        apart(masked(model, CANDIDATES[0])), rel=1e-5
    )


def test_by_sequence_adds_up(model: Any) -> None:
    lone = {"input_ids": torch.tensor([[5], [6]])}  # predicts nothing
    sums, counts = acceptance_by_sequence(
        model, [BATCHES[0], lone, *BATCHES[1:]], [masked(model, kept) for kept in CANDIDATES]
    )
    assert counts.tolist() == [23] * 3 + [8] * 2 + [1]
    for row, kept in zip(sums, CANDIDATES, strict=True):
        each = torch.cat([brute_force(model, inputs, kept).sum(-1) for inputs in BATCHES])
        torch.testing.assert_close(row, each, rtol=1e-5, atol=0)


def test_the_backend_is_the_one_that_was_asked_for(model: Any) -> None:
    """The available backends agree; an unavailable one is refused, not replaced."""
    values = [
        Fitness(model, BATCHES, backend=name)(masked(model, CANDIDATES[0]))
        for name in ("reference", "cpu")
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    with pytest.raises(BackendUnavailable, match="nonesuch"):
        Fitness(model, BATCHES, backend="nonesuch")
    with pytest.raises(BackendUnavailable, match="nonesuch"):
        acceptance_by_sequence(model, BATCHES, [masked(model, CANDIDATES[0])], backend="nonesuch")


def test_text_without_predictions_is_refused(model: Any) -> None:
    with pytest.raises(
        DataError, match=r"the 1 batches contain no prediction .* give text of at least two"
    ):
        Fitness(model, [{"input_ids": torch.tensor([[5], [6]])}])


def test_logits_that_do_not_fit_are_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = Free(100_000, "by a test")
    monkeypatch.setattr(module, "free_device_memory", lambda _: free)
    monkeypatch.setattr(module, "free_host_memory", lambda: free)
    says = r"logits take 72.9 kB \(86 predictions, 848 B each\), more than half of the 100 kB"
    with pytest.raises(ResourceError, match=says + r".*\(by a test\); use less data"):
        Fitness(model, BATCHES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_that_wait_in_main_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = zoo.tiny("qwen3_moe", vocab_size=211)[1]
    model = model.to("cuda")
    there = Fitness(model, BATCHES)
    assert all(known.logits.is_cuda for known in there._known)
    sizes = {"cuda": 0, "cpu": 1 << 30}
    monkeypatch.setattr(
        module, "free_device_memory", lambda device: Free(sizes[device.type], "by a test")
    )
    here = Fitness(model, BATCHES)
    assert all(known.logits.is_pinned() and known.lse.is_pinned() for known in here._known)
    assert here.nbytes == there.nbytes
    for kept in CANDIDATES:
        candidate = masked(model, kept)
        assert here(candidate) == pytest.approx(there(candidate), rel=1e-6)


def test_logits_that_are_not_finite_are_refused() -> None:
    _, model = zoo.tiny("qwen3_moe", vocab_size=211)
    fitness = Fitness(model, BATCHES)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(DataError, match="the logits of a candidate are not finite"):
        fitness(masked(model, CANDIDATES[0]))
    with pytest.raises(DataError, match="the logits of the full model are not finite"):
        Fitness(model, BATCHES)


def test_named_in_the_package() -> None:
    assert rd.search_plan.__module__ == "reap_driver.plan_search.budget_search"
