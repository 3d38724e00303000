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
    assert 12 <= len(lines) <= 30
    assert max(map(len, lines)) <= 80
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
    assert "read        unknown: 13.8 GB; there are no weights here" in text
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
    facts = run(*words, "--json").json
    assert (facts["error"]["type"], facts["error"]["exit_code"]) == ("ResourceError", 4)
    assert facts["model"]["weight_bytes"] == pytest.approx(2.05e12, rel=0.01)
    assert facts["needs"]["streamed"]["host_bytes"] > facts["free"]["host_bytes"] == 10**9
    assert "decision" not in facts


USAGE = {
    "no tokens": (
        ("--dry-run",),
        "no data to plan for; give --tokens, or the --data to count them in",
    ),
    "a machine of a real run": (("--machine", "cpu"), "--machine: only with --dry-run"),
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


GIVEN = "2xH200-141GB,ram=1TB,disk=2GB/s,free=4TB,flops=400T,copy=50GB/s"


def test_a_machine_that_is_not_this_one(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its GPUs are ranks that share what it has; this machine's are not touched."""

    def touched(*_: object) -> None:
        raise AssertionError("CUDA was touched")

    for name in ("is_available", "mem_get_info", "_lazy_init", "get_device_capability"):
        monkeypatch.setattr(f"torch.cuda.{name}", touched)
    words = ("observe", CONFIGS / "qwen3-30b-a3b.json", "--dry-run", "--tokens", 24_000_001)
    words = (*words, "--device", "cuda", "--machine", GIVEN)
    done = run(*words, "--json").json
    assert done["machine"] == GIVEN
    assert done["free"] == {
        "device": "H200",
        "device_bytes": 141 * 10**9,
        "host_bytes": 5 * 10**11,
        "host_bound": "as `machine` says, a share of 2",
        "disk_bytes": 2 * 10**12,
        "ranks": 2,
    }
    assert (done["data"]["tokens"], done["data"]["tokens_per_rank"]) == (24_000_001, 12_000_001)
    assert not done["decision"]["stream"]
    # 61.06 GB from the disk and to the GPU; 6.27 G operations per token on each of two GPUs.
    found = done["forecast"]
    assert found["read_seconds"] == pytest.approx(61.06 / 2, rel=0.01)
    assert found["copy_seconds"] == pytest.approx(61.06 / 50, rel=0.01)
    assert found["compute_seconds"] == pytest.approx(12e6 * 6.267e9 / 400e12, rel=0.01)
    steps = (found[f"{step}_seconds"] for step in ("read", "copy", "compute"))
    assert found["seconds"] == pytest.approx(sum(steps))
    said = run(*words)
    assert max(map(len, said.out.splitlines())) <= 80
    text = " ".join(said.out.split())
    assert "ranks 2 processes (torchrun --nproc-per-node 2), each with a GPU" in text
    assert "one of them, with 12,000,001 tokens" in text
    assert "free H200 141 GB; host 500 GB as --machine says, a share of 2; disk 2.00 TB" in text
    assert "read 0:31: 61.1 GB at 2.00 GB/s (as --machine says); each rank reads all of it" in text


def test_what_is_not_given_is_unknown(run: Run) -> None:
    words = ("observe", CONFIGS / "qwen3-30b-a3b.json", "--dry-run", "--tokens", "24M")
    text = " ".join(run(*words, "--machine", "H200-141GB").out.split())
    assert "host unknown (ram=SIZE in --machine would tell); disk unknown (free=SIZE in" in text
    assert "read unknown: 61.1 GB; disk=RATE in --machine would tell" in text
    assert "copy unknown: 61.1 GB; copy=RATE in --machine would tell" in text
    assert "compute unknown: 150 PFLOP; flops=RATE in --machine would tell" in text
    assert "in all unknown, as one of these is" in text
    done = run(*words, "--machine", "cpu,ram=64GB,flops=1T,disk=1GB/s", "--json").json
    assert (done["decision"]["stream"], done["decision"]["offload"]) == (True, "file")
    assert done["rates"]["unknown"] == {}
    found = done["forecast"]
    # States of 4 kB are written and read back in each of 48 layers.
    assert found["spill_bytes"] == 2 * 48 * 24_000_000 * 4096
    assert found["seconds"] == pytest.approx(24e6 * 6.267e9 / 1e12, rel=0.01)


@pytest.mark.parametrize("command", ["observe", "prune"])
def test_a_device_that_is_not_here(run: Run, command: str) -> None:
    words = (CONFIGS / "qwen3-30b-a3b.json", "--dry-run", "--tokens", 9, "--device", "cuda:77")
    done = run(command, *words)
    assert done.code == 3
    assert "--device cuda:77: not there" in done.error
    assert done.error.endswith("--machine plans for a machine that is not this one")


def test_data_that_cannot_be_read_end_it_after_the_arithmetic(run: Run, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("no JSON\n")
    words = ("observe", CONFIGS / "olmoe-1b-7b.json", "--dry-run", "--data", data)
    done = run(*words, "--machine", "cpu,ram=64GB")
    assert done.code == 3
    names = [line[:12].strip() for line in done.out.splitlines()]
    kept = ["model", "in bfloat16", "on disk", "data", "resident", "streamed", "free"]
    assert [name for name in names if name] == kept
    assert "data        unknown; what follows is for one sequence of 2048 tokens" in done.out
    facts = run(*words, "--json").json
    assert facts["model"]["parameters"] == 6_919_161_856
    assert facts["checkpoint"]["origin"] == "estimated"
    assert facts["error"]["exit_code"] == 3
    assert "data" not in facts


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quant_method": "hqq", "bits": 4}, "stored by HQQ, which is not read"),
        (None, "has no weight_map; restore the file"),
    ],
)
def test_weights_that_cannot_be_read_end_it_after_the_arithmetic(
    run: Run, tmp_path: Path, settings: dict[str, object] | None, says: str
) -> None:
    config = json.loads((CONFIGS / "olmoe-1b-7b.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(config | ({"quantization_config": settings} if settings else {}))
    )
    if settings is None:
        (tmp_path / "model.safetensors.index.json").write_text("{}")
        (tmp_path / "model-1.safetensors").write_text("")
    done = run("observe", tmp_path, "--dry-run", "--tokens", "1M", "--machine", "cpu")
    assert done.code == 3
    assert says in done.error
    assert "1,000,000 tokens, sequences of 2048" in done.out
    assert "resident    host 1" in done.out
    assert "on disk" not in done.out


def test_weights_of_which_the_rate_cannot_be_measured(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("reap_driver.memory.rates.disk_rate", unreadable)
    done = run("observe", model, "--dry-run", "--tokens", 9)
    assert done.code == 0
    text = " ".join(done.out.split())
    assert "safetensors cannot be read (Input/output error)" in text
    assert "in all unknown, as one of these is" in text
