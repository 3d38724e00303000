"""`--dry-run`: what a run would take, for a checkpoint, its configuration, or a published one."""

import json
import shutil
from pathlib import Path

import pytest

import reap_driver as rd
from tests.driver.cli.conftest import Run
from tests.driver.cli.test_bad_input import listing
from tests.driver.published.reduce import CONFIGS


@pytest.mark.parametrize("command", ["observe", "prune"])
def test_a_checkpoint_with_data(
    run: Run, model: Path, data: Path, tmp_path: Path, command: str
) -> None:
    """The real run's tokens and batches, the files' bytes, and nothing is written."""
    words = (model, "--data", data, "--seq-len", 64, "--out", tmp_path / "out")
    before = listing(tmp_path)
    done = run(command, *words, "--dry-run", "--json").json
    assert listing(tmp_path) == before
    files = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    assert 0.8 * files < done["checkpoint"]["bytes"] < files
    assert done["checkpoint"]["origin"] == "headers"
    assert (done["command"], done["dry_run"], done["decision"]["stream"]) == (command, True, False)
    assert done["forecast"]["seconds"] > 0
    assert done["rates"]["disk"]["per_second"] > 0
    stats = tmp_path / "stats"
    assert run("observe", *words[:-1], stats).code == 0
    [source] = rd.SaliencyStats.load(stats).provenance["data"]
    assert done["data"]["tokens"] == source["tokens"]
    assert done["decision"]["batch_size"] == source["batch_size"]


def test_lines(run: Run, model: Path) -> None:
    done = run("observe", model, "--dry-run", "--tokens", "24M", "--stream", "always")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert 12 <= len(lines) <= 25
    assert max(map(len, lines)) < 140
    names = [line[:12].strip() for line in lines]
    for name in ("model", "on disk", "resident", "streamed", "free", "decision", "read", "compute"):
        assert names.count(name) == 1
    assert "24,000,000 tokens, sequences of 256" in done.out
    assert "stream layers, offload states to: host" in done.out
    assert "requested with --stream always" in done.out
    assert "(exact)" in done.out


@pytest.mark.parametrize("shape", ["folder", "config.json", "other.json"])
def test_a_configuration_alone(run: Run, tmp_path: Path, shape: str) -> None:
    """No weights: sizes are estimates, and no time is made up for reading them."""
    name = "config.json" if shape == "folder" else shape
    shutil.copy(CONFIGS / "olmoe-1b-7b.json", tmp_path / name)
    where = tmp_path if shape == "folder" else tmp_path / name
    words = ("prune", where, "--dry-run", "--tokens", 4096, "--stream", "always")
    done = run(*words, "--json").json
    assert done["checkpoint"]["origin"] == "estimated"
    assert done["checkpoint"]["bytes"] == pytest.approx(13.84e9, rel=0.01)
    assert done["rates"]["disk"] is None
    assert done["forecast"]["seconds"] is None
    text = run(*words).out
    assert "13.8 GB bfloat16 (estimated)" in text
    assert "0:14 at 1 GB/s" in text
    assert list(listing(tmp_path)) == [name]


def test_what_does_not_fit_is_shown_and_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reap_driver.memory.host_memory import Free

    small = Free(10**9, "by a test")
    monkeypatch.setattr("reap_driver.memory.machine.free_host_memory", lambda: small)
    words = ("observe", CONFIGS / "kimi-k2.json", "--dry-run", "--tokens", "1M", "--device", "cpu")
    done = run(*words)
    assert done.code == 4
    assert "two layers most of it (68.2 GB), and 1.00 GB is free (by a test)" in done.error
    assert "1.03T parameters, 32.9B active" in done.out
    assert "1.03 TB fp8 (estimated)" in done.out
    error = run(*words, "--json").json["error"]
    assert (error["type"], error["exit_code"]) == ("ResourceError", 4)


USAGE = {
    "no tokens": (
        ("--dry-run",),
        "no data to plan for; give --tokens, or the --data to count them in",
    ),
    "tokens of a real run": (("--tokens", "9"), "--tokens: only with --dry-run"),
    "both": (("--dry-run", "--tokens", "9", "--data", "d"), "--tokens 9: not together with --data"),
    "not a number": (
        ("--dry-run", "--tokens", "1.5"),
        "--tokens 1.5: not a whole number such as 24M",
    ),
    "no output": (("--data", "d"), "the following arguments are required: --out"),
    "nothing": ((), "the following arguments are required: --out"),
    "stream": (("--stream", "perhaps"), "argument --stream: invalid choice: 'perhaps'"),
}


@pytest.mark.parametrize("command", ["observe", "prune"])
@pytest.mark.parametrize("case", USAGE)
def test_usage(run: Run, command: str, case: str) -> None:
    words, says = USAGE[case]
    done = run(command, "model", *words)
    assert done.code == 2
    assert done.err.startswith("usage: reap-kernels")
    assert says in " ".join(done.err.split())


def test_a_bad_configuration_file_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"model_type": "martian"}))
    done = run("observe", file, "--dry-run", "--tokens", 9)
    assert done.code == 3
    assert f"{file}: model_type 'martian'" in done.error
