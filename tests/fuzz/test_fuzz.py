"""A short campaign over every reader, and that a campaign sees faults. `make fuzz`: a long one."""

import time
from pathlib import Path

import pytest

from reap_kernels.errors import DataError
from tests.fuzz.campaign import Nonsense, Outcomes, Reader, run, table
from tests.fuzz.changes import json_value
from tests.fuzz.readers import readers
from tests.fuzz.world import World

# Files that are copied along, whatever they hold.
_COPIED = {"README.md", "generation_config.json"}


def test_no_reader_ends_in_a_fault(tmp_path: Path) -> None:
    faults: list[str] = []
    found = run(readers(World(tmp_path)), 440, seed=1, shown=faults.append)
    assert not faults, "\n".join([table(found), *faults])
    for name, outcomes in found.items():
        assert outcomes.refused or name in _COPIED, f"{name} refuses nothing"
    assert sum(outcomes.accepted for outcomes in found.values()) > 50


def _raise(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("reader", "counted"),
    [
        (lambda _: _raise(KeyError("x")), "tracebacks"),
        (lambda _: _raise(DataError("")), "tracebacks"),
        (lambda _: _raise(DataError("x" * 10_000)), "tracebacks"),
        (lambda _: _raise(DataError("\ud800")), "tracebacks"),
        (lambda _: _raise(Nonsense("x")), "nonsense"),
        (lambda _: time.sleep(1), "hangs"),
    ],
    ids=["traceback", "no message", "long message", "unprintable", "nonsense", "hang"],
)
def test_a_fault_is_counted(reader, counted) -> None:
    one = Reader("planted", [], json_value, reader, odd=[b'{"a": 1}'])
    faults: list[str] = []
    found = run([one], 2, seed=0, shown=faults.append, hang=0.05)["planted"]
    assert (getattr(found, counted), found.wrong, len(faults)) == (2, 2, 1)
    assert "planted:0:0" in faults[0]


def test_a_refusal_and_an_accepted_input_are_no_faults() -> None:
    outcomes = [
        run([Reader("x", [], json_value, read, odd=[b"{}"])], 3, seed=0)["x"]
        for read in (lambda _: _raise(DataError("no")), lambda _: None)
    ]
    assert outcomes[0].refused == 3
    assert outcomes[1].accepted == 3
    assert not any(one.wrong for one in outcomes)
    assert isinstance(outcomes[0], Outcomes)


def test_a_valid_input_that_is_refused_is_a_fault() -> None:
    one = Reader("x", [b"{}"], json_value, lambda _: _raise(DataError("no")))
    assert run([one], 1, seed=0, shown=lambda _: None)["x"].nonsense == 1
