"""What the view shows: exact pictures of what was seen, by width, and what is measured."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reap_driver.integrations.vllm.client import Server
from reap_driver.integrations.vllm.live.look import Look, Wanted, look
from reap_driver.integrations.vllm.live.picture import Style, hidden_layers, level, lines_of
from tests.driver.integrations.vllm.fake_server import (
    FakeServer,
    names,
    serving,
    statistics,
    status,
)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with serving() as server:
        yield server


class Seen:
    """Looks at a server with such statistics, which is known by another URL."""

    def __init__(self, fake: FakeServer, folder: Path) -> None:
        self.fake, self.file = fake, folder / "stats.safetensors"
        self.wanted = Wanted()

    def __call__(
        self, at: float = 0.0, before: Look | None = None, stats: Any = None, **more: Any
    ) -> Look:
        stats = statistics() if stats is None else stats
        stats.save(self.file)
        experts = next(iter(stats.layers.values())).num_experts
        layers = len(stats.layers)
        self.fake.tell("GET status", status(layers=layers, experts=experts) | more)
        self.fake.tell("GET stats", self.file.read_bytes())
        self.fake.tell("GET mask", {"removed": {names(1)[0]: [0, 7]}})
        found = look(Server(self.fake.url), self.wanted, at, before)
        return Look(**{**vars(found), "url": "http://gpu:8000"})


@pytest.fixture
def seen(fake: FakeServer, tmp_path: Path) -> Seen:
    return Seen(fake, tmp_path)


def text(found: Look, width: int = 80, **more: Any) -> str:
    lines = lines_of(found, Style(width), **more)
    assert not [line for line in lines if len(line) > width]
    return "\n".join(lines) + "\n"


def test_a_picture(seen: Seen) -> None:
    groups = {"all": 36_000, "code": 1_234_567}
    before = seen(groups={"all": 35_000, "code": 1_234_567})
    found = seen(
        2.0,
        before,
        groups=groups,
        every=8,
        mode="shadow",
        not_counted={"drafted": 12, "recomputed": 0},
        mask={"experts": 2, "layers": 1, "of": 16, "source": "plan by reap, 2 of 16 experts"},
    )
    assert (
        text(found)
        == """\
org/tiny-moe at http://gpu:8000 (vLLM 0.32.0, reap-kernels 0.1.0)
observing shadow, one step in 8; 9 of 9 steps
tokens    1.27M, 500/s: all 36k (500/s), code 1.23M (0/s)
          not counted: 12 drafted
mask      plan by reap, 2 of 16 experts
plan      by reap: keeps 4 of 8 experts in each of 2 layers, ratio 0.5; they had
          72.2 % of the routing mass
margin    0 of 16 experts within 5 % of the cut; smallest gap 16.7 % (layer 1);
          0 changed side since the last look

▁ to █: score by reap, from below 0.35 to above 2.83 times the layer's mean; ·
no token, x masked
layer              kept  near     gap
    0  x▂▃▄▅▅▆x       4     0  20.0 %
    1  ▂▃▄▄▅▅▆▆       4     0  16.7 %
"""
    )


def test_narrow_terminals(seen: Seen) -> None:
    """Below 50 columns a strip stands alone; below 20, a line has what has room."""
    found = seen(stats=statistics(layers=1, experts=64))
    assert (
        text(found, 40)
        == """\
org/tiny-moe at http://gpu:8000 (vLLM
0.32.0, reap-kernels 0.1.0)
observing replace, every step; 9 of 9
          steps
tokens    36
mask      none
plan      by reap: keeps 32 of 64
          experts in each of 1 layers,
          ratio 0.5; they had 74.6 % of
          the routing mass
margin    4 of 64 experts within 5 % of
          the cut; smallest gap 3.0 %
          (layer 0)

▁ to █: score by reap, from below 0.35
to above 2.83 times the layer's mean (2
experts per character); · no token
layer
    0  ▁▁▁▁▁▂▂▂▃▃▃▄▄▄▄▄▅▅▅▅▅▅▅▆▆▆▆▆▆▆▆▆
"""
    )
    assert (
        text(found, 12)
        == """\
org/tiny-moe
observing re
tokens 36
mask none
plan by reap
margin 4 of

▁ to █: scor
layer
    0  ▁▃▅▆▆
"""
    )
    assert text(found, 5).splitlines()[-1] == "layer"


@pytest.mark.parametrize("width", [1, 7, 8, 19, 20, 49, 50, 79, 200, 1000])
def test_every_width(seen: Seen, width: int) -> None:
    """Lines are never longer than the terminal, and strips of all layers are as long."""
    found = seen(stats=statistics(layers=2, experts=37), mask={"experts": 1})
    lines = text(found, width).splitlines()
    assert len(lines) >= 6
    assert width < 8 or len(lines[-1]) == len(lines[-2])


def test_many_layers_scroll(seen: Seen) -> None:
    found = seen(stats=statistics(layers=61))
    assert len(text(found).splitlines()) == 61 + 12
    assert hidden_layers(found, Style(), 24) == 61 - 11
    top = text(found, height=24).splitlines()
    assert (len(top), top[12][:5], top[-1]) == (24, "    0", "layers 1 to 11 of 61")
    for first in (50, 60, 10**6):
        end = text(found, height=24, first=first).splitlines()
        assert (len(end), end[-2][:5], end[-1]) == (24, "   60", "layers 51 to 61 of 61")
    for height in range(1, 24):
        assert len(text(found, height=height, first=3).splitlines()) == height
    assert hidden_layers(found, Style(), 100) == 0


def test_nothing_counted(seen: Seen) -> None:
    """The statistics are not asked for."""
    found = seen(groups={"all": 0}, mode="off", steps=0, observed_steps=0)
    assert (
        text(found)
        == """\
org/tiny-moe at http://gpu:8000 (vLLM 0.32.0, reap-kernels 0.1.0)
observing off
tokens    none counted so far
mask      none
"""
    )
    assert [one.path for one in seen.fake.asked] == ["/reap/status"]


def test_statistics_that_are_not_planned_from(seen: Seen) -> None:
    """Strips are shown without a plan, or else nothing; with the reason."""
    seen.wanted = Wanted(ratio=0.01)
    found = text(seen())
    assert "note      no plan: ratio 0.01 of the 8 experts of layer" in found
    assert "    0  ▁▂▃▄▅▅▆▆\n" in found
    broken = statistics()
    next(iter(broken.layers.values())).nonfinite[0, 3] += 1
    found = text(seen(stats=broken))
    assert "note      no scores: layer model.layers.0.mlp.experts" in found
    assert "▂" not in found


def test_what_is_not_observed_is_named(seen: Seen) -> None:
    layers = status()["layers"]
    layers[names(2)[1]]["refusal"] = "its kernel routes inside; use --moe-backend triton"
    found = text(seen(layers=layers))
    assert "note      model.layers.1.mlp.experts is not observed: its kernel routes" in found
    layers[names(2)[0]]["refusal"] = layers[names(2)[1]]["refusal"]
    found = text(seen(layers=layers, note="vLLM 0.99 has not been tested"))
    assert "note      vLLM 0.99 has not been tested\n" in found
    assert "model.layers.0.mlp.experts and 1 more layers are not observed: its" in found


def test_an_observation_that_ended_itself(seen: Seen) -> None:
    found = seen(mode="off", error="layer 3 was not called in a step; start with --enforce-eager")
    assert "note      layer 3 was not called in a step; start with --enforce-eager\n" in text(found)


def test_experts_without_tokens(seen: Seen) -> None:
    stats = statistics()
    for layer in stats.layers.values():
        layer.counts[:, :, 2:4] = 0
        layer.sums[:, :, 2:4] = 0
        layer.extrema[0, :, 2:4] = -float("inf")
        layer.extrema[1, :, 2:4] = float("inf")
    assert "    0  ▁▂··▅▅▆▆       4     0" in text(seen(stats=stats))


def test_names_cannot_command_the_terminal(seen: Seen) -> None:
    found = seen(model="a\x1b[2Jb", groups={"all": 30, "c\x1b]0;d": 6})
    assert "\x1b" not in text(found)
    assert "a\\x1b[2Jb" in text(found)


def test_rates_and_changes(seen: Seen) -> None:
    """Of a group that is new, and of one whose count was reset."""
    before = seen(groups={"all": 100, "code": 50})
    found = seen(4.0, before, groups={"all": 40, "code": 70, "chat": 8})
    assert found.rates == {"all": 10.0, "code": 5.0, "chat": 2.0}
    other = statistics()
    for layer in other.layers.values():
        layer.sums[:] = layer.sums.flip(-1)
        layer.counts[:] = layer.counts.flip(-1)
    assert seen(8.0, found, stats=other).changed == 8
    seen.wanted = Wanted(0.25)
    assert seen(9.0, found, stats=other).changed is None


def test_colors_and_other_characters(seen: Seen) -> None:
    found = seen(mask={"experts": 2, "layers": 1, "of": 16})
    first, second = lines_of(found, Style(color=True))[-2:]
    gone, masked, plain = "\x1b[31m", "\x1b[2m", "\x1b[0m"
    assert f"{masked}x{plain}{gone}▂{plain}{gone}▃{plain}{gone}▄{plain}▅▅▆{masked}x{plain}" in first
    assert f"{gone}▄{plain}▅▅▆▆" in second
    [*_, legend, _, _, last] = lines_of(found, Style(blocks=False))
    assert (legend, last[:15]) == ("no token, x masked", "    1  23445566")
    assert "1 to 8: score by reap" in "\n".join(lines_of(found, Style(blocks=False)))
    wide = seen(stats=statistics(experts=100))
    assert "\x1b[33m" in "\n".join(lines_of(wide, Style(36, color=True)))


@pytest.mark.parametrize(
    ("score", "mean", "step"),
    [(0.0, 0.0, 0), (0.0, 1.0, 0), (0.35, 1.0, 0), (0.36, 1.0, 1), (2.82, 1.0, 6), (2.83, 1.0, 7)],
)
def test_levels(score: float, mean: float, step: int) -> None:
    assert level(score, mean) == step


def test_facts(seen: Seen) -> None:
    facts = seen(mask={"experts": 2}).facts()
    assert facts["plan"] == {"criterion": "reap", "ratio": 0.5, "near": 0}
    assert facts["problem"] is None
    strip = facts["strips"][names(1)[0]]
    assert strip == {
        "experts": 8,
        "dead": 0,
        "masked": 2,
        "kept": 4,
        "near": 0,
        "gap": pytest.approx(0.2),
        "kept_mass": pytest.approx(26 / 36),
    }
