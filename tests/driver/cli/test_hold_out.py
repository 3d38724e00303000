"""Groups that are held out: not calibrated on, and marked where plans are compared on them."""

import shutil
from pathlib import Path

import pytest

import reap_driver as rd
from reap_driver.reporting.comparison import comparison_parts
from reap_driver.reporting.elements import Table
from reap_kernels import SaliencyStats
from tests.driver.cli.conftest import Run


@pytest.fixture
def two(data: Path) -> list[object]:
    """Two sources, each a group."""
    shutil.copy(data, data.with_name("chat.jsonl"))
    sources = ["--data", data, "--data", data.with_name("chat.jsonl")]
    return [*sources, "--seq-len", 32]


def test_observes_as_if_the_group_was_not_given(
    run: Run, originals: dict[str, Path], two: list[object], tmp_path: Path
) -> None:
    words, out = ["observe", originals["plain"], "--out"], tmp_path / "held.safetensors"
    done = run(*words, out, *two, "--hold-out-group", "chat", "--json")
    assert done.json["groups"] == ["code"]
    alone = tmp_path / "alone.safetensors"
    assert run(*words, alone, *two[:2], *two[4:]).code == 0
    held, whole = (rd.score(SaliencyStats.load(path)).digest() for path in (out, alone))
    assert held == whole
    tokens = [
        run(*words[:2], *two, *more, "--dry-run", "--json").json["data"]["tokens"]
        for more in ((), ("--hold-out-group", "chat"))
    ]
    assert tokens[0] == 2 * tokens[1] > 0


def test_what_was_not_calibrated_on_is_marked(
    run: Run, originals: dict[str, Path], two: list[object], tmp_path: Path
) -> None:
    model, out = originals["plain"], tmp_path / "half"
    pruned = run("prune", model, *two, "--hold-out-group", "chat", "--out", out)
    assert pruned.code == 0
    assert rd.Plan.load(out / "reap" / "plan.json").calibrated_on == ("code",)
    said = run("compare", model, out, *two).out
    marked = [line for line in said.splitlines() if line.endswith("sequences, not calibrated on")]
    assert len(marked) == 1
    assert marked[0].startswith("chat: ")
    assert max(map(len, said.splitlines())) <= 80
    found = run("compare", model, out, *two, "--json").json
    assert found["not_calibrated_on"] == ["chat"]
    [table] = [part for part in comparison_parts(found) if isinstance(part, Table)]
    assert table.headings == ["", "code", "chat (not calibrated on)", "all"]
    one = comparison_parts({**found, "groups": {"chat": found["groups"]["chat"]}})
    assert isinstance(one[0], Table)
    assert one[0].headings == ["", "all (not calibrated on)"]


def test_weight_zero_leaves_a_group_out_too(
    run: Run, originals: dict[str, Path], two: list[object], tmp_path: Path
) -> None:
    model, stats = originals["plain"], tmp_path / "stats"
    code, both = tmp_path / "code.json", tmp_path / "both.json"
    assert run("observe", model, *two, "--out", stats).code == 0
    assert run("plan", stats, "--weights", "code=1,chat=0", "--out", code).code == 0
    assert run("plan", stats, "--out", both).code == 0
    assert "\nall" in (said := run("compare", model, code, both, *two).out)
    assert "not calibrated on" not in said, "the second plan was"
    facts = run("compare", model, code, both, *two, "--json").json
    assert [one.get("not_calibrated_on") for one in facts["comparisons"]] == [["chat"], None]
    tables = [part for part in comparison_parts(facts) if isinstance(part, Table)]
    assert tables[1].headings == ["pruned", "code", "chat"]
    shown = [row[2] for row in tables[1].rows]
    for text, one in zip(shown, facts["comparisons"], strict=True):
        assert str(text).startswith(f"{one['groups']['chat']['acceptance']['value']:.3f}"[:4])
    alike = {**facts, "comparisons": [facts["comparisons"][0]] * 2}
    marked = [part for part in comparison_parts(alike) if isinstance(part, Table)][1]
    assert marked.headings == ["pruned", "code", "chat (not calibrated on)"]


def test_groups_that_cannot_be_held_out(
    run: Run, originals: dict[str, Path], two: list[object], tmp_path: Path
) -> None:
    words = ["prune", originals["plain"], *two, "--out", tmp_path / "half", "--hold-out-group"]
    done = run(*words, "talk")
    assert done.code == 2
    assert "--hold-out-group talk: no source is in this group; there are chat, code" in done.error
    done = run(*words, "chat", "--hold-out-group", "code")
    assert done.code == 2
    assert "these are all groups of the data, and none is left" in done.error
