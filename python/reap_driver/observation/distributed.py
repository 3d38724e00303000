"""Data parallel: several processes, started by torchrun, each observe a share of the batches.

    torchrun --nproc-per-node 4 -m reap_driver observe ...

torch.distributed does all of it. Statistics are small and live on the CPU when they are read, so
they travel over gloo whatever device a rank computes on. Nothing else is exchanged: every rank
holds the whole model (for one that is spread over ranks, see `adapters/expert_parallel.py`).
"""

import contextlib
import datetime
import graphlib
import itertools
import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import BackendUnavailable, DataError

# What torchrun tells a process, and init_process_group reads.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# How long a rank waits for the others. They finish a batch apart, but loading may skew them by much
# more than gloo's own 30 minutes.
_PATIENCE = datetime.timedelta(hours=2)

# Seconds a rank that lost another stays silent. torchrun ends it within one; only the rank that
# failed has something to say, and torchrun takes the first to exit for the cause.
_SILENCE = 20.0


@dataclass(frozen=True)
class Ranks:
    """The processes that observe together, as one of them sees them; `ranks()` makes it.

    Attributes:
        rank: this process, 0 to size - 1; 0 gets what is merged, and writes files.
        size: how many processes there are; 1 without torchrun.
        local_rank: this process among those of its machine: the index of its GPU.
        local_size: how many of them are on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _group: "dist.ProcessGroup | None" = field(default=None, repr=False, compare=False)

    def share(self, n: int) -> range:
        """Indices of this rank's batches among `n`: rank, rank + size, ...

        Every batch keeps the composition it has in one process; a rank may have none.
        """
        return range(self.rank, n, self.size)

    def merged(self, stats: SaliencyStats) -> SaliencyStats | None:
        """Statistics of all ranks as one observation: on rank 0; None on the others.

        Every rank must call it, at the same point. Counts are exact; sums are added in the order
        of ranks, so the same run gives the same bits. Provenance is rank 0's, except for what the
        ranks know in part: `backend`, `layers`, `stacks` and `unobserved`. Not for one model spread
        over the ranks, whose statistics are whole on each of them already.

        Args:
            stats: what this rank observed, on any device; layers may be missing that no token
                reached here.

        Raises:
            DataError: on every rank, the ranks observed different models or have different groups;
                or another rank ended before it gave its statistics.
        """
        if self.size == 1:
            return stats
        headers = [json.loads(text) for text in self._all(json.dumps(_header(stats)).encode())]
        _check_same(headers)
        parts = self._to_first(_bytes_of(stats), [header["bytes"] for header in headers])
        if parts is None:
            return None
        layers: dict[str, LayerStats] = {}
        for header, part in zip(headers, parts, strict=True):
            for name, layer in _layers_of(header, part).items():
                layers[name] = layers[name].merge_(layer) if name in layers else layer
        return _whole(layers, headers, stats.provenance)

    def of_first(self, text: str) -> str:
        """The text of rank 0, on every rank; every rank must call it, at the same point."""
        return text if self.size == 1 else self._all(text.encode())[0].decode()

    def barrier(self) -> None:
        """Returns when every rank has called it.

        Raises:
            DataError: another rank ended before.
        """
        if self.size > 1:
            with self._together():
                dist.barrier(group=self._group)

    def _all(self, data: bytes) -> list[bytes]:
        """`data` of every rank, on every rank, in their order."""
        own = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        with self._together():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
            dist.all_gather(sizes, torch.tensor([len(own)]), group=self._group)
            lengths = [int(size) for size in sizes]
            texts = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
            dist.all_gather(texts, _padded(own, max(lengths)), group=self._group)
        return [
            text[:length].numpy().tobytes() for text, length in zip(texts, lengths, strict=True)
        ]

    def _to_first(self, own: Tensor, lengths: Sequence[int]) -> list[Tensor] | None:
        """The uint8 tensor of every rank, of `lengths` bytes, on rank 0 in their order."""
        longest, first = max(lengths), self.rank == 0
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths] if first else None
        with self._together():
            dist.gather(_padded(own, longest), parts, group=self._group, group_dst=0)
        if parts is None:
            return None
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around a collective: what is said, and when, if another rank has gone."""
        try:
            yield
        except RuntimeError as error:
            if dist.is_torchelastic_launched():
                time.sleep(_SILENCE)
            raise DataError(
                f"rank {self.rank} of {self.size} waits for ranks that have ended or cannot be "
                f"reached ({str(error).splitlines()[0][:120]}); the rank that failed says why: "
                "look for its message above"
            ) from error


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes torchrun started, connected inside the context; without torchrun, one.

    A process group that exists already is left as it is; ours is made beside it.

    Raises:
        DataError: RANK and WORLD_SIZE are set, other variables that torchrun sets are not, or are
            no such numbers; or the ranks cannot reach each other.
        BackendUnavailable: this torch is built without torch.distributed or gloo.
    """
    if dist.is_available() and dist.is_initialized():
        group = dist.new_group(timeout=_PATIENCE, backend="gloo")
        local = dist.get_node_local_rank(fallback_rank=dist.get_rank())
        try:
            here = _number("LOCAL_WORLD_SIZE", dist.get_world_size(group))
            yield Ranks(dist.get_rank(), dist.get_world_size(), local, here, group)
        finally:
            dist.destroy_process_group(group)
    elif "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        known = _launch()
        _connect()
        try:
            size = known["WORLD_SIZE"]
            here = _number("LOCAL_WORLD_SIZE", size)
            yield Ranks(known["RANK"], size, known["LOCAL_RANK"], here)
        finally:
            dist.destroy_process_group()
    else:
        yield Ranks()


def _launch() -> dict[str, int]:
    """The numbers of a complete environment."""
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise DataError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are set, "
            f"{', '.join(missing)} not; start all ranks with `torchrun --nproc-per-node N -m "
            "reap_driver ...`, or unset them to run in one process"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise BackendUnavailable(
            f"torch {torch.__version__} is built without torch.distributed over gloo, so it cannot "
            f"serve WORLD_SIZE={os.environ['WORLD_SIZE']}; unset it, or install another torch"
        )
    known = {name: _number(name) for name in _VARIABLES if name != "MASTER_ADDR"}
    _number("LOCAL_WORLD_SIZE", 1)
    for name, limit in (
        ("RANK", known["WORLD_SIZE"]),
        ("LOCAL_RANK", known["WORLD_SIZE"]),
        ("MASTER_PORT", 1 << 16),
    ):
        if known[name] >= limit:
            raise DataError(
                f"{name}={known[name]} with WORLD_SIZE={known['WORLD_SIZE']}: must be below "
                f"{limit}; start all ranks with torchrun, which sets both"
            )
    return known


def _number(name: str, default: int | None = None) -> int:
    """A variable that is a whole number from 0, or from 1 where it counts something."""
    text = os.environ.get(name, "" if default is None else str(default))
    least = int(name.endswith("SIZE"))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise DataError(
            f"{name}={text!r}: is no whole number from {least}; start all ranks with torchrun, "
            "which sets it, or unset RANK and WORLD_SIZE to run in one process"
        )
    return int(text)


def _connect() -> None:
    """Joins the other ranks."""
    try:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DataError(
            f"MASTER_ADDR:MASTER_PORT={address}: the ranks cannot meet there ({reason}); start all "
            "of them with torchrun, which chooses both"
        ) from error


def _header(stats: SaliencyStats) -> dict[str, Any]:
    """What the others must know of a rank's statistics."""
    facts = stats.provenance
    return {
        "groups": stats.groups,
        "experts": {name: layer.num_experts for name, layer in stats.layers.items()},
        "bytes": sum(t.nbytes for layer in stats.layers.values() for t in layer.packed()),
        "model": facts.get("model", {}).get("config_digest"),
        "layers": facts.get("layers", {}),
        "unobserved": facts.get("unobserved", []),
        "stacks": facts.get("stacks", {}),
        "backend": facts.get("backend", ""),
    }


def _check_same(headers: Sequence[Mapping[str, Any]]) -> None:
    """Raises DataError unless all ranks observed one model under the same groups."""
    for key, remedy in (
        ("model", "give every rank the same model"),
        ("groups", "enter every group on every rank, in the same order, also without batches"),
    ):
        for rank, header in enumerate(headers):
            if header[key] != headers[0][key]:
                raise DataError(
                    f"cannot merge statistics of {len(headers)} ranks: {key} is "
                    f"{headers[0][key]!r} on rank 0 and {header[key]!r} on rank {rank}; {remedy}"
                )


def _bytes_of(stats: SaliencyStats) -> Tensor:
    """All statistics, layer by layer, as uint8 [bytes] on the CPU."""
    tensors = [tensor for layer in stats.layers.values() for tensor in layer.packed()]
    flat = [tensor.cpu().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8)


def _layers_of(header: Mapping[str, Any], data: Tensor) -> dict[str, LayerStats]:
    """The inverse of `_bytes_of`."""
    layers, at = {}, 0
    for name, experts in header["experts"].items():
        layers[name] = LayerStats(experts, len(header["groups"]))
        for tensor in layers[name].packed():
            tensor.view(-1).view(torch.uint8).copy_(data[at : at + tensor.nbytes])
            at += tensor.nbytes
    return layers


def _padded(data: Tensor, length: int) -> Tensor:
    """`data` followed by zeros: collectives take tensors of one size."""
    return torch.cat([data, data.new_zeros(length - len(data))])


def _whole(
    layers: Mapping[str, LayerStats],
    headers: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> SaliencyStats:
    """Merged layers in the model's order, with what the ranks know in part put together."""
    names = _in_order([chain for h in headers for chain in ([*h["experts"]], h["unobserved"])])
    reached = {name for name, layer in layers.items() if int(layer.tokens.sum())}
    # As for one process: a layer nobody reached has no scores, unless nothing was observed at all.
    kept = [name for name in names if name in (reached or layers)]
    facts = {name: known for header in headers for name, known in header["layers"].items()}
    served = {name for h in headers for name in h["backend"].split("+") if name}
    whole = {
        **{k: v for k, v in provenance.items() if k not in ("unobserved", "stacks")},
        "layers": {name: facts[name] for name in kept if name in facts},
        "backend": "+".join(sorted(served)),
    }
    unobserved = [name for name in names if name not in kept]
    if unobserved:
        stacks: dict[str, list[str]] = next((h["stacks"] for h in headers if h["stacks"]), {})
        whole |= {"stacks": stacks} if stacks else {}
        whole["unobserved"] = unobserved
    return SaliencyStats({name: layers[name] for name in kept}, headers[0]["groups"], whole)


def _in_order(chains: Sequence[Sequence[str]]) -> list[str]:
    """All names of chains that are each in the model's order, in that order."""
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for chain in chains:
        for name in chain:
            order.add(name)
        for before, after in itertools.pairwise(chain):
            order.add(after, before)
    return list(order.static_order())
