"""The API reference: an entry for every name that a package exports, from its docstring."""

import dataclasses
import inspect
import re
from importlib import import_module
from types import ModuleType

from reap_driver.workflow.fields import nested_in

KINDS = ("Functions", "Classes", "Modules")


def exported(package: str) -> dict[str, str]:
    """Exported name -> where it is defined, dotted. Left out are texts such as `__version__`."""
    module = import_module(package)
    found = {name: getattr(module, name) for name in module.__all__}
    return {
        name: value.__name__
        if isinstance(value, ModuleType)
        else f"{value.__module__}.{value.__qualname__}"
        for name, value in found.items()
        if not isinstance(value, str)
    }


def kind(package: str, name: str) -> str:
    """Which of `KINDS` an exported name is listed under."""
    value = getattr(import_module(package), name)
    if isinstance(value, ModuleType):
        return "Modules"
    return "Classes" if inspect.isclass(value) else "Functions"


def render(package: str, prefix: str) -> str:
    """Entries for mkdocstrings.

    Args:
        package: whose `__all__` is documented.
        prefix: what the package is imported as.
    """
    homes = exported(package)
    parts = []
    for title in KINDS:
        names = [name for name in sorted(homes, key=str.lower) if kind(package, name) == title]
        # What another package exports is documented there.
        names = [name for name in names if homes[name].split(".")[0] == package]
        if names:
            parts.append(f"## {title}\n")
        parts += [
            options_entry(getattr(import_module(package), name), f"{prefix}.{name}")
            if name.endswith("Options")
            else f"::: {homes[name]}\n    options:\n"
            f'      heading: "{prefix}.{name}"\n      toc_label: "{name}"\n'
            for name in names
        ]
    return "\n".join(parts)


def options_entry(cls: type, name: str) -> str:
    """A class of options as a table, from its fields, which mkdocstrings cannot see."""
    text = inspect.cleandoc(cls.__doc__ or "")
    example = text.split("Example:\n")[1].split("\n\nAttributes:")[0]
    rows = []
    for field in dataclasses.fields(cls):
        nested = nested_in(field)
        known = field.default is not dataclasses.MISSING
        default = f"`{field.default!r}`" if known and nested is None else ""
        text_of = f"see `{nested.__name__}`" if nested else field.metadata["help"]
        escaped = re.sub(r"([|\[<])", r"\\\1", text_of)
        rows.append(f"| `{field.name}` | {default} | {escaped} |")
    table = "\n".join(["| option | default | what it does |", "|---|---|---|", *rows])
    code = f"```python\n{inspect.cleandoc(example)}\n```"
    heading = f"### {name} {{#{cls.__module__}.{cls.__qualname__}}}"
    return "\n\n".join([heading, text.splitlines()[0], code, table]) + "\n"
