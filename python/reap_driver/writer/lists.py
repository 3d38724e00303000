"""Per-expert keys on disk, `<prefix><i>.<leaf>`: one or more tensors for each expert, moved as a
unit.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from reap_driver.writer.actions import Action, Copy, Drop
from reap_kernels.errors import CheckpointError


@dataclass
class ExpertList:
    """The keys below one prefix."""

    layers: tuple[str, ...]  # layers numbered through this list, one after another
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
    """Every integer segment that has something after it, last first.

    (`a.3.experts.`, 17) then (`a.`, 3) for `a.3.experts.17.w`.
    """
    path = key.split(".")
    for position in range(len(path) - 2, 0, -1):
        if path[position].isdigit():
            yield ".".join(path[:position]) + ".", int(path[position])


def split_layer(key: str) -> tuple[str, str]:
    """(`model.layers.3.`, `mlp.gate.weight`): a key cut behind its first integer segment."""
    path = key.split(".")
    for position, part in enumerate(path[:-1]):
        if part.isdigit():
            return ".".join(path[: position + 1]) + ".", ".".join(path[position + 1 :])
    return "", key
