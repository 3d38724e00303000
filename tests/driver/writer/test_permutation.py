"""The check of a pruned checkpoint against its original and its plan: right ones pass, and every
kind of mistake is seen and named."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reap_driver.evaluation.audit import audit, check_permutation, differences_of
from reap_driver.load.streamed_model import open_streamed
from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.writer.apply import apply_plan
from reap_driver.writer.replace import replace_matrices
from reap_kernels.errors import PlanError
from tests.driver import zoo
from tests.driver.conftest import Pruned
from tests.driver.writer import narrow_plans, saved, test_remote


def pruned(name: str, folder: Path, choose: saved.Chooser = saved.scattered) -> Plan:
    """`full` and `out` in a folder, and the plan between them."""
    plan = saved.make_plan(folder / "full", saved.save(name, folder / "full"), choose)
    apply_plan(folder / "full", plan, folder / "out", non_uniform=True)
    return plan


@pytest.mark.parametrize("name", zoo.names())
def test_what_the_writer_wrote_passes(name: str, non_uniform: Callable[[str], Pruned]) -> None:
    made = non_uniform(name)
    plan = made.plan
    # The same checkpoint by another plan: every layer, and every tensor that holds experts.
    other = {}
    for layer, entry in plan.layers.items():
        ids = list(range(entry.num_experts))
        kept = tuple(ids[-len(entry.kept) :]) if entry.removed else entry.kept
        other[layer] = LayerPlan.keeping(entry.num_experts, kept)
    changed = {layer for layer in other if other[layer].kept != plan.layers[layer].kept}
    assert changed
    with open_streamed(made.full) as old, open_streamed(made.out) as new:
        assert differences_of(old, new, plan).problems == []
        found = differences_of(old, new, replace(plan, layers=other)).problems
    for layer in changed:
        assert any(problem.startswith(f"{layer}.") for problem in found)
        block = layer.rpartition(".")[0] + "."
        assert any(p.startswith(block) and not p.startswith(f"{layer}.") for p in found), layer


def test_experts_in_a_list(tmp_path: Path) -> None:
    test_remote.save(tmp_path / "full")
    plan = test_remote.plan_for(tmp_path / "full")
    apply_plan(tmp_path / "full", plan, tmp_path / "out", trust_remote_code=True)

    def check(plan: Plan) -> list[str]:
        return check_permutation(tmp_path / "full", tmp_path / "out", plan, trust_remote_code=True)

    assert check(plan) == []
    name = "layers.0.mlp.experts"
    other = {**plan.layers, name: LayerPlan.keeping(8, (0, 2, 3, 4, 7))}
    found = check(replace(plan, layers=other))
    assert len(found) == 4  # three projections and the router's row
    assert f"{name}.4.up_proj.weight: differs from the original" in found
    assert (
        "layers.0.mlp.gate.weight: expert 4 (row 4) differs from row 3 of the pruned model" in found
    )


LAYER = "model.layers.1.mlp."


def _swapped(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key] = tensors[key][[1, 0, *range(2, len(tensors[key]))]]


def _changed(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key].view(-1)[-1] += 1


@pytest.mark.parametrize(
    ("spoil", "key", "says"),
    [
        (_swapped, f"{LAYER}gate.weight", r"gate.weight: expert \d \(row \d\) differs from row 0"),
        (_swapped, f"{LAYER}gate.e_score_correction_bias", r"bias: expert \d \(row \d\)"),
        (_changed, f"{LAYER}experts.2.up_proj.weight", r"gate_up_proj: expert \d .* row 2 "),
        (_changed, f"{LAYER}shared_experts.up_proj.weight", "up_proj.weight: differs"),
        (_changed, "model.embed_tokens.weight", "embed_tokens.weight: differs"),
    ],
)
def test_mistakes_are_named(
    spoil: Callable[[dict[str, torch.Tensor], str], None], key: str, says: str, tmp_path: Path
) -> None:
    plan = pruned("glm4_moe", tmp_path)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spoil(tensors, key)
        return tensors

    saved.change_tensors(tmp_path / "out", change)
    found = check_permutation(tmp_path / "full", tmp_path / "out", plan)
    assert found
    assert all(
        problem.startswith(key.partition("experts.")[0].rpartition(".")[0]) for problem in found
    )
    assert len(found) == (2 if spoil is _swapped else 1)
    assert any(re.search(says, problem) for problem in found), found


def test_a_table_by_token_is_checked(tmp_path: Path) -> None:
    plan = pruned("deepseek_v4", tmp_path, saved.differing())

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        key = next(key for key in tensors if key.endswith("tid2eid"))
        tensors[key] = (tensors[key] + 1) % len(next(iter(plan.layers.values())).kept)
        return tensors

    saved.change_tensors(tmp_path / "out", change)
    [found] = check_permutation(tmp_path / "full", tmp_path / "out", plan)
    assert "does not name the kept experts by their new ids" in found


def test_a_sample_of_layers_and_other_plans(tmp_path: Path) -> None:
    plan = pruned("deepseek_v2", tmp_path)
    key = "model.layers.1.mlp.gate.weight"
    saved.change_tensors(tmp_path / "out", lambda t: {**t, key: t[key] + 1})
    both = (tmp_path / "full", tmp_path / "out", plan)
    assert check_permutation(*both)
    assert check_permutation(*both, sample=2) == []  # the first and the last of three
    with pytest.raises(PlanError, match=r"has 6 experts in .*the original has 8"):
        check_permutation(
            tmp_path / "full",
            tmp_path / "out",
            replace(plan, layers={n: LayerPlan.keeping(6, (0, 1, 2)) for n in plan.layers}),
        )


EXPERT = "model.layers.1.mlp.experts.2."


def _first(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key].view(-1)[0] += 1


def _not_finite(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key].view(-1)[0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "key", "says"),
    [
        (
            _first,
            f"{EXPERT}gate_proj.weight",
            r"experts: gate of expert \d .* 1 of 16 neurons .* 2",
        ),
        (_swapped, f"{EXPERT}up_proj.weight", r"experts: up of expert \d .* 2 of 16 neurons .* 2"),
        (_not_finite, f"{EXPERT}down_proj.weight", "solved again, and is not finite in expert 2"),
        (_swapped, "model.layers.1.mlp.gate.weight", r"gate.weight: expert \d \(row \d\)"),
        (_first, "model.layers.1.self_attn.q_proj.weight", "differs from the original"),
    ],
)
def test_experts_that_lost_neurons(
    spoil: Callable[[dict[str, torch.Tensor], str], None], key: str, says: str, tmp_path: Path
) -> None:
    """Their down projections were solved again, so any finite values pass; all else must fit."""
    full, out = tmp_path / "full", tmp_path / "out"
    model = saved.save("qwen3_moe", full)
    plan = narrow_plans.narrow_plan(full, model)
    apply_plan(full, plan, out, matrices=narrow_plans.random_matrices(model, plan))
    found = audit(full, out, plan, sample=None, trust=False)
    assert (found.problems, found.solved) == ([], list(plan.layers))

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spoil(tensors, key)
        return tensors

    saved.change_tensors(out, change)
    problems = check_permutation(full, out, plan)
    assert len(problems) == (2 if "mlp.gate" in key else 1)
    assert re.search(says, problems[0])
    other = narrow_plans.narrowed(plan, model, narrow_plans.half)
    wide = f"{LAYER}experts: has 5 experts of 16 neurons, but by the plan 5 of 12"
    assert wide in check_permutation(full, out, other)


def test_interleaved_rows_and_biases(tmp_path: Path) -> None:
    """In one transposed tensor, row by row, with biases: each part is found."""
    full, out = tmp_path / "full", tmp_path / "out"
    model = saved.save("gpt_oss", full)
    plan = narrow_plans.narrow_plan(full, model)
    apply_plan(full, plan, out, matrices=narrow_plans.random_matrices(model, plan))
    for leaf, place, part in (
        ("gate_up_proj", (2, 0, 6), "gate"),
        ("gate_up_proj", (2, 0, 7), "up"),
        ("gate_up_proj_bias", (2, 7), "up bias"),
    ):
        key = f"model.layers.1.mlp.experts.{leaf}"

        def change(
            tensors: dict[str, torch.Tensor], key: str = key, place: tuple[int, ...] = place
        ) -> dict[str, torch.Tensor]:
            tensors[key][place] = -tensors[key][place]
            return tensors

        saved.change_tensors(out, change)
        [problem] = check_permutation(full, out, plan)
        assert re.search(
            rf": {part} of expert \d differs in 1 of \d+ neurons from expert 2", problem
        )
        saved.change_tensors(out, change)
        assert check_permutation(full, out, plan) == []


def test_down_projections_that_were_solved_again(tmp_path: Path) -> None:
    """They differ on purpose where the checkpoint has the record of that, and nothing else may."""
    plan = pruned("glm4_moe", tmp_path)
    full, out, again = tmp_path / "full", tmp_path / "out", tmp_path / "again"
    down = {LAYER + "experts": torch.ones(6, 32, 24)}
    replace_matrices(out, down, again, record={})

    found = audit(full, again, plan, sample=None, trust=False)
    assert (found.problems, found.solved) == ([], list(down))

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for leaf in ("up", "down"):
            _changed(tensors, f"{LAYER}experts.2.{leaf}_proj.weight")
        return tensors

    saved.change_tensors(again, change)
    [problem] = check_permutation(full, again, plan)
    assert re.search(r"up of expert \d differs in 1 of 24 neurons", problem)
    (again / "reap/refit.json").unlink()
    assert len(check_permutation(full, again, plan)) == 6 + 1  # every down projection, and the up
