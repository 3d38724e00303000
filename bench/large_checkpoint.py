"""A checkpoint larger than memory: observed within 8 GB, killed, resumed, and pruned within 2 GB.

The checkpoint has the layer shape of Qwen3-30B-A3B, 24 layers, and random bf16 weights (29 GB), and
is written layer by layer. The command line observes 8 x 512 tokens in a control group limited to
8 GB, is killed (SIGKILL) after a layer, and resumes; `plan` and `apply` then run in one limited to
2 GB. The page cache counts against the limits, as in any container. Memory is the sampled peak of
anonymous pages, and the peak that the group reports.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

from bench import rows

LAYERS, SEQUENCES, LENGTH = 24, 8, 512
OBSERVE_BYTES, PRUNE_BYTES = 8 * 10**9, 2 * 10**9
_ROOT = Path("/sys/fs/cgroup")


def config(layers: int, scale: int) -> Qwen3MoeConfig:
    """The configuration of Qwen3-30B-A3B; `scale` divides every width, to test this script."""
    return Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"],
        vocab_size=151936 // scale,
        hidden_size=2048 // scale,
        moe_intermediate_size=768 // scale,
        intermediate_size=6144 // scale,
        num_hidden_layers=layers,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32 // scale,
        num_key_value_heads=max(1, 4 // scale),
        head_dim=128,
        norm_topk_prob=True,
        max_position_embeddings=40960,
        eos_token_id=0,
        dtype="bfloat16",
    )


def make(folder: Path, layers: int, scale: int) -> None:
    """Writes the checkpoint, one shard per layer, with the published key names."""
    folder.mkdir(parents=True)
    made = config(layers, scale)
    (folder / "config.json").write_text(json.dumps(made.to_diff_dict(), indent=2) + "\n")
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number in range(-1, layers):
        shard = f"model-{number + 2:05}-of-{layers + 1:05}.safetensors"
        shapes = _outside(made) if number < 0 else _layer(made, number)
        save_file({k: _random(s, generator) for k, s in shapes.items()}, folder / shard)
        weight_map.update(dict.fromkeys(shapes, shard))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _outside(made: Qwen3MoeConfig) -> dict[str, tuple[int, ...]]:
    table = (made.vocab_size, made.hidden_size)
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": table,
        "model.norm.weight": (made.hidden_size,),
    }


def _layer(made: Qwen3MoeConfig, number: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = made.hidden_size, made.moe_intermediate_size
    heads, groups = made.num_attention_heads * 128, made.num_key_value_heads * 128
    name = f"model.layers.{number}"
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.input_layernorm.weight": (hidden,),
        f"{name}.post_attention_layernorm.weight": (hidden,),
        f"{name}.self_attn.q_norm.weight": (128,),
        f"{name}.self_attn.k_norm.weight": (128,),
        f"{name}.self_attn.q_proj.weight": (heads, hidden),
        f"{name}.self_attn.k_proj.weight": (groups, hidden),
        f"{name}.self_attn.v_proj.weight": (groups, hidden),
        f"{name}.self_attn.o_proj.weight": (hidden, heads),
        f"{name}.mlp.gate.weight": (made.num_experts, hidden),
    }
    for expert in range(made.num_experts):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            shape = (hidden, inner) if leaf == "down_proj" else (inner, hidden)
            shapes[f"{name}.mlp.experts.{expert}.{leaf}.weight"] = shape
    return shapes


def _random(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Random weights of about unit gain; norm weights are about one."""
    if len(shape) == 1:
        return (1 + 0.1 * torch.rand(shape, generator=generator)).bfloat16()
    return torch.empty(shape).uniform_(-1, 1, generator=generator).mul_(shape[1] ** -0.5).bfloat16()


@dataclass
class Watched:
    """A command that ran in a control group: its time and memory."""

    seconds: float = 0.0
    anonymous: int = 0
    group: int = 0
    read: int = 0
    out: list[str] = field(default_factory=list)


@contextlib.contextmanager
def capped(limit: int) -> Iterator[Path]:
    """A control group of `limit` bytes, version 1 or 2.

    Raises:
        SystemExit: no control group can be created here.
    """
    old = (_ROOT / "memory").is_dir()
    folder = (_ROOT / "memory" if old else _ROOT) / f"reap-bench-{os.getpid()}"
    try:
        folder.mkdir()
        limits = folder / ("memory.limit_in_bytes" if old else "memory.max")
        limits.write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"no control group can be made here ({error}); run as root") from error
    try:
        yield folder
    finally:
        _remove(folder)


def _remove(group: Path) -> None:
    """Removes a control group; waits until the system has noticed that its processes ended."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


def run(words: list[str], limit: int, kill_behind: tuple[Path, int] | None = None) -> Watched:
    """Runs the command line in a group; kills it once its journal reaches a position, if given."""
    found, began = Watched(), time.perf_counter()
    with capped(limit) as group:
        process = subprocess.Popen(
            [sys.executable, "-m", "reap_driver", *words],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )
        while process.poll() is None:
            _sample(process.pid, group, found)
            if kill_behind is not None and _position(kill_behind[0]) >= kill_behind[1]:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.05)
        assert process.stdout is not None
        found.out = process.stdout.read().splitlines()
    found.seconds = time.perf_counter() - began
    wanted = -signal.SIGKILL if kill_behind is not None else 0
    if process.returncode != wanted:
        raise SystemExit(f"{words[0]} ended with {process.returncode}, {wanted} expected")
    return found


def _sample(pid: int, group: Path, found: Watched) -> None:
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        _, there, rest = status.partition("RssAnon:")
        if not there:  # it has just ended
            return
        found.anonymous = max(found.anonymous, int(rest.split()[0]) * 1024)
        found.read = int(Path(f"/proc/{pid}/io").read_text().split()[1])
        for name in ("memory.max_usage_in_bytes", "memory.peak"):
            if (group / name).is_file():
                found.group = int((group / name).read_text())


def _position(journal: Path) -> int:
    try:
        return int(json.loads((journal / "journal.json").read_text())["position"])
    except (OSError, ValueError):
        return -1


def measure(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Observes, kills, resumes, plans and prunes; one row."""
    made = config(options.layers, options.scale)
    data = folder.parent / "data.jsonl"
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, made.vocab_size, (SEQUENCES * LENGTH,), generator=generator)
    data.write_text(json.dumps({"input_ids": ids.tolist()}) + "\n")
    stats, plan, out = (folder.parent / n for n in ("stats.safetensors", "plan.json", "pruned"))
    words = ["observe", str(folder), "--data", str(data), "--seq-len", str(LENGTH)]
    words += ["--out", str(stats), "--json", "--overwrite"]
    journal = stats.with_name(stats.name + ".journal")
    killed = run(words, options.observe_bytes, (journal, options.layers // 3))
    position = _position(journal)
    resumed = run([*words, "--resume"], options.observe_bytes)
    run(["plan", str(stats), "--ratio", "0.5", "--out", str(plan), "--overwrite"], PRUNE_BYTES)
    pruned = run(["apply", str(folder), str(plan), "--out", str(out), "--overwrite"], PRUNE_BYTES)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    facts = json.loads(resumed.out[-1])
    return {
        "layers": options.layers,
        "scale": options.scale,
        "checkpoint_gb": f"{size / 1e9:.2f}",
        "tokens": facts["tokens"],
        "observe_limit_gb": options.observe_bytes / 1e9,
        "killed_behind_layer": position,
        "killed_s": f"{killed.seconds:.1f}",
        "resumed_s": f"{resumed.seconds:.1f}",
        "observe_anonymous_gb": f"{max(killed.anonymous, resumed.anonymous) / 1e9:.2f}",
        "observe_group_gb": f"{max(killed.group, resumed.group) / 1e9:.2f}",
        "read_gb": f"{(killed.read + resumed.read) / 1e9:.2f}",
        "prune_limit_gb": PRUNE_BYTES / 1e9,
        "prune_s": f"{pruned.seconds:.1f}",
        "prune_anonymous_gb": f"{pruned.anonymous / 1e9:.2f}",
        "written_gb": f"{sum(f.stat().st_size for f in out.glob('*.safetensors')) / 1e9:.2f}",
    }


def main(arguments: list[str]) -> None:
    """Makes the checkpoint if it does not exist, runs, and appends one row."""
    parser = argparse.ArgumentParser(prog="python -m bench large_checkpoint", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="46 GB are free there")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--scale", type=int, default=1, help="divides every width")
    parser.add_argument("--observe-bytes", type=int, default=OBSERVE_BYTES)
    parser.add_argument("--keep", action="store_true", help="keep the checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="print the row, do not append it")
    options = parser.parse_args(arguments)
    folder = options.folder / "model"
    try:
        if not folder.is_dir():
            make(folder, options.layers, options.scale)
        row = measure(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(options.folder, ignore_errors=True)
    if options.dry_run:
        print(row)
    else:
        rows.write("large_checkpoint", [row])
