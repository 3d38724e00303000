"""Profiles the requests to a vLLM server, masks experts there, and serves the pruned checkpoint.

    python examples/live/story.py OUT [OPTIONS OF vllm serve]

It serves the bundled model, on a CPU in a few minutes; the requests are text of Python's own
library. Statistics, the plan, the pruned checkpoint and the servers' logs are left in OUT. vLLM and
reap-kernels have to be installed in one environment, so that vLLM finds our plugin. Ctrl-C ends the
server, too.
"""

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import reap_driver as rd
from reap_driver.demo.corpus import load_corpus
from reap_driver.integrations.vllm.client import Server

MODEL = Path(rd.__file__).parent / "demo" / "model"
GROUPS = ("code", "docstrings")
OPTIONS = ["--served-model-name=demo", "--dtype=float32", "--max-model-len=512", "--host=127.0.0.1"]
# All other options are vLLM's own; the variable for CPUs is the size of the cache in GiB.
ENVIRONMENT = {"VLLM_PLUGINS": "reap", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextlib.contextmanager
def served(model: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """A vLLM server of a checkpoint, with the plugin; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, *OPTIONS, f"--port={port}", *options],
            env={**os.environ, **ENVIRONMENT},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for this program, which then ends the server
        )
    try:
        server = Server(f"http://127.0.0.1:{port}")
        wait_for(server.url, process, log)
        yield server
    finally:
        process.terminate()
        # A second Ctrl-C does not wait for it.
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):  # what is left of its processes
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Returns when the server answers."""
    print(f"serving at {url} (log: {log}) ...")
    while True:
        if process.poll() is not None:
            sys.exit(f"vLLM has ended with {process.returncode}; its log is {log}")
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(1)


def complete(server: Server, prompt: str, group: str = "", **options: object) -> dict:
    """What the server answers to a prompt; its tokens count for the group."""
    headers = {"Content-Type": "application/json"}
    if group:
        headers["X-Reap-Group"] = group
    body = {"model": "demo", "prompt": prompt, "temperature": 0, **options}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]


def log_probabilities(server: Server, texts: list[str]) -> list[float]:
    """Of each token of the texts but the first of each, in nats."""
    found = []
    for text in texts:
        answer = complete(server, text, max_tokens=1, prompt_logprobs=0)
        tokens = [token for token in answer["prompt_logprobs"] if token]
        found += [next(iter(token.values()))["logprob"] for token in tokens]
    return found


def perplexity(values: list[float]) -> float:
    return math.exp(-sum(values) / len(values))


def pieces(split: str, group: str, number: int) -> list[str]:
    """Texts of 400 characters, from the bundled model's calibration or held-out split."""
    text = "".join(d.text for d in load_corpus((split,)) if d.domain == group)
    step = max(400, len(text) // number)
    return [text[start : start + 400] for start in range(0, len(text) - 400, step)][:number]


def main(out: Path, options: Sequence[str]) -> None:
    if (out / "pruned").exists():
        sys.exit(f"{out / 'pruned'} is there already; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    held_out = [text for group in GROUPS for text in pieces("held_out", group, 12)]

    with served(MODEL, out / "server.log", options) as server:
        server.start(groups=GROUPS)
        for group in GROUPS:
            for text in pieces("calibration", group, 40):
                complete(server, text, group, max_tokens=8)
        print("tokens counted:", server.stop()["groups"])

        server.stats(out / "stats.safetensors")
        plan = server.plan(ratio=0.25)
        plan.save(out / "plan.json")

        whole = log_probabilities(server, held_out)
        server.mask(plan)
        masked = log_probabilities(server, held_out)
        print("masked:", server.status()["mask"])
    print(f"perplexity: {perplexity(whole):.2f} whole, {perplexity(masked):.2f} masked")

    rd.apply_plan(MODEL, plan, out / "pruned")
    with served(out / "pruned", out / "pruned.log", options) as server:
        pruned = log_probabilities(server, held_out)
    worst = max(abs(a - b) for a, b in zip(masked, pruned, strict=True))
    print(f"perplexity: {perplexity(pruned):.2f} of the pruned checkpoint")
    print(f"{len(pruned)} log-probabilities differ from the masked server's by {worst:.1e} at most")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `served` ends the server
    try:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else "live"), sys.argv[2:])
    except KeyboardInterrupt:
        sys.exit(130)
