"""What can happen to one tensor of the source, and to tensors whose keys number their expert.

An action is decided by keys.py and carried out by stream.py. Experts that are stored one by one
have keys `<prefix><i>.<leaf>`, one or more tensors per expert, which are copied, renamed or dropped
together.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reap_kernels.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Copy:
    """The same bytes, under the same or (a renumbered expert) another name."""

    name: str


@dataclass(frozen=True, slots=True)
class Drop:
    """Not written.

    Attributes:
        reason: "expert" (removed by the plan) or "mtp" (in a multi-token-prediction layer).
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Select:
    """Rows of dimension `dim` are kept, in ascending order.

    `rows` holds one tuple per equal part of dimension 0; more than one only where a tensor
    stacks several layers there, each with its own experts.
    """

    name: str
    dim: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class SelectCodes:
    """Codes of `bits` bits, packed along `dim` into 32-bit words from the lowest bits on. Those at
    `positions` are kept, in that order, and packed again; unused bits are zero.

    A code may extend over two words, for instance one of 3 bits.
    """

    name: str
    dim: int
    bits: int
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SetLength:
    """The values are the shape of a matrix that loses rows: the one at `index` is `before` in the
    source and becomes `after`.
    """

    name: str
    index: int
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Relabel:
    """The values are expert ids, one row per token. Kept ids get their new number, and each removed
    id is replaced by that of a kept expert.
    """

    name: str
    kept: tuple[int, ...]
    num_experts: int


@dataclass(frozen=True, slots=True)
class Compute:
    """The values are new, and computed when everything else is written; see new_experts.py."""

    name: str
    shape: tuple[int, ...]


Action = Copy | Drop | Select | SelectCodes | SetLength | Relabel | Compute


@dataclass
class ExpertList:
    """The keys with one prefix, `<prefix><i>.<leaf>`."""

    layers: tuple[str, ...]  # layers whose experts the list numbers, one layer after another
    keys: dict[str, int] = field(default_factory=dict)  # key -> i
    tail: int = 0  # elements that may follow the experts (identity experts)

    def renumber(
        self, prefix: str, kept: Sequence[tuple[int, ...]], before: Sequence[int], where: object
    ) -> dict[str, Action]:
        """Actions for every key.

        Args:
            prefix: what the keys begin with.
            kept: kept ids of each of `layers`.
            before: experts of each of `layers`.
            where: names the checkpoint in an error.

        Raises:
            CheckpointError: an expert is missing, or there are more than the config says.
        """
        total = sum(before)
        found = set(self.keys.values())
        missing = sorted(set(range(total)) - found)
        extra = sorted(index for index in found if index >= total + self.tail)
        if missing or extra:
            index, what = (missing[0], "missing") if missing else (extra[0], "present")
            raise CheckpointError(
                f"{where}: {prefix}{index} is {what}, though config.json says {total} experts: the "
                "files are incomplete, of another config.json, or number their experts in a layout "
                "that is not read; use config.json and all weights of one release."
            )
        first = itertools.accumulate(before, initial=0)
        stays = [start + old for start, ids in zip(first, kept, strict=False) for old in ids]
        stays += range(total, total + self.tail)
        number = {old: rank for rank, old in enumerate(stays)}
        actions: dict[str, Action] = {}
        for key, index in self.keys.items():
            leaf = key[len(prefix) :].partition(".")[2]
            actions[key] = (
                Copy(f"{prefix}{number[index]}.{leaf}") if index in number else Drop("expert")
            )
        return actions


def list_prefixes(key: str) -> Iterator[tuple[str, int]]:
    """Prefix and number of every integer segment that another segment follows, last first.

    (`a.3.experts.`, 17) then (`a.`, 3) for `a.3.experts.17.w`.
    """
    path = key.split(".")
    for position in range(len(path) - 2, 0, -1):
        if path[position].isdigit():
            yield ".".join(path[:position]) + ".", int(path[position])


def split_layer(key: str) -> tuple[str, str]:
    """(`model.layers.3.`, `mlp.gate.weight`): a key divided after its first integer segment."""
    path = key.split(".")
    for position, part in enumerate(path[:-1]):
        if part.isdigit():
            return ".".join(path[: position + 1]) + ".", ".".join(path[position + 1 :])
    return "", key
