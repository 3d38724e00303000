"""One set of statistics from what the processes of a server counted."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from reap_driver.integrations.vllm.engine.stats_bytes import stats_of
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError

Answer = Mapping[str, Any]


def merged(answers: Sequence[Answer]) -> SaliencyStats:
    """Merges the answers of `reap_statistics` of all ranks of all engines.

    Tensor parallel ranks count the same, so one of them is taken; expert parallel ranks count
    their own experts, which add up; pipeline ranks have different layers; engines of data
    parallelism serve different requests.

    Args:
        answers: in any order. Each has `share` ("whole", or "part" where ranks count their own
            experts), `tp`, `pp`, `dp` (sizes), `tp_rank`, `pp_rank`, `dp_rank`, and `file` (bytes
            of a statistics file).

    Raises:
        DataError: a rank has not answered, or a file is damaged.

    Example, of the one rank of one engine:
        >>> alone = {"dp": 1, "dp_rank": 0, "pp": 1, "pp_rank": 0, "tp": 1, "tp_rank": 0}
        >>> file = open("stats.safetensors", "rb").read()
        >>> merged([{"share": "whole", "file": file, **alone}]).groups == stats.groups
        True
    """
    _check_complete(answers)
    engines: dict[int, dict[int, list[SaliencyStats]]] = {}
    for answer in sorted(answers, key=lambda answer: (answer["dp_rank"], answer["pp_rank"])):
        if answer["share"] == "part" or answer["tp_rank"] == 0:
            engine = engines.setdefault(answer["dp_rank"], {})
            engine.setdefault(answer["pp_rank"], []).append(stats_of(answer["file"]))
    return _added(
        [_joined([_of_stage(stage) for stage in engine.values()]) for engine in engines.values()]
    )


def _check_complete(answers: Sequence[Answer]) -> None:
    """Raises DataError unless each rank of each engine has answered once."""
    if not answers:
        raise DataError("no rank has answered; ask each engine of the server")
    first = answers[0]
    places = [(answer["dp_rank"], answer["pp_rank"], answer["tp_rank"]) for answer in answers]
    expected = first["dp"] * first["pp"] * first["tp"]
    if len(places) != expected or len(set(places)) != expected:
        raise DataError(
            f"{len(set(places))} of {expected} ranks have answered (engines {first['dp']}, "
            f"pipeline {first['pp']}, tensor {first['tp']}); ask each engine of the server"
        )


def _added(shares: Sequence[SaliencyStats]) -> SaliencyStats:
    """Counts of the same layers, added."""
    return functools.reduce(SaliencyStats.merge, shares)


def _of_stage(shares: Sequence[SaliencyStats]) -> SaliencyStats:
    """Rows of each rank's own experts, added; their tokens are the same, and so counted once."""
    for share in shares[1:]:
        for name, layer in share.layers.items():
            expected = shares[0].layers[name].tokens
            if not torch.equal(layer.tokens, expected):
                raise DataError(
                    f"layer {name}: expert parallel ranks counted {expected.tolist()} and "
                    f"{layer.tokens.tolist()} tokens by group; stop the server's requests and "
                    "observe again"
                )
            layer.tokens.zero_()
    return _added(shares)


def _joined(shares: Sequence[SaliencyStats]) -> SaliencyStats:
    """Different layers of one model; those of a stage without MoE layers are none."""
    layers = {name: layer for share in shares for name, layer in share.layers.items()}
    return SaliencyStats(layers, shares[0].groups, shares[0].provenance)
