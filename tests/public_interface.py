"""What versions promise, recorded in public_interface.json: names of `reap_kernels`, and formats.

`python -m tests.public_interface` records what the code has now. Where the recorded version has
been released, it first asks for the version that the change needs.
"""

import ast
import dataclasses
import inspect
import json
import re
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import reap_kernels as rk
from docs.generate import fields

ROOT = Path(__file__).parent.parent
RECORD = Path(__file__).with_suffix(".json")
# name -> lines: parameters in order, or fields of a format
Described = dict[str, list[str]]


def current() -> dict[str, Any]:
    """The interface as the code has it."""
    return {"version": rk.__version__, "reap_kernels": names(rk), "formats": formats()}


def recorded() -> dict[str, Any]:
    """The interface as it was recorded."""
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def names(module: ModuleType, prefix: str = "") -> Described:
    """Every public name of a package, with its parameters; methods and fields of classes too."""
    found: Described = {}
    own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__]
    for name in sorted(getattr(module, "__all__", own)):
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            found |= names(value, f"{name}.")
        elif inspect.isclass(value) and issubclass(value, Exception):
            bases = [base.__name__ for base in value.__bases__]
            found[prefix + name] = [*bases, f"exit_code = {value.exit_code}"]
        elif inspect.isclass(value):
            found |= _class(prefix + name, value)
        elif inspect.isroutine(value):
            found[prefix + name] = _parameters(_parsed(value))
    return found


def _parsed(value: Any) -> Any:
    """The definition of a function or class."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(value)))
    return ast.parse(source).body[0]


def _parameters(node: ast.FunctionDef) -> list[str]:
    """Parameters in order, as they are written, and what is returned."""
    spec, found = node.args, []
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    for arg, default in zip(plain, defaults, strict=True):
        if arg.arg not in ("self", "cls"):
            found.append(_parameter(arg, default))
    for arg, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        found.append(f"*, {_parameter(arg, default)}")
    assert spec.vararg is spec.kwarg is None, f"{node.name} takes anything: name its parameters"
    return [*found, f"-> {ast.unparse(node.returns)}"] if node.returns else found


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default is not None else "")


def _class(name: str, cls: type) -> Described:
    """How a class is made, and its public methods, properties and fields."""
    node, found, made = _parsed(cls), {}, []
    late = {f.name for f in dataclasses.fields(cls) if not f.init} if _is_data(cls) else set()
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            own = _parameters(item)
            if item.name == "__init__":
                made = own
            elif not item.name.startswith("_"):
                kinds = [ast.unparse(kind) for kind in item.decorator_list]
                found[f"{name}.{item.name}"] = [*(f"@{kind}" for kind in kinds), *own]
        elif isinstance(item, ast.AnnAssign):
            text = ast.unparse(item)
            if item.target.id in late:
                found[f"{name}.{item.target.id}"] = [f"-> {ast.unparse(item.annotation)}"]
            else:
                made.append(text)
        elif isinstance(item, ast.Assign) and not item.targets[0].id.startswith("_"):
            found[f"{name}.{item.targets[0].id}"] = ["@property"]
    return {name: made, **found}


def _is_data(cls: type) -> bool:
    return dataclasses.is_dataclass(cls)


def formats() -> dict[str, Any]:
    """Every file format of ours, its version and its fields."""
    return {
        form.name: {"version": form.version, "fields": fields.rows(form)}
        for form in sorted(fields.formats().values(), key=lambda form: form.name)
    }


def needed(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Which number of the version a change needs: `major` where something that was there is gone or
    different, `minor` where something came, empty where nothing changed. (Below 1.0, what is called
    major needs the minor number.)
    """
    kinds = {_difference(old["reap_kernels"], new["reap_kernels"])}
    was, now = ({k: v["version"] for k, v in one["formats"].items()} for one in (old, new))
    kinds.add("major" if any(now.get(k) != v for k, v in was.items()) else "")
    kinds.add("minor" if set(now) - set(was) else "")
    was, now = ({k: v["fields"] for k, v in one["formats"].items()} for one in (old, new))
    kinds.add("minor" if any(now.get(k, v) != v for k, v in was.items()) else "")
    return max(kinds, key=("", "minor", "major").index)


def misread(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Formats that lost or changed a field, or must have a new one, under an unchanged version."""
    found = []
    for name, was in old["formats"].items():
        now = new["formats"].get(name)
        if now is None or now["version"] != was["version"]:
            continue
        came = [row for row in now["fields"] if row not in was["fields"]]
        gone = [row for row in was["fields"] if row not in now["fields"]]
        # In an object that MAY be there, a field that MUST be there comes with the object.
        heads = [row for row in came if "| MUST |" in row and not _below(row, came)]
        if gone or heads:
            found.append(name)
    return found


def _below(row: str, rows: list[str]) -> bool:
    """Whether the field of a row lies in an object that is among `rows` too."""
    field = _field(row)
    return any(field.startswith((f"{_field(o)}.", f"{_field(o)}[")) for o in rows if o != row)


def _field(row: str) -> str:
    return row.split("`")[1]


def _difference(old: Described, new: Described) -> str:
    if any(name not in new or not _extends(new[name], lines) for name, lines in old.items()):
        return "major"
    return "minor" if old != new else ""


def _extends(new: list[str], old: list[str]) -> bool:
    """Whether all that worked with the old lines works with the new ones: the same, but for
    parameters with a default that come by name or after those given by position.
    """
    (was, *before), (now, *after) = _parts(old), _parts(new)
    came = [*now[len(was) :], *(line for line in after[0] if line not in before[0])]
    return (
        now[: len(was)] == was
        and set(before[0]) <= set(after[0])
        and before[1] == after[1]
        and all(" = " in line for line in came)
    )


def _parts(lines: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Parameters by position, by name alone, and what else is said."""
    named = [line for line in lines if line.startswith("*, ")]
    rest = [line for line in lines if line.startswith(("-> ", "@"))]
    return [line for line in lines if line not in named and line not in rest], named, rest


def released(version: str) -> bool:
    """Whether the changelog has a date for a version."""
    text = (ROOT / "CHANGELOG.md").read_text()
    return re.search(rf"^## {re.escape(version)} \(\d", text, re.MULTILINE) is not None


def lacking(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What a released version lacks before a change may be recorded; empty if nothing."""
    if not released(old["version"]):
        return ""
    wrong = misread(old, new)
    if wrong:
        return f"fields of {', '.join(wrong)} changed: raise `version` where it is defined"
    kind = needed(old, new)
    was, now = (tuple(map(int, one["version"].split("."))) for one in (old, new))
    if kind == "major" and was[0] == 0:
        kind = "minor"
    wanted = {"": was, "minor": (was[0], was[1] + 1, 0), "major": (was[0] + 1, 0, 0)}[kind]
    if now < wanted:
        return f"set the version to {'.'.join(map(str, wanted))} or more (see RELEASE.md)"
    return ""


def main() -> None:
    """Records the interface, unless the version must be raised first."""
    new = current()
    missing = lacking(recorded(), new) if RECORD.exists() else ""
    if missing:
        sys.exit(missing)
    RECORD.write_text(json.dumps(new, indent=1) + "\n")


if __name__ == "__main__":
    main()
