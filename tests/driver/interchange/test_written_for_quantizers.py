"""What quantizers read: a table of the experts, and AutoRound's bits by expert."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from reap_driver.interchange import auto_round_bits, expert_table
from reap_driver.interchange.content import Source
from reap_driver.planning.expert_bits import expert_bits
from reap_driver.planning.scoring import score
from reap_kernels.errors import PlanError
from tests.driver.interchange import facts

WHOLE = Source(facts.model(), facts.stats())


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_for_each_expert(tmp_path: Path) -> None:
    assert expert_table.write(tmp_path / "t", replace(WHOLE, criterion="frequency")) == []
    rows = table(tmp_path / "t")
    assert len(rows) == len(facts.NAMES) * facts.EXPERTS
    for name in facts.NAMES:
        own = [row for row in rows if row["layer"] == name]
        counts = facts.stats().layers[name].total().count[0].tolist()
        assert [int(row["count"]) for row in own] == counts
        assert [float(row["score"]) for row in own] == counts  # the criterion is the count
        assert [row["new_expert"] for row in own] == [row["expert"] for row in own]
        shares = [float(row["share"]) for row in own]
        assert shares == pytest.approx([count / sum(counts) for count in counts], abs=1e-6)
        assert {row["bits"] for row in own} == {""}


def test_a_plan_renumbers_and_bits_are_of_what_it_leaves(tmp_path: Path) -> None:
    plan = facts.plan()
    source = replace(WHOLE, plan=plan, bits=3.0)
    expert_table.write(tmp_path / "t", source)
    notes = auto_round_bits.write(tmp_path / "b.json", source)
    given = json.loads((tmp_path / "b.json").read_text())
    scores = score(facts.stats(), "weighted_ean")
    left = {name: scores[name][list(kept)].tolist() for name, kept in plan.kept.items()}
    expected = expert_bits(left, 3)
    assert len({bits for of_layer in expected.values() for bits in of_layer}) > 1
    assert given == {
        f"{name}.{number}.": {"bits": bits}
        for name, of_layer in expected.items()
        for number, bits in enumerate(of_layer)
    }
    assert notes[0].startswith("12 experts: ")
    assert notes[0].endswith(" bits, 3.00 on average")
    for row in table(tmp_path / "t"):
        kept = plan.kept[row["layer"]]
        if int(row["expert"]) not in kept:
            assert (row["new_expert"], row["bits"]) == ("", "")
            continue
        number = kept.index(int(row["expert"]))
        assert row["new_expert"] == str(number)
        assert row["bits"] == str(expected[row["layer"]][number])


def test_no_expert_takes_the_bits_of_another(tmp_path: Path) -> None:
    """AutoRound looks for each name anywhere in the name of a matrix."""
    auto_round_bits.write(tmp_path / "b.json", replace(WHOLE, bits=3.0))
    names = list(json.loads((tmp_path / "b.json").read_text()))
    matrices = [f"{name}{matrix}_proj" for name in names for matrix in ("gate", "up", "down")]
    for name in names:
        assert sum(bool(re.search(re.escape(name), matrix)) for matrix in matrices) == 3
    assert not re.search(re.escape(f"{facts.NAMES[0]}.1."), f"{facts.NAMES[0]}.10.up_proj")


def test_an_average_is_taken_as_it_is_written() -> None:
    for tenths in range(20, 81):
        found = expert_bits({"layer": [float(9 - expert) for expert in range(10)]}, tenths / 10)
        assert sum(found["layer"]) <= tenths
        if tenths <= 40:  # above, a step is of 4 bits
            assert sum(found["layer"]) == tenths


def test_averages_outside_the_bits_are_refused(tmp_path: Path) -> None:
    for writer in (expert_table, auto_round_bits):
        with pytest.raises(PlanError, match="bits 9: an expert has 2, 3, 4, 8 bits"):
            writer.write(tmp_path / "f", replace(WHOLE, bits=9.0))
        assert not (tmp_path / "f").exists()
