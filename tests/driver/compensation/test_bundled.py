"""Re-fits of the bundled model: how close two steps come to the direct solution on real rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import reap_driver as rd
import reap_kernels as rk
from reap_driver.demo.corpus import load_corpus
from reap_driver.demo.evaluate import token_windows
from reap_driver.demo.run import MODEL

WINDOWS, LENGTH, BATCH, RIDGE = 16, 256, 4, 0.1
Calls = dict[str, list[Tensor | tuple[Tensor, ...]]]


@contextmanager
def recorded(model: Any) -> Iterator[Calls]:
    """{layer: its outputs, or the arguments of its experts} of the forwards inside."""
    calls: Calls = {}
    handles = []
    for number, layer in enumerate(model.model.layers):
        out, given = calls.setdefault(f"out {number}", []), calls.setdefault(f"in {number}", [])
        handles += [
            layer.register_forward_hook(lambda _, args, y, out=out: out.append(y.flatten(0, 1))),
            layer.mlp.experts.register_forward_pre_hook(
                lambda _, args, given=given: given.append(args)
            ),
        ]
    yield calls
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def streams() -> tuple[Any, Calls, Calls]:
    """The model, and what its layers do with all experts and with half of them."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    documents = load_corpus(("calibration",))
    windows = token_windows(documents, tokenizer, per_domain=WINDOWS, length=LENGTH)
    model = rd.load_model(MODEL, dtype=torch.float32)
    batches = torch.stack(list(windows.values()), dim=1).flatten(0, 1).split(BATCH)
    with torch.no_grad(), rd.observe(model) as obs, recorded(model) as full:
        for ids in batches:
            obs(input_ids=ids)
    plan = rd.make_plan(rd.score(obs.stats, "reap"), 0.5)
    with torch.no_grad(), rd.masked_experts(model, plan.kept), recorded(model) as pruned:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    return model, full, pruned


def direct(experts: rk.ExpertWeights, rows: list[rd.ExpertRows]) -> float:
    """Mean squared error on held-out rows of the least-squares solution, solved as one system."""
    ids = torch.cat([batch.ids.flatten() for batch in rows]).unique().tolist()
    width = experts.intermediate_size
    phi, missing = [], torch.cat([batch.missing for batch in rows]).double()
    for batch in rows:
        own = torch.zeros(len(batch.hidden), len(ids), width, dtype=torch.float64)
        for place, expert in enumerate(ids):
            token, slot = (batch.ids == expert).nonzero(as_tuple=True)
            h = experts.inner(expert, batch.hidden[token])
            own[token, place] = (batch.weights[token, slot, None] * h).double()
        phi.append(own.flatten(1))
    every = torch.cat(phi)
    held = torch.cat([torch.full((len(b.hidden),), b.held_out) for b in rows])
    gram = every[~held].T @ every[~held]
    shift = RIDGE * gram.trace() / (experts.num_experts * width)
    solved = torch.linalg.solve(
        gram + shift * torch.eye(len(gram)).double(), every[~held].T @ missing[~held]
    )
    return float((missing[held] - every[held] @ solved).square().sum(1).mean())


@pytest.mark.parametrize("number", [0, 3])
def test_two_steps_are_within_one_percent_of_the_direct_solution(number, streams) -> None:
    model, full, pruned = streams
    module = model.model.layers[number].mlp.experts
    experts = rk.ExpertWeights(
        module.gate_up_proj.detach(), module.down_proj.detach(), rk.Activation("silu")
    )
    each = zip(full[f"out {number}"], pruned[f"out {number}"], pruned[f"in {number}"], strict=True)
    rows = [
        rd.ExpertRows(*given, missing=whole - cut, held_out=index % 4 == 3)
        for index, (whole, cut, given) in enumerate(each)
    ]
    found = rd.refit_layer(experts, rows, ridge=RIDGE)
    best = direct(experts, rows)
    assert best < 0.9 * found.error_before
    assert found.error_after < 1.01 * best
