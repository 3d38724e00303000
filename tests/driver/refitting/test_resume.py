"""A re-fit that is interrupted anywhere goes on with the same bits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from torch import Tensor

from reap_driver.base.interrupts import Interrupted, Stop
from reap_driver.refitting.engine import LayerFacts
from tests.driver.refitting.pairs import pair
from tests.driver.refitting.test_bits import same, streamed

NAME = "deepseek_v3"  # three layers, of which the first is dense
SHARES = 9  # of the work, in each layer: 8 batches and the solution


@dataclass
class Journal:
    """A journal in memory, of which the states are in files."""

    often: bool = True
    position: int = 0
    layers: Mapping[str, LayerFacts] = field(default_factory=dict)

    def due(self) -> bool:
        return self.often

    def write(self, position: int, layers: Mapping[str, LayerFacts]) -> None:
        self.position, self.layers = position, dict(layers)


class Asked(Stop):
    """A request to end the run that comes with the n-th share of the work."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def done(self, share: float) -> None:
        self.left -= share > 0
        self.requested = self.left <= 0


def interrupted(folder: Path, after: int, how: str, journal: Journal) -> tuple[str, dict]:
    """The text of a run that is interrupted, and what it had put."""
    stop = Asked(after)
    found: dict[str, Tensor] = {}
    told = {"journal": journal, "stop": stop, "done": stop.done, "put": found.__setitem__}
    with pytest.raises(Interrupted) as caught:
        streamed(pair(NAME), offload=how, folder=folder, **told)
    return str(caught.value), found


@pytest.mark.parametrize("how", ["device", "file"])
@pytest.mark.parametrize("after", [2, SHARES, SHARES + 2, 2 * SHARES, 2 * SHARES + 2])
def test_a_run_goes_on_with_the_same_bits(tmp_path: Path, how: str, after: int) -> None:
    facts, want = streamed(pair(NAME))
    journal = Journal()
    text, found = interrupted(tmp_path, after, how, journal)
    assert journal.position == after // SHARES
    assert text.startswith(f"interrupted after {journal.position} of 3 layers")
    told = {"offload": how, "folder": tmp_path, "journal": journal}
    done: list[float] = []
    again, rest = streamed(pair(NAME), **told, done=done.append)
    assert again == facts
    assert sum(done) == pytest.approx(1)
    assert same(found | rest, want)
    assert len(rest) == len(want) - len(found)


def test_layers_that_are_not_written_down_yet_are_on_request(tmp_path: Path) -> None:
    journal = Journal(often=False)
    text, _ = interrupted(tmp_path, SHARES + 2, "device", journal)
    assert text.startswith("interrupted after 2 of 3 layers")  # the second is completed
    assert journal.position == 2
