"""Provenance of statistics and plans in the form that cards and reports publish."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from reap_driver.base.units import in_bytes, took


@dataclass(frozen=True)
class MixEntry:
    """One source of the calibration data; None where something is not recorded.

    Attributes:
        group: the calibration group that it belongs to.
        source: its name, see `public_name`.
        records: records read.
        tokens: tokens the model saw.
        counted: those of them that count in the statistics.
        share: of all tokens of the mix.
        seq_len: tokens in a sequence.
        packing: how documents became sequences.
        digest: of the tokens.
        chat_template: digest of the chat template that was given in place of the model's.
    """

    group: str
    source: str
    records: int | None
    tokens: int | None
    counted: int | None
    share: float | None
    seq_len: int | None
    packing: str | None
    digest: str | None
    chat_template: str | None


def public_name(text: str) -> str:
    """The name of a model or a file that can be published: of an absolute path only the last part.

    Example:
        >>> public_name("/home/someone/code.jsonl"), public_name("acme/tiny")
        ('code.jsonl', 'acme/tiny')
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
            counted=entry.get("counted_tokens"),
            share=entry["tokens"] / total if entry.get("tokens") else None,
            seq_len=entry.get("seq_len"),
            packing=entry.get("packing"),
            digest=entry.get("digest"),
            chat_template=entry.get("chat_template"),
        )
        for entry in data
    ]


def which_steps(every: int) -> str:
    """Which steps of a server are observed, in words.

    Example:
        >>> which_steps(1), which_steps(8)
        ('every step', 'one step in 8')
    """
    return "every step" if every == 1 else f"one step in {every}"


def live_mode(provenance: Mapping[str, Any]) -> str | None:
    """How statistics were counted from the traffic of a server, in words; None where they were not.

    Example:
        >>> live_mode({"data": [{"group": "all", "mode": "shadow", "every": 8}]})
        'live traffic, in the mode shadow, one step in 8'
    """
    data = [entry for entry in provenance.get("data") or [] if "mode" in entry]
    if not data:
        return None
    found = {(str(entry["mode"]), int(entry.get("every") or 1)) for entry in data}
    each = [f"in the mode {mode}, {which_steps(every)}" for mode, every in sorted(found)]
    return f"live traffic, {'; and '.join(each)}"


def recipes_of(data: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """{name: digest} of the recipes that list the sources of `provenance["data"]`.

    Example:
        >>> recipes_of([{"recipe": {"name": "/home/me/mix.yaml", "digest": "sha256:1f"}}])
        {'mix.yaml': 'sha256:1f'}
    """
    given = [entry.get("recipe") for entry in data]
    named = [one for one in given if isinstance(one, Mapping) and one.get("name")]
    return {public_name(str(one["name"])): str(one.get("digest") or "") for one in named}


def observation(observed: Mapping[str, Any]) -> dict[str, str]:
    """How statistics were made, from `provenance["observed"]`: what is recorded, in words.

    Example:
        >>> observation({"device": "NVIDIA H200", "devices": 2, "seconds": 75.2, "seed": 42})
        {'observed on': '2 x NVIDIA H200', 'observed in': '1:15', 'seed of the samples': '42'}
    """
    found = {}
    if observed.get("device"):
        number = observed.get("devices") or 1
        words = [f"{number} x {observed['device']}" if number > 1 else str(observed["device"])]
        if observed.get("memory_bytes"):
            each = " each" if number > 1 else ""
            words.append(f"{in_bytes(observed['memory_bytes'])} of memory{each}")
        if observed.get("threads"):
            number = observed["threads"]
            words.append(f"{number} thread{'s' if number > 1 else ''}")
        found["observed on"] = ", ".join(words)
    if observed.get("seconds") is not None:
        found["observed in"] = took(observed["seconds"])
    if observed.get("seed") is not None:
        found["seed of the samples"] = str(observed["seed"])
    return found


def router_weight_rule(provenance: Mapping[str, Any]) -> str:
    """Which router weights were recorded."""
    gate = str(provenance.get("gate"))
    return "the model's own combine weights" if gate == "model" else gate


# Settings of plans that remove neurons, and their names for readers.
_SHAPE = {
    "shape": "shape asked for (experts x neurons)",
    "width_multiple": "neurons are a multiple of",
    "ridge": "ridge, relative to the mean of the Gram matrix's diagonal",
}


def shape_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values of what a plan records of neurons that it removes.

    Example:
        >>> shape_settings({"shape": "24x32", "keep": 3})
        [('shape asked for (experts x neurons)', '24x32')]
    """
    return [(name, str(settings[key])) for key, name in _SHAPE.items() if key in settings]
