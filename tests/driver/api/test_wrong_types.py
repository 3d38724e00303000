"""Every exported function raises one clear error for arguments of wrong types."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reap_driver as rd
import reap_kernels as rk
from reap_driver.plan_search.evolution import Settings
from reap_kernels.errors import ReapError, UsageError
from tests.driver import zoo
from tests.driver.writer import saved

WRONG: dict[str, Any] = {
    "None": None,
    "int": 3,
    "negative": -1,
    "float": 0.5,
    "nan": float("nan"),
    "bool": True,
    "text": "tiny",
    "empty text": "",
    "bytes": b"x",
    "list": [1, 2],
    "empty list": [],
    "texts": ["a"],
    "tuple": ("a", 1),
    "mapping": {"a": 1},
    "empty mapping": {},
    "numbers as keys": {1: [2]},
    "nested": {"model.layers.0.mlp.experts": {"a": "b"}},
    "tensor": torch.ones(2, 3),
    "array": np.ones(3),
    "module": torch.nn.Linear(2, 2),
    "class": int,
    "function": len,
    "path": Path("none/such"),
    "generator": (n for n in range(2)),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files written to a relative path such as "tiny" are in the test's own folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny model with a checkpoint, statistics, scores, a plan and masks."""
    root = tmp_path_factory.mktemp("world")
    model = saved.save("qwen3_moe", root / "full")
    batch = zoo.tiny_inputs("qwen3_moe", model.config)
    with rd.observe(model, gram=True) as obs:
        obs(**batch)
    with rd.observe_vectors(model) as vectors:
        vectors(**batch)
    scores = rd.score(obs.stats)
    plan = rd.make_plan(scores, 0.25)
    rd.apply_plan(root / "full", plan, root / "small")
    rd.save_masks(root / "full", plan, root / "masks")
    rd.export_constants(root / "full", obs.grams, root / "saved-constants")
    return {
        "root": root,
        "model": model,
        "batches": [batch],
        "stats": obs.stats,
        "grams": obs.grams,
        "vectors": vectors.vectors,
        "scores": scores,
        "plan": plan,
        "removals": dict.fromkeys(scores, 2),
        "layer": next(iter(scores)),
    }


# Valid arguments of each function.
CALLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "apply_plan": lambda w: {
        "model_path": w["root"] / "full",
        "plan": w["plan"],
        "out_path": w["root"] / "out",
        "overwrite": True,
    },
    "check_permutation": lambda w: {
        "original": w["root"] / "full",
        "pruned": w["root"] / "small",
        "plan": w["plan"],
    },
    "compare_models": lambda w: {
        "original": w["model"],
        "pruned": w["plan"],
        "batches": w["batches"],
        "draws": 10,
    },
    "compensated": lambda w: {"model": w["model"], "plan": w["plan"]},
    "down_hessians": lambda w: {
        "sums": w["grams"][w["layer"]],
        "plan": w["plan"].layers[w["layer"]],
    },
    "export_constants": lambda w: {
        "model_path": w["root"] / "full",
        "grams": w["grams"],
        "path": w["root"] / "constants",
        "plan": w["plan"],
    },
    "find_moe_layers": lambda w: {"model": w["model"]},
    "fused": lambda w: {"model": w["model"]},
    "load_config": lambda w: {"path_or_id": w["root"] / "full"},
    "load_constants": lambda w: {"path": w["root"] / "saved-constants"},
    "load_masks": lambda w: {"path": w["root"] / "masks"},
    "load_model": lambda w: {"path_or_id": w["root"] / "full"},
    "make_plan": lambda w: {"scores": w["scores"]},
    "masked_experts": lambda w: {"model": w["model"], "kept": w["plan"].kept},
    "merged_experts": lambda w: {"model": w["model"], "vectors": w["vectors"]},
    "load_recipe": lambda _: {"path": "reap-coding"},
    "observe": lambda w: {"model": w["model"]},
    "observe_streamed": lambda w: {"path_or_id": w["root"] / "full", "batches": w["batches"]},
    "observe_vectors": lambda w: {"model": w["model"]},
    "orphans": lambda w: {"model": w["model"], "batches": w["batches"], "plan": w["plan"]},
    "plan_of_removals": lambda w: {
        "scores": w["scores"],
        "removals": w["removals"],
        "allocation": "mine",
        "ratio": 0.25,
    },
    "prune_width": lambda _: {
        "down": torch.ones(3, 4, 5),
        "gram": torch.eye(5).expand(3, 5, 5),
        "keep": 2,
    },
    "random_plan": lambda w: {"scores": w["scores"], "ratio": 0.25, "seed": 0},
    "record_of": lambda w: {"model": w["model"]},
    "refit_layer": lambda _: {
        "experts": rk.ExpertWeights(
            torch.ones(2, 6, 4), torch.ones(2, 4, 3), rk.Activation("silu")
        ),
        "rows": [
            rd.ExpertRows(
                torch.ones(5, 4),
                torch.zeros(5, 1).long(),
                torch.ones(5, 1),
                torch.ones(5, 4),
                held_out=held,
            )
            for held in (False, True)
        ],
    },
    "refit_models": lambda w: {
        "original": w["model"],
        "pruned": rd.load_model(w["root"] / "small"),
        "batches": w["batches"] * 2,
    },
    "replace_matrices": lambda w: {
        "model_path": w["root"] / "full",
        "matrices": {w["layer"]: torch.zeros_like(w["model"].get_submodule(w["layer"]).down_proj)},
        "out_path": w["root"] / "replaced",
        "record": {"kind": "test"},
    },
    "retained": lambda w: {"stats": w["stats"], "plan": w["plan"]},
    "save_masks": lambda w: {
        "model_path": w["root"] / "full",
        "plan": w["plan"],
        "path": w["root"] / "masks",
    },
    "score": lambda w: {"stats": w["stats"]},
    "search_plan": lambda w: {
        "model": w["model"],
        "scores": w["scores"],
        "batches": w["batches"],
        "ratio": 0.25,
        "settings": Settings(evaluations=2, population=2, elites=1, seed=0),
    },
    "search_shape": lambda w: {
        "model": w["model"],
        "stats": w["stats"],
        "grams": w["grams"],
        "batches": w["batches"],
        "width_multiple": 4,
    },
}
METHODS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "Plan.save": lambda w: {"self": w["plan"], "path": w["root"] / "out.json"},
    "SaliencyStats.save": lambda w: {"self": w["stats"], "path": w["root"] / "out.safetensors"},
    "SaliencyStats.merge": lambda w: {"self": w["stats"], "other": w["stats"]},
    "Matrices.create": lambda w: {"folder": w["root"] / "m", "model": {}, "resume": True},
    "Matrices.open": lambda w: {"folder": w["root"] / "m"},
    "Matrices.put": lambda w: {
        "self": rd.Matrices.create(w["root"] / "put", model={}, resume=True),
        "name": "layer",
        "down": torch.zeros(1, 2, 3),
    },
    "Plan.load": lambda w: {"path": w["root"] / "out.json"},
    "SaliencyStats.load": lambda w: {"path": w["root"] / "out.safetensors"},
    "LayerPlan": lambda _: {"num_experts": 4, "kept": (0, 1), "removed": (2, 3)},
}


def test_every_exported_function_is_here() -> None:
    """But for whole jobs, whose options tests/driver/workflow gives wrong values, and functions
    that take none.
    """
    functions = {name for name in rd.__all__ if inspect.isfunction(getattr(rd, name))}
    functions = {name for name in functions if parameters(name)}
    assert {name for name in functions if not hasattr(getattr(rd, name), "options")} == CALLS.keys()


def called(name: str, arguments: dict[str, Any]) -> Any:
    function: Any = rd
    for part in name.split("."):
        function = getattr(function, part)
    outcome = function(**arguments)
    if hasattr(outcome, "__enter__"):
        with outcome:
            pass
    return outcome


def parameters(name: str) -> list[str]:
    function: Any = rd
    for part in name.split("."):
        function = getattr(function, part)
    return [known for known in inspect.signature(function).parameters if known != "self"]


ALL = CALLS | METHODS
PAIRS = [(name, parameter) for name in ALL for parameter in parameters(name)]


@pytest.mark.does_not_raise
@pytest.mark.parametrize("name", CALLS)
def test_valid_arguments_pass(name: str, world: dict[str, Any]) -> None:
    called(name, CALLS[name](world))


@pytest.mark.parametrize("name", CALLS)
def test_a_value_of_no_known_type_is_named(name: str, world: dict[str, Any]) -> None:
    for parameter in parameters(name):
        with pytest.raises(UsageError, match=rf"{name}: {parameter} is .*object.*; expected"):
            called(name, {**CALLS[name](world), parameter: object()})


@pytest.mark.parametrize("name", CALLS)
def test_missing_and_unknown_arguments_are_named(name: str, world: dict[str, Any]) -> None:
    given = CALLS[name](world)
    with pytest.raises(UsageError, match=f"{name}: got an unexpected keyword argument 'ratoi'"):
        called(name, {**given, "ratoi": 1})
    first = next(iter(given))
    with pytest.raises(UsageError, match=f"{name}: missing a required argument: '{first}'"):
        called(name, {key: value for key, value in given.items() if key != first})


@pytest.mark.parametrize(("name", "parameter"), PAIRS)
def test_wrong_values_end_in_one_error_or_mean_something(
    name: str, parameter: str, world: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Callables are skipped, since the errors they raise are their own; a file that cannot be
    written is an OSError with the file's name.
    """
    monkeypatch.chdir(tmp_path)  # where texts that are paths lie
    given = ALL[name](world)
    for kind, value in WRONG.items():
        if callable(value) and parameter in ("criterion", "gram", "progress"):
            continue
        said = outcome(name, {**given, parameter: value})
        assert "\n" not in said, kind


def outcome(name: str, arguments: dict[str, Any]) -> str:
    """The error's message; empty if the call succeeded."""
    try:
        called(name, arguments)
    except ReapError as error:
        return str(error)
    except OSError as error:
        return "" if error.filename is not None else "\n"
    return ""
