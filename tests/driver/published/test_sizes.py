"""The guide on sizes: its commands print what it shows, and arithmetic by hand confirms that.

The hand arithmetic takes numbers of the published configurations alone, and none of the code that
is tested.
"""

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest

import reap_driver as rd
from reap_driver.compat.library_faults import fault
from reap_kernels.errors import UnsupportedModel
from tests.driver.cli.conftest import Run, run, write_data  # noqa: F401
from tests.driver.published.checkpoint import write_tokenizer
from tests.driver.published.models import MODELS
from tests.driver.published.reduce import CONFIGS

GUIDE = (Path(__file__).parents[3] / "docs/guides/sizes.md").read_text(encoding="utf-8")
IDS = {MODELS[name].hub_id: name for name in ("qwen3-30b-a3b", "glm-4.5-air", "kimi-k2")}
MACHINE = "8xH200-141GB,ram=1TB,free=2TB,disk=2GB/s"
CONTEXT = 8192


def qwen(experts: int) -> tuple[int, int, int]:
    """(parameters, bytes, bytes of the cache of a token) of Qwen3-30B-A3B with so many experts."""
    attention = 2 * 2048 * (32 * 128) + 2 * 2048 * (4 * 128)
    norms = 2 * 2048 + 2 * 128
    expert = 3 * 2048 * 768 + 2048
    total = 48 * (attention + norms + experts * expert) + 2 * 151936 * 2048 + 2048
    return total, 2 * total, 48 * 4 * (128 + 128) * 2


def glm(experts: int) -> tuple[int, int, int]:
    """The same of GLM-4.5-Air."""
    attention = 2 * 4096 * (96 * 128) + 2 * 4096 * (8 * 128) + 96 * 128 + 2 * 8 * 128
    dense = 3 * 4096 * 10944
    expert = 3 * 4096 * 1408
    moe = expert + experts * (expert + 4096)  # a shared one, then each with its row of the router
    total = 46 * (attention + 2 * 4096) + dense + 45 * moe + 2 * 151552 * 4096 + 4096
    return total, 2 * total + 45 * 4 * experts, 46 * 8 * (128 + 128) * 2


def kimi(experts: int) -> tuple[int, int, int]:
    """The same of Kimi-K2, whose matrices are FP8 with a float32 scale per block of 128 x 128."""

    def matrix(rows: int, columns: int) -> tuple[int, int]:
        values = rows * columns
        return values, values + 4 * math.ceil(rows / 128) * math.ceil(columns / 128)

    def times(count: int, *parts: tuple[int, int]) -> tuple[int, int]:
        return tuple(count * sum(numbers) for numbers in zip(*parts, strict=True))  # type: ignore[return-value]

    def plain(values: int) -> tuple[int, int]:
        return values, 2 * values

    attention = [
        matrix(1536, 7168),
        matrix(64 * (128 + 64), 1536),
        matrix(512 + 64, 7168),
        matrix(64 * (128 + 128), 512),
        matrix(7168, 64 * 128),
        plain(1536 + 512 + 2 * 7168),
    ]
    dense = times(3, matrix(18432, 7168))
    expert = times(3, matrix(2048, 7168))
    router = (7168, 2 * 7168 + 4)  # a row; its correction bias is no parameter, and float32
    moe = times(60, expert, times(experts, expert, router))
    parts = [times(61, *attention), dense, moe, plain(2 * 163840 * 7168 + 7168)]
    parameters, nbytes = times(1, *parts)
    return parameters, nbytes, 61 * (512 + 64) * 2


BY_HAND = {"qwen3-30b-a3b": qwen, "glm-4.5-air": glm, "kimi-k2": kimi}
# model: (experts, of them chosen for a token, {size given: experts kept})
KEPT = {
    "qwen3-30b-a3b": (128, 8, {16: 23, 40: 70}),
    "glm-4.5-air": (128, 8, {80: 36, 160: 82}),
    "kimi-k2": (384, 8, {640: 212, 320: 103}),
}
COMMAND = re.compile(
    r"```sh no-run\n(reap-kernels prune [^\n]+)\n```\n(.*?)```text\n(.*?)```", re.DOTALL
)
SHOWN = [(shlex.split(line), text.splitlines()) for line, _, text in COMMAND.findall(GUIDE)]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the published configuration, a tokenizer and no weights."""
    shutil.copy(CONFIGS / f"{request.param}.json", tmp_path / "config.json")
    write_tokenizer(tmp_path)
    return tmp_path


def test_the_guide_shows_all_three() -> None:
    assert [IDS[words[2]] for words, _ in SHOWN] == [
        "qwen3-30b-a3b",
        "glm-4.5-air",
        "glm-4.5-air",
        "kimi-k2",
    ]


@pytest.mark.parametrize(
    ("folder", "number"),
    [(IDS[words[2]], n) for n, (words, _) in enumerate(SHOWN)],
    indirect=["folder"],
)
def test_commands_print_what_the_guide_shows(
    number: int,
    folder: Path,
    run: Run,  # noqa: F811
) -> None:
    """Run as shown, on the configuration in place of the hub id."""
    words, shown = SHOWN[number]
    data = write_data(folder / "code.jsonl")
    assert words[2] in IDS
    assert words[-1] == "--dry-run"
    assert "code.jsonl" in words
    named = [{words[2]: folder, "code.jsonl": data}.get(word, word) for word in words[1:]]
    done = run(*named, "--machine", MACHINE)
    if "error" in shown[0]:
        assert done.code == 3
        assert done.error == shown[0]
    else:
        assert done.code == 0, done.err
        assert "\n".join(shown) in done.out


@pytest.mark.parametrize(
    ("folder", "name", "size"),
    [(name, name, size) for name, (_, _, sizes) in KEPT.items() for size in sizes],
    indirect=["folder"],
)
def test_figures_are_those_by_hand(name: str, size: int, folder: Path, run: Run) -> None:  # noqa: F811
    experts, chosen, sizes = KEPT[name]
    words = ("prune", folder, "--fits", f"{size}GB", "--dry-run", "--tokens", "1M")
    found = run(*words, "--machine", MACHINE, "--json").json["pruned"]
    kept, budget = sizes[size], size * 10**9 * 9 // 10
    before, after, more = (BY_HAND[name](number) for number in (experts, kept, kept + 1))
    cache = CONTEXT * after[2]
    assert after[1] + cache <= budget < more[1] + cache
    assert {pair[1] for pair in found["experts_by_layer"].values()} == {kept}
    assert found["parameters"] == [before[0], after[0]]
    assert found["weight_bytes"] == [before[1], after[1]]
    assert found["cache_bytes"] == cache
    assert found["memory_bytes"] == after[1] + cache
    # Of the experts, a token uses those it is routed to; and every row of the router.
    rows = {"qwen3-30b-a3b": 48 * 2048, "glm-4.5-air": 45 * 4096, "kimi-k2": 60 * 7168}[name]
    active = [BY_HAND[name](chosen)[0] + (n - chosen) * rows for n in (experts, kept)]
    assert found["active_parameters"] == active


@pytest.mark.parametrize(
    ("folder", "name"), [("glm-4.5-air",) * 2, ("kimi-k2",) * 2], indirect=["folder"]
)
def test_what_is_out_of_reach_says_the_least(name: str, folder: Path, run: Run) -> None:  # noqa: F811
    words = ("prune", folder, "--fits", "16GB", "--dry-run", "--tokens", "1M")
    error = run(*words, "--machine", MACHINE).error
    _, least, per_token = BY_HAND[name](KEPT[name][1])
    total = least + CONTEXT * per_token
    said = int(re.findall(r"can be reached is ([\d,]+) bytes", error)[0].replace(",", ""))
    assert said == -(-total * 10 // 9)
    remedy = re.findall(r"give --fits ([\d.]+)GB", error)[0]
    assert 0 <= float(remedy) * 1e9 - said < 10**8
    assert f"{-(-total * 10 // 9):,} bytes" in GUIDE.replace("\n", " ")


def test_sums_of_the_guide() -> None:
    """The guide's numbers of the results, to the last digit."""
    for name, size in (("qwen3-30b-a3b", 16), ("glm-4.5-air", 80), ("kimi-k2", 640)):
        parameters, nbytes, per_token = BY_HAND[name](KEPT[name][2][size])
        for number in (nbytes, per_token, nbytes + CONTEXT * per_token, size * 9 * 10**8):
            assert f"{number:,}" in GUIDE
        assert f"{parameters:,}" in GUIDE or name == "kimi-k2"  # whose table is in bytes


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_published_configuration_can_be_planned_for(name: str) -> None:
    """Whatever its fields are: Step-3.5-Flash's numbers of heads differ from layer to layer."""
    machine = "1xGPU-10TB,ram=10TB,free=10TB,disk=2GB/s,copy=50GB/s,flops=400T"
    config = CONFIGS / f"{name}.json"
    given = {"tokens": 4096, "ratio": 0.25, "dtype": "bfloat16", "machine": machine}
    if fault(json.loads(config.read_text())["architectures"][0]) is not None:
        with pytest.raises(UnsupportedModel, match="transformers"):
            rd.estimate(config, **given)
        return
    found = rd.estimate(config, **given)
    assert found.forecast.seconds
    assert found.leaves.parameters[1] < found.leaves.parameters[0]
    if name == "step-3.5-flash":  # 12 layers attend to all tokens, 33 to a window of 512
        assert found.leaves.cache.of(CONTEXT) == 8 * 256 * 2 * (12 * CONTEXT + 33 * 512)
