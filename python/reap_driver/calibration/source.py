"""What `--data [group=]SOURCE[:N]` means.

SOURCE is a file (JSON lines, Parquet, text) or a folder of such files. N takes a random sample of N
records, drawn with the seed; they stay in the order of the file. The group is the name statistics
are kept under; by default that of the file or folder, without its ending.

A name that exists as written is taken as written, so `a=b.jsonl` and `part:7` can be read too.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from reap_kernels.errors import DataError


@dataclass(frozen=True)
class DataSource:
    """One `--data` argument: where records are, how many of them, for which group."""

    path: Path
    group: str
    samples: int | None = None

    @classmethod
    def parse(cls, text: str) -> "DataSource":
        """Reads `[group=]SOURCE[:N]`.

        Raises:
            DataError: nothing has that name, or N is 0.
        """
        if Path(text).exists():
            return cls(Path(text), _stem(Path(text)))
        named = re.fullmatch(r"([^=/\\]+)=(.+)", text)
        group, rest = (named[1], named[2]) if named else (None, text)
        if Path(rest).exists():
            return cls(Path(rest), group or _stem(Path(rest)))
        counted = re.fullmatch(r"(.+):(\d+)", rest)
        if counted is None or not Path(counted[1]).exists():
            missing = counted[1] if counted else rest
            raise DataError(
                f"data {text!r}: no file or folder {missing!r}; give [group=]PATH[:N] of a .jsonl, "
                ".parquet or .txt file, or of a folder of such files"
            )
        path, samples = Path(counted[1]), int(counted[2])
        if samples == 0:
            raise DataError(f"data {text!r}: takes 0 records; give a number above 0 after the ':'")
        return cls(path, group or _stem(path), samples)


def _stem(path: Path) -> str:
    """`code` for data/code.jsonl and for the folder data/code."""
    return path.resolve().stem
