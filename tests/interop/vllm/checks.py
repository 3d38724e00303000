"""What must hold of every server, whatever it serves and however it is started."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from tests.interop.vllm.server import Server
from tests.interop.vllm.traffic import (
    ENGINES,
    MOVED,
    ROUNDING,
    SUMS,
    Completion,
    compare,
    complete_all,
    difference,
    observed,
    references,
    same_bits,
    statistics,
)

START: dict[str, Any] = {"mode": "replace", "every": 1, "groups": [], "reset": True}
RATIO = 0.25
# Of each completion that checks ask for.
TOKENS = 6


def check_statistics(
    server: Server, model: Path, before: Sequence[Completion], mode: str, folder: Path
) -> None:
    """Traffic gives the statistics of `rd.observe` on the same tokens, and the same answers.

    Args:
        server: that observes nothing yet.
        model: its checkpoint.
        before: completions of `TOKENS` tokens that it gave.
        mode: of observing.
        folder: for a file.
    """
    server.ask("POST", "/reap/start", START | {"mode": mode})
    seen = complete_all(server, [completion.prompt for completion in before], tokens=TOKENS)
    status = server.ask("POST", "/reap/stop")
    live = statistics(server, folder)
    computed = [completion.computed for completion in seen]
    assert status["tokens"] == sum(map(len, computed))
    assert compare(live, observed(model, {"all": computed}), ["all"]) < SUMS
    with pytest.raises(AssertionError, match="tokens"):
        compare(live, observed(model, {"all": computed[1:]}), ["all"])
    if mode == "shadow":
        assert same_bits(seen, before)
    else:
        assert [completion.generated for completion in seen] == [x.generated for x in before]
        assert difference(seen, before) < ROUNDING


def check_mask(server: Server, model: Path, before: Sequence[Completion], folder: Path) -> rd.Plan:
    """A mask gives the answers of the pruned checkpoint, and none of its experts a row.

    Args:
        server: whose statistics give the plan; without a mask.
        model: its checkpoint.
        before: completions that it gave.
        folder: for files.

    Returns:
        The plan; `folder / "pruned"` is its checkpoint.
    """
    prompts = [completion.prompt for completion in before]
    document = server.ask("POST", "/reap/plan", {"ratio": RATIO})
    (folder / "plan.json").write_bytes(server.request("POST", "/reap/plan", {"ratio": RATIO}).body)
    plan = rd.Plan.load(folder / "plan.json")
    status = server.ask("POST", "/reap/mask", document)
    assert (
        status["mask"]["experts"] == sum(len(layer.removed) for layer in plan.layers.values()) > 0
    )
    masked = complete_all(server, prompts)
    rd.apply_plan(model, plan, folder / "pruned")
    assert difference(masked, references(folder / "pruned", masked)) < ENGINES
    assert difference(masked, references(model, masked)) > MOVED
    server.ask("POST", "/reap/start", START)
    assert difference(complete_all(server, prompts), masked) < ROUNDING
    server.ask("POST", "/reap/stop")
    live = statistics(server, folder)
    for name, layer in plan.layers.items():
        count = live.layers[name].count.sum(0)
        assert count[list(layer.removed)].sum() == 0 < count[list(layer.kept)].sum()
    server.ask("DELETE", "/reap/mask")
    assert same_bits(complete_all(server, prompts, tokens=TOKENS), before)
    return plan
