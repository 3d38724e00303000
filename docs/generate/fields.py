"""File formats from their definitions: tables of fields, and the JSON Schema of plans."""

import inspect
from functools import singledispatch
from importlib import import_module
from pathlib import Path
from typing import Any

from reap_kernels import schema
from reap_kernels.documents import Format

PLAN = "reap_driver.planning.plan"
ROOT = Path(__file__).parents[2]


def format_of(module: str) -> Format:
    """The `FORMAT` that a module defines."""
    found = import_module(module).FORMAT
    assert isinstance(found, Format)
    return found


def render(module: str) -> str:
    """A table of the fields of a format: MUST be there or MAY be there, and what they hold.

    Args:
        module: that defines it as `FORMAT`.
    """
    of = format_of(module)
    lines = ["| field | | value |", "|---|---|---|"]
    lines.append(f"| `format` | MUST | `{of.name}` |")
    lines.append(f"| `version` | MUST | `{of.version}` |")
    lines += rows(of)
    closing = "MAY be present and are kept" if of.open else "are refused"
    return "\n".join(lines) + f"\n\nOther fields {closing}.\n"


def rows(of: Format) -> list[str]:
    """A row for each field of a format, beside `format` and `version`."""
    lines = []
    for word, group in (("MUST", of.fields), ("MAY", of.optional or {})):
        for name, kind in group.items():
            lines += _rows(name, word, kind)
    if of.sealed:
        lines.append("| `digest` | MUST | `sha256:` and the digest of all other fields and data |")
    return lines


def formats() -> dict[str, Format]:
    """Every format that a module defines: `module.NAME` -> format."""
    found = {}
    for package, folder in (("reap_kernels", ROOT), ("reap_driver", ROOT / "python")):
        for path in sorted((folder / package).rglob("*.py")):
            if "documents import" in path.read_text(encoding="utf-8"):
                name = ".".join(path.relative_to(folder).with_suffix("").parts)
                for key, value in vars(import_module(name)).items():
                    if isinstance(value, Format):
                        found[f"{name}.{key}"] = value
    # What a module imports from another is defined there.
    return {next(n for n, f in found.items() if f is one): one for one in found.values()}


def versions() -> str:
    """A table of all formats with their versions."""
    known = sorted(formats().values(), key=lambda of: of.name)
    lines = [f"| `{of.name}` | {of.version} | {of.what} |" for of in known]
    return "\n".join(["| format | version | file |", "|---|---|---|", *lines]) + "\n"


def _rows(name: str, word: str, kind: schema.Kind) -> list[str]:
    """A row for a field, and one for each field of an object in it."""
    rows = [f"| `{name}` | {word} | {words(kind)} |"]
    inner, below = kind, name
    while isinstance(inner, schema.MapOf | schema.ListOf | schema.OrNull):
        if not isinstance(inner, schema.OrNull):
            below += ".*" if isinstance(inner, schema.MapOf) else "[]"
        inner = inner.kind
    if isinstance(inner, schema.Record):
        for more, group in (("MUST", inner.fields), ("MAY", inner.optional)):
            for key, item in group.items():
                rows += _rows(f"{below}.{key}", more, item)
    return rows


@singledispatch
def words(kind: schema.Kind) -> str:
    """What a value may be, in words."""
    text = inspect.getdoc(type(kind)) or ""
    return text.split("\n")[0].rstrip(".")


@words.register
def _(kind: schema.Int) -> str:
    return f"whole number, {kind.low} " + (
        "or more" if kind.high == schema.MAX_INT else f"to {kind.high}"
    )


@words.register
def _(kind: schema.Real) -> str:
    limits = {"above": kind.above, "at least": kind.low, "below": kind.below, "at most": kind.high}
    said = [f"{word} {limit}" for word, limit in limits.items() if limit is not None]
    return ", ".join(["finite number", *said])


@words.register
def _(kind: schema.Text) -> str:
    return " or ".join(f"`{choice}`" for choice in kind.choices) or "text"


@words.register
def _(kind: schema.OrNull) -> str:
    return f"null or {words(kind.kind)}"


@words.register
def _(kind: schema.ListOf) -> str:
    few = f" of {kind.shortest} or more" if kind.shortest else ""
    return f"list{few}: {words(kind.kind)}"


@words.register
def _(kind: schema.MapOf) -> str:
    return f"object, any names: {words(kind.kind)}"


@words.register
def _(kind: schema.Record) -> str:
    return "object; other fields MAY be present" if kind.open else "object"


@words.register
def _(kind: schema.Anything) -> str:
    return "any value"


def plan_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a plan.

    It says what a field may hold. What it cannot say is that `kept` and `removed` of a layer are
    ascending and share out its experts, and that protected experts are kept.
    """
    of = format_of(PLAN)
    head = {"format": {"const": of.name}, "version": {"const": of.version}}
    body = json_schema(schema.Record(of.fields, of.optional or {}, of.open))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{of.name}, version {of.version}",
        **body,
        "properties": {**head, **body["properties"]},
        "required": [*head, *body["required"]],
    }


@singledispatch
def json_schema(kind: schema.Kind) -> dict[str, Any]:
    """A kind as JSON Schema."""
    raise TypeError(f"{type(kind).__name__} has no JSON Schema; write one in this file")


@json_schema.register
def _(kind: schema.Int) -> dict[str, Any]:
    return {"type": "integer", "minimum": kind.low, "maximum": kind.high}


@json_schema.register
def _(kind: schema.Real) -> dict[str, Any]:
    limits = {
        "minimum": kind.low,
        "maximum": kind.high,
        "exclusiveMinimum": kind.above,
        "exclusiveMaximum": kind.below,
    }
    return {"type": "number", **{name: at for name, at in limits.items() if at is not None}}


@json_schema.register
def _(kind: schema.Text) -> dict[str, Any]:
    return (
        {"enum": list(kind.choices)}
        if kind.choices
        else {
            "type": "string",
            "maxLength": kind.longest,
        }
    )


@json_schema.register
def _(kind: schema.Flag) -> dict[str, Any]:
    return {"type": "boolean"}


@json_schema.register
def _(kind: schema.OrNull) -> dict[str, Any]:
    return {"anyOf": [{"type": "null"}, json_schema(kind.kind)]}


@json_schema.register
def _(kind: schema.Anything) -> dict[str, Any]:
    return {}


@json_schema.register
def _(kind: schema.ListOf) -> dict[str, Any]:
    limits = {"minItems": kind.shortest, "maxItems": kind.longest}
    return {"type": "array", "items": json_schema(kind.kind), **limits}


@json_schema.register
def _(kind: schema.MapOf) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": json_schema(kind.kind),
        "propertyNames": {"maxLength": kind.longest},
        "minProperties": kind.shortest,
    }


@json_schema.register
def _(kind: schema.Record) -> dict[str, Any]:
    fields = {**kind.fields, **kind.optional}
    return {
        "type": "object",
        "properties": {name: json_schema(item) for name, item in fields.items()},
        "required": list(kind.fields),
        "additionalProperties": kind.open,
    }
