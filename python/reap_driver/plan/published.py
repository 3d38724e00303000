"""What the provenance of statistics and plans says, as people publish it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any


@dataclass(frozen=True)
class MixEntry:
    """One source of the calibration mix; None is what is not recorded.

    Attributes:
        group: the calibration group its statistics are kept under.
        source: where it is from, see `public_name`.
        records: records read.
        tokens: tokens the model saw.
        share: of all tokens of the mix.
        seq_len: tokens in a sequence.
        packing: how documents became sequences.
        digest: of the tokens.
    """

    group: str
    source: str
    records: int | None
    tokens: int | None
    share: float | None
    seq_len: int | None
    packing: str | None
    digest: str | None


def public_name(text: str) -> str:
    """A model's or a file's name; of an absolute path the last part, since reports and cards are
    published and where somebody keeps files is not.
    """
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() or text.startswith("~"):
            return path.name
    return text


def calibration_mix(data: Sequence[Mapping[str, Any]]) -> list[MixEntry]:
    """The sources of `provenance["data"]` with their shares, in the order they were observed."""
    total = sum(entry.get("tokens") or 0 for entry in data)
    return [
        MixEntry(
            group=str(entry.get("group", "")),
            source=public_name(str(entry.get("source", ""))),
            records=entry.get("records"),
            tokens=entry.get("tokens"),
            share=entry["tokens"] / total if entry.get("tokens") else None,
            seq_len=entry.get("seq_len"),
            packing=entry.get("packing"),
            digest=entry.get("digest"),
        )
        for entry in data
    ]


def gate_rule(provenance: Mapping[str, Any]) -> str:
    """Which gate weights were recorded."""
    gate = str(provenance.get("gate"))
    return "the model's own combine weights" if gate == "model" else gate
