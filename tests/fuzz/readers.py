"""Every reader of what comes from elsewhere, with valid inputs and the use of an accepted one.

Most are called as a user calls them, by the command line in this process, so that what is accepted
is also planned from, drawn or written with.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from functools import partial
from random import Random
from unittest import mock

from tests.fuzz.campaign import Reader
from tests.fuzz.checkpoint_readers import checkpoints
from tests.fuzz.client_readers import answers
from tests.fuzz.data_readers import data
from tests.fuzz.exchange_readers import exchanged
from tests.fuzz.format_readers import containers, formats
from tests.fuzz.server_readers import requests
from tests.fuzz.sum_readers import sums
from tests.fuzz.weight_readers import weights
from tests.fuzz.world import World, command


def readers(world: World) -> list[Reader]:
    """All of them."""
    return [
        *formats(world),
        *containers(world),
        *sums(world),
        *exchanged(world),
        *checkpoints(world),
        *data(world),
        *weights(world),
        *requests(world),
        *answers(),
        *_words_and_variables(world),
    ]


def _words_and_variables(world: World) -> Iterable[Reader]:
    """Words on the command line, and the environment."""
    yield Reader("command line", _WORDS, _words, partial(_call, world), 3)
    yield Reader("environment", _VARIABLES, _assigned, partial(_call_with, world))


_VARIABLES = (
    b"WORLD_SIZE=1",
    b"RANK=0",
    b"LOCAL_RANK=0",
    b"REAP_BACKEND=cpu",
    b"REAP_TUNING=",
    b"REAP_CPU_DTYPE=float32",
    b"REAP_SCRATCH_BYTES=1000000",
    b"REAP_CACHE_DIR=cache",
)


def _assigned(content: bytes, rng: Random) -> bytes:
    name = content.partition(b"=")[0]
    return name + b"=" + rng.choice([word for word in _ODD if "\0" not in word]).encode()


def _call_with(world: World, content: bytes) -> None:
    name, _, value = content.decode().partition("=")
    new = world.folder / "environment"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    words = (world.model, "--data", world.data, "--seq-len", 16, "--out", new / "stats.safetensors")
    with contextlib.chdir(new), mock.patch.dict(os.environ, {name: value}):
        command("observe", *words)


_WORDS = (
    b"plan STATS --out OUT --ratio 0.5 --criterion S(0,1,1)",
    b"plan STATS --out OUT --ratio 0.25 --allocation global --skip-first 1",
    b"plan STATS --out OUT --ratio 0.5 --weights data=1.0 --protect 0:1,2",
    b"plan STATS --out OUT --ratio 0.5 --protect super --criterion random:7",
    b"observe MODEL --dry-run --tokens 24M --seq-len 16 --batch-size 2 --folds 4",
    b"observe MODEL --dry-run --data code=DATA:7 --packing none --max-len 16",
)
_ODD = (
    "-1", "0", "1e999", "nan", "inf", "9" * 30, "x", "", "*", "0.5", "=", ":", ",", "S(9,9,9)",
    "S(9999,1,1)", "random:-1", "random:" + "9" * 30, "x" * 300, "\u00e9", "\x01", "../..", "0:1",
    "99:1", "0:-1", "data=nan", "data=-1", "data=0", "[", "]", "(", "code=DATA:0", "DATA:1e9tok",
    "DATA:" + "9" * 30, "DATA:-1", "0.999999999", "1e-300",
)  # fmt: skip


def _words(content: bytes, rng: Random) -> bytes:
    words = content.decode().split(" ")
    for _ in range(rng.choice([1, 1, 2])):
        at = rng.randrange(1, len(words))
        if rng.random() < 0.8:
            words[at] = rng.choice(_ODD)
        elif rng.random() < 0.5:
            del words[at]
        else:
            words.insert(at, rng.choice(words))
    return " ".join(words).encode()


def _call(world: World, content: bytes) -> None:
    new = world.folder / "words/in/a/folder"  # outputs named by chance stay below the world's
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    known = {"STATS": world.stats, "OUT": new / "out", "MODEL": world.model}
    words = [str(known.get(word, word)) for word in content.decode().split(" ")]
    with contextlib.chdir(new):
        command(*(word.replace("DATA", str(world.data)) for word in words))
