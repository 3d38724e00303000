"""Random texts of every kind and format, rewritten: each is refused, or decides as it did before
for every module that is kept, read by its format's own rules.
"""

import random
from collections.abc import Callable

import pytest

from reap_kernels.errors import CheckpointError
from tests.driver.writer.test_expert_names import (
    NAMES,
    Reader,
    auto_round,
    autoawq,
    compressed_tensors,
    gptqmodel,
    modelopt,
    pairs,
    resolve,
    transformers,
)

NUMBERS = [
    "3",
    "4",
    "5",
    "30",
    "39",
    "8",
    "1",
    "[3-5]",
    "(3|5)",
    r"\d",
    r"\d+",
    r"3\d",
    "3?",
    r"\d*",
]
LAYERS = ["0", "1", "2", "3", r"\d", "[01]", "(0|2)"]
ENDS = ["up_proj", "down_proj$", ".*", "", "(up|down)_proj", ".*_proj$", r"\w+$", "$", "up"]


def regular(choose: random.Random) -> str:
    number, layer = choose.choice(NUMBERS), choose.choice(LAYERS)
    middle = choose.choice(
        [
            rf"layers\.{layer}\.mlp\.experts\.{number}\.",
            rf"layers.{layer}\.mlp.experts\.{number}",
            rf"mlp\.experts.{number}\.",
            rf"experts\.{number}",
            rf"\.{number}\.",
        ]
    )
    start = choose.choice([".*", "^", "", "^.*", r".*\.", r"model\."])
    return start + middle + choose.choice(ENDS)


def name(choose: random.Random) -> str:
    layer = f"layers.{choose.choice('012')}.mlp.experts."
    start = choose.choice([f"model.{layer}", layer, "mlp.experts.", "experts."])
    return start + choose.choice(NUMBERS[:6]) + choose.choice(["", ".up_proj", ".down_proj"])


def wildcard(choose: random.Random) -> str:
    number = choose.choice(["3", "4", "5", "30", "3?", "[34]", "3*", "*", "?"])
    layer = f"model.layers.{choose.choice('012*?')}.mlp.experts."
    start = choose.choice([layer, "*mlp.experts.", "*experts.", "*."])
    return start + number + choose.choice(["*", ".up_proj", ".*", ".*_proj", "", "*proj"])


FORMATS: list[tuple[str, Reader, list[Callable[[random.Random], str]]]] = [
    ("compressed-tensors", compressed_tensors, [lambda c: "re:" + regular(c), name]),
    ("gptq", gptqmodel, [lambda c: "-:" + regular(c), lambda c: "+:" + regular(c)]),
    ("auto-round", auto_round, [regular, name]),
    ("modelopt", modelopt, [wildcard, name]),
    ("fp8", transformers, [regular, name]),
    ("awq", autoawq, [name]),
]


@pytest.mark.parametrize(("method", "reader", "kinds"), FORMATS)
def test_random_texts_mean_the_same_or_are_refused(
    method: str, reader: Reader, kinds: list[Callable[[random.Random], str]]
) -> None:
    choose = random.Random(0)
    changed = refused = 0
    for _ in range(50):
        texts = [choose.choice(kinds)(choose) for _ in range(choose.randint(1, 3))]
        options = {text: number for number, text in enumerate(texts)}
        try:
            listed = NAMES.rewrite(texts, "x", method)
            tabled = NAMES.rewrite(options, "x", method)
        except CheckpointError:
            refused += 1
            continue
        changed += listed != texts
        for old, new in pairs():
            before = any(reader(text, old) for text in texts)
            assert any(reader(text, new) for text in listed) == before, (texts, listed, old)
            value = resolve(options, reader, old)
            assert resolve(tabled, reader, new) == value, (options, tabled, old)
    assert changed > 10
    assert refused < 25
