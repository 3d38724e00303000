"""The bodies of requests: JSON of known fields, or the bytes of a file, within limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from reap_driver.integrations.vllm.engine.step import MODES
from reap_driver.integrations.vllm.server.groups import MAX_GROUPS, GroupName
from reap_driver.integrations.vllm.server.refusals import Refused
from reap_kernels.documents import parse_json
from reap_kernels.provenance import MAX_EXPERTS
from reap_kernels.schema import (
    Flag,
    Int,
    Kind,
    ListOf,
    MapOf,
    OrNull,
    Real,
    Record,
    Text,
    check,
)

JSON, BYTES = "application/json", "application/octet-stream"
MAX_JSON, MAX_FILE = 1_000_000, 100_000_000
_IDS = ListOf(Int(0, MAX_EXPERTS - 1), longest=MAX_EXPERTS)


@dataclass(frozen=True)
class Body:
    """What a route takes.

    Attributes:
        kind: of the JSON; fields that are left out have the values of `defaults`.
        defaults: by name.
    """

    kind: Kind
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def read(self, content: bytes, content_type: str | None) -> dict[str, Any]:
        """The fields of a body.

        Args:
            content: of the request; empty stands for an object without fields.
            content_type: of its header.

        Raises:
            Refused: 400 names the field, its value and what it must be; 415 for another type.
        """
        if not content:
            given: Any = {}
        else:
            check_type(content_type, JSON)
            try:
                given = parse_json(content)
            except ValueError as error:
                raise Refused(400, f"the body {error}; send one object of JSON") from error
        try:
            check(given, self.kind)
        except ValueError as error:
            raise Refused(400, f"the body: {error}; correct it and send it again") from error
        return {**self.defaults, **given}


START = Body(
    Record(
        optional={
            "mode": Text(choices=MODES),
            "every": Int(1, 1_000_000),
            "groups": ListOf(GroupName(), longest=MAX_GROUPS),
            "reset": Flag(),
        }
    ),
    {"mode": "replace", "every": 1, "groups": [], "reset": True},
)
NOTHING = Body(Record())
SAVE = Body(Record({"name": Text(200)}, {"overwrite": Flag()}), {"overwrite": False})
PLAN = Body(
    Record(
        optional={
            "ratio": Real(above=0, below=1),
            "keep": Int(1, MAX_EXPERTS),
            "criterion": Text(1_000),
            "weights": OrNull(MapOf(Real(low=0))),
            "protect": MapOf(_IDS),
            "allocation": Text(choices=("uniform", "global")),
            "normalize": OrNull(Text(choices=("mean", "max", "none"))),
            "layer_ratios": MapOf(Real(low=0, below=1)),
            "skip_first": Int(0, 1_000_000),
            "skip_last": Int(0, 1_000_000),
        }
    )
)


def check_type(found: str | None, *allowed: str) -> None:
    """Checks the type that a header gives a body.

    Raises:
        Refused: 415; it is none of `allowed`.
    """
    kind = (found or "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise Refused(
            415,
            f"the body has the content type {kind or 'none'!r}; send it with the header "
            f"`Content-Type: {' or '.join(allowed)}`",
        )


def too_large(limit: int) -> Refused:
    """The error about a body above a limit, in bytes."""
    return Refused(413, f"the body is larger than {limit:,} bytes; send a smaller one")
