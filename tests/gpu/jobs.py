"""Files and whole jobs on a GPU: packed formats streamed, runs resumed, commands of the library."""

import contextlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu.verify import CheckFailed, NotHere
from reap_kernels import SaliencyStats
from reap_kernels.tuning import Table
from tests.gpu.checks import Check
from tests.gpu.models import Group, checks

# Launches that `tune` tries of each product; it would measure all others the same way.
_TRIED = 6
_FOLDER = "reap-jobs-"
_RUN = {"run": "a check of a GPU"}


def expect_same_bits(mine: Any, theirs: Any) -> None:
    """Raises where a statistic has other bits."""
    for layer, known in theirs.layers.items():
        for field, value in known.fields().items():
            if not torch.equal(mine.layers[layer].fields()[field], value):
                raise CheckFailed(f"{field} of {layer} has other bits than in a resident run")


def streamed(device: torch.device, _: str, __: torch.dtype, name: str, place: str) -> str:
    """A checkpoint of a packed format streamed, against the same resident on the device, and its
    twin of unpacked weights, bit by bit.
    """
    from reap_driver.load.resident import load_model
    from tests.driver.streaming import packing, passes, test_packed

    with tempfile.TemporaryDirectory(prefix=_FOLDER) as root:
        own = test_packed.MODELS[name]
        folder, twin = packing.checkpoints(own[0], Path(root), *own[1:])
        data = passes.batches(packing.VOCAB)
        stats, _opened = passes.streamed(folder, data, place, Path(root) / "states", device)
        for other in (folder, twin):
            model = load_model(other, device=device)
            expect_same_bits(stats, passes.resident(other, data, model=model))
    return "the bits of a resident run, and of unpacked weights"


def resumed(device: torch.device, _: str, __: torch.dtype) -> str:
    """A streamed run that ends behind every layer and goes on, with states in its journal."""
    from reap_driver.base.interrupts import Interrupted, Stop
    from reap_driver.load.resident import load_model
    from reap_driver.load.streamed_model import open_streamed
    from reap_driver.observation.journal import Journal, exists
    from reap_driver.observation.observer import observe
    from reap_driver.observation.run import ObserverJournal, Run, run_streamed
    from reap_driver.observation.state_store import StateStore
    from tests.driver.streaming import passes
    from tests.driver.writer import saved

    with tempfile.TemporaryDirectory(prefix=_FOLDER) as root:
        folder, kept = Path(root) / "model", Path(root) / "journal"
        own = saved.save("qwen3_moe", folder, num_hidden_layers=3)
        data = passes.batches(own.config.vocab_size)
        ended = 0
        while True:
            journal, store, stop = Journal(kept, _RUN, 1), StateStore("device", device), Stop()
            done: list[float] = []

            def count(share: float, stop: Stop = stop, done: list[float] = done) -> None:
                done.append(share)
                stop.requested = len(done) == len(data.ids) + 1

            try:
                with open_streamed(folder, device=device) as opened:
                    observer = observe(opened.model)
                    if exists(kept):
                        entry = journal.resume()
                        observer.restore(entry.snapshot)
                        if entry.states is not None:
                            store.load(entry.states)
                    numbers = range(len(data.ids))
                    run = Run(
                        observer, data, numbers, stop, ObserverJournal(journal, observer), count
                    )
                    run_streamed(run, opened, store)
                    break
            except Interrupted:
                ended += 1
        if not ended:
            raise CheckFailed("the run was never interrupted")
        model = load_model(folder, device=device)
        expect_same_bits(observer.stats, passes.resident(folder, data, model=model))
    return f"the bits of a resident run, after {ended} interruptions"


def command(*words: object) -> str:
    """What a command line prints.

    Raises:
        CheckFailed: it ends with an error.
    """
    from reap_driver.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    if code:
        said = " ".join((err.getvalue() or out.getvalue()).split())[-300:]
        raise CheckFailed(f"`reap-kernels {words[0]}` ends with {code}: {said}")
    return out.getvalue()


def commands(device: torch.device, _: str, __: torch.dtype) -> str:
    """Observe with Gram matrices, search, compare and re-fit, each as a user calls it."""
    from tests.driver.cli.conftest import write_model

    with tempfile.TemporaryDirectory(prefix=_FOLDER) as root:
        folder, data = Path(root), Path(root) / "data.jsonl"
        model = write_model(folder / "model", "qwen3_moe", num_hidden_layers=3)
        ids = [(7 * number) % 250 for number in range(8 * 32)]
        data.write_text(json.dumps({"input_ids": ids}) + "\n")
        shared = ["--data", data, "--seq-len", 32, "--device", device.type, "--quiet"]
        stats, plan, cut = folder / "stats.safetensors", folder / "plan.json", folder / "cut"
        command("observe", model, *shared, "--gram", folder / "grams", "--out", stats)
        if device.type == "cuda":
            own, text = (
                torch.cuda.get_device_name(device),
                str(SaliencyStats.load(stats).provenance),
            )
            if own not in text:
                raise CheckFailed(f"the statistics do not name {own!r}: {text[:200]}")
        command("plan", stats, "--ratio", 0.25, "--out", plan)
        command("apply", model, plan, "--out", cut)
        command("compare", model, cut, *shared, "--json")
        command("refit", cut, "--original", model, *shared, "--out", folder / "refit")
        search = ["--evaluations", 12, "--out", folder / "searched.json"]
        command("search", model, stats, *shared, *search)
    return "observe, plan, apply, compare, refit, search"


def tuned(device: torch.device, _: str, __: torch.dtype) -> str:
    """`reap-kernels tune` with the GPU's clock, on a few launches."""
    from reap_kernels import tune

    if device.type != "cuda":
        raise NotHere("needs a CUDA device")

    def few(*asked: Any) -> list[Any]:
        return tune.candidates(*asked)[:_TRIED]

    with tempfile.TemporaryDirectory(prefix=_FOLDER) as root:
        out = Path(root) / "launches.json"
        with mock.patch.dict(tune.tune.__kwdefaults__, {"tried": few}):
            command("tune", "--shape", "16,4,1024,512", "--out", out, "--device", "cuda")
        entries = Table.load(out).entries
    backends = [str(entry) for entry in entries if entry.launch is None]
    return f"{len(entries)} lines; {'; '.join(backends)}"[:400]


STREAMED: Group = (
    *(
        (f"streamed {name}, states on the {place}", streamed, (name, place))
        for name, place in (
            ("qwen3_moe", "device"),
            ("fp8", "host"),
            ("int8", "file"),
            ("int4 experts, fp8 attention", "device"),
        )
    ),
    ("streamed and resumed", resumed, ()),
)
COMMANDS: Group = (("commands", commands, ()),)
TUNED: Group = (("tune", tuned, ()),)


def plan(smoke: bool) -> list[Check]:
    """Every check; none where all would only compare the CPU with itself."""
    return [] if smoke else checks((*STREAMED, *COMMANDS, *TUNED))
