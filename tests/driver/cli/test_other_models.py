"""Plans of another model on the command line: taken with a note, refused, or forced."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.driver.cli.conftest import Run, write_model

DATA = ("--seq-len", 16, "--batch-size", 4)
DECIDES = "top_k is 3 there and 2 here"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tuned") / "model", "qwen3_moe", eos_token_id=7)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "model"
    return write_model(folder, "qwen3_moe", num_experts_per_tok=2)


@pytest.fixture
def files(run: Run, model: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """Statistics and a plan of the base model."""
    stats, plan = tmp_path / "stats.safetensors", tmp_path / "plan.json"
    assert run("observe", model, "--data", data, *DATA, "--out", stats).code == 0
    assert run("plan", stats, "--ratio", 0.25, "--out", plan).code == 0
    return {"stats": stats, "plan": plan}


@pytest.mark.parametrize("command", ["apply", "masks", "compare", "search"])
def test_plans_of_another_model(
    run: Run,
    files: dict[str, Any],
    data: Path,
    tuned: Path,
    other: Path,
    tmp_path: Path,
    command: str,
) -> None:
    out = tmp_path / "out"
    search: tuple[object, ...] = (
        "--evaluations",
        4,
        "--population",
        2,
        "--elites",
        1,
        "--validation",
        0,
    )
    search += ("--ratio", 0.25, "--out", out)

    def call(model: Path, *more: object) -> Any:
        words: tuple[object, ...] = {
            "apply": ("apply", model, files["plan"], "--out", out),
            "masks": ("apply", model, files["plan"], "--as-masks", out),
            "compare": ("compare", model, files["plan"], "--data", data, *DATA),
            "search": ("search", model, files["stats"], "--data", data, *DATA, *search),
        }[command]
        return run(*words, *more)

    noted = call(tuned)
    assert noted.code == 0, noted.err
    assert "eos_token_id is 2 there and 7 here" in " ".join(noted.err.split())
    if command == "apply":
        record = json.loads((out / "reap" / "plan.json").read_text())
        assert "eos_token_id is 2 there and 7 here" in record["notes"][-1]
    refused = call(other, *(() if command == "compare" else ("--overwrite",)))
    assert (refused.code, DECIDES in refused.error, "--force-model" in refused.error) == (
        3,
        True,
        True,
    ), refused.error
    forced = call(other, "--force-model", *(() if command == "compare" else ("--overwrite",)))
    assert forced.code == 0, forced.err
    assert DECIDES in " ".join(forced.err.split())
