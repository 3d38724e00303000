"""Data parallelism: several processes, started by torchrun, each observe a share of the batches.

    torchrun --nproc-per-node 4 -m reap_driver observe ...

Statistics are small and on the CPU when they are merged, so they are exchanged with
torch.distributed over gloo, whatever device a rank runs on. Nothing else is exchanged: every rank
holds the whole model (for expert parallelism, see `model/adapters/expert_parallel.py`).
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

# Environment variables that torchrun sets and init_process_group reads.
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# Timeout of a rank that waits for the others. They finish within a batch of each other, but their
# loading times may differ by much more than gloo's default of 30 minutes.
_TIMEOUT = datetime.timedelta(hours=2)

# Elements of a tensor that the ranks send at a time.
_PIECE = 1 << 22

# Seconds that a rank which lost another waits before it fails. torchrun reports the first rank that
# exits as the cause, which should be the one that failed, and ends the others within a second.
_EXIT_DELAY = 20.0


@dataclass(frozen=True)
class Ranks:
    """The group of processes that observe together, made by `ranks()`.

    Attributes:
        rank: index of this process, 0 to size - 1; rank 0 gets the merged result and writes files.
        size: number of processes; 1 without torchrun.
        local_rank: index of this process on its machine, which is the index of its GPU.
        local_size: number of processes on its machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _group: "dist.ProcessGroup | None" = field(default=None, repr=False, compare=False)

    def share(self, n: int) -> range:
        """Indices of this rank's batches among `n`: rank, rank + size, ...

        Every batch has the same composition as in a single process; a rank may have no batch.
        """
        return range(self.rank, n, self.size)

    def merged(self, stats: SaliencyStats) -> SaliencyStats | None:
        """The statistics of all ranks merged, on rank 0; None on the other ranks.

        A collective operation: every rank must call it. Counts are exact. Sums are added in the
        order of ranks, so repeated runs are bitwise identical. The provenance is that of rank 0,
        except for `backend`, `layers`, `stacks` and `unobserved`, which combine all ranks'. Not
        for expert parallelism, where every rank already has the complete statistics.

        Args:
            stats: statistics of this rank, on any device; layers that no token reached on this
                rank may be missing.

        Raises:
            DataError: on every rank: the ranks observed different models or have different groups;
                or another rank ended early.
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

    def added(self, own: Tensor) -> Tensor | None:
        """The sum of a tensor of every rank, in their order, on rank 0; None on the other ranks.

        A collective operation. The tensors, on the CPU, have one shape and dtype. They are sent in
        pieces, so that rank 0 holds its own and the sum beside a piece of every rank.
        """
        flat = own.contiguous().view(-1)
        whole = torch.empty_like(flat) if self.rank == 0 else None
        for at in range(0, len(flat), _PIECE):
            piece = flat[at : at + _PIECE].view(torch.uint8)
            parts = self._to_first(piece, [len(piece)] * self.size)
            if parts is not None and whole is not None:
                target = whole[at : at + _PIECE].copy_(parts[0].view(own.dtype))
                for part in parts[1:]:
                    target.add_(part.view(own.dtype))
        return None if whole is None else whole.view(own.shape)

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replaces tensors, on any device, by their sums over all ranks, the same bits on every
        rank. A collective operation: the ranks give tensors of the same shapes and dtypes.
        """
        if self.size == 1:
            return
        for tensor in tensors:
            own = tensor.detach().to("cpu").contiguous()
            whole = self.added(own)
            whole = torch.empty_like(own) if whole is None else whole
            with self._together():
                dist.broadcast(whole, group=self._group, group_src=0)
            tensor.copy_(whole)

    def texts(self, text: str) -> list[str]:
        """The text of every rank, none empty, in their order, on every rank. A collective
        operation.
        """
        return [text] if self.size == 1 else [t.decode() for t in self._all(text.encode())]

    def of_first(self, text: str) -> str:
        """The text of rank 0, on every rank. A collective operation."""
        return self.texts(text)[0]

    def barrier(self) -> None:
        """Returns when every rank has called it.

        Raises:
            DataError: another rank ended early.
        """
        if self.size > 1:
            with self._together():
                dist.barrier(group=self._group)

    def _all(self, data: bytes) -> list[bytes]:
        """The `data` of every rank, in their order, on every rank."""
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
        """The uint8 tensors of every rank, in their order, on rank 0; None on the other ranks."""
        longest, first = max(lengths), self.rank == 0
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths] if first else None
        with self._together():
            dist.gather(_padded(own, longest), parts, group=self._group, group_dst=0)
        if parts is None:
            return None
        return [part[:length] for part, length in zip(parts, lengths, strict=True)]

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Around a collective operation: raises DataError if another rank has ended."""
        try:
            yield
        except RuntimeError as error:
            if dist.is_torchelastic_launched():
                time.sleep(_EXIT_DELAY)
            raise DataError(
                f"rank {self.rank} of {self.size} waits for ranks that have ended or cannot be "
                f"reached ({str(error).splitlines()[0][:120]}); the rank that failed says why: "
                "look for its message above"
            ) from error


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Connects the processes that torchrun started; without torchrun, one process.

    An existing default process group is left as it is; a separate group is made for gloo.

    Raises:
        DataError: RANK and WORLD_SIZE are set, but other variables of torchrun are missing or
            invalid; or the ranks cannot reach each other.
        BackendUnavailable: torch was built without torch.distributed or gloo.
    """
    if dist.is_available() and dist.is_initialized():
        group = dist.new_group(timeout=_TIMEOUT, backend="gloo")
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
    """The checked numbers among torchrun's environment variables."""
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise DataError(
            f"RANK={os.environ['RANK']} and WORLD_SIZE={os.environ['WORLD_SIZE']} are set, "
            f"but not {', '.join(missing)}; start all ranks with `torchrun --nproc-per-node N -m "
            "reap_driver ...`, or unset them to run in one process"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        raise BackendUnavailable(
            f"torch {torch.__version__} was built without torch.distributed or gloo, so it cannot "
            f"run with WORLD_SIZE={os.environ['WORLD_SIZE']}; unset it, or install another torch"
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
    """The value of a variable: an integer of at least 0, or at least 1 for a size."""
    text = os.environ.get(name, "" if default is None else str(default))
    least = int(name.endswith("SIZE"))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < least:
        raise DataError(
            f"{name}={text!r}: must be an integer of at least {least}; start all ranks with "
            "torchrun, which sets it, or unset RANK and WORLD_SIZE to run in one process"
        )
    return int(text)


def _connect() -> None:
    """Joins the other ranks."""
    try:
        dist.init_process_group("gloo", timeout=_TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise DataError(
            f"MASTER_ADDR:MASTER_PORT={address}: cannot connect the ranks there ({reason}); start "
            "all of them with torchrun, which sets both"
        ) from error


def _header(stats: SaliencyStats) -> dict[str, Any]:
    """The facts about a rank's statistics that the other ranks need."""
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
    """All statistics, layer by layer, as one uint8 tensor on the CPU."""
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
    """`data` padded with zeros, because collectives need tensors of equal size."""
    return torch.cat([data, data.new_zeros(length - len(data))])


def _whole(
    layers: Mapping[str, LayerStats],
    headers: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
) -> SaliencyStats:
    """The merged statistics, layers in the model's order, with the provenance of all ranks."""
    names = _in_order([chain for h in headers for chain in ([*h["experts"]], h["unobserved"])])
    reached = {name for name, layer in layers.items() if int(layer.tokens.sum())}
    # As in one process: layers that no token reached are left out, unless none was reached.
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
    """All names of several lists that are each in the model's order, in that order."""
    order: graphlib.TopologicalSorter[str] = graphlib.TopologicalSorter()
    for chain in chains:
        for name in chain:
            order.add(name)
        for before, after in itertools.pairwise(chain):
            order.add(after, before)
    return list(order.static_order())
