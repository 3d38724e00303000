"""Options that recipes hold: which they may be, and how they become those of a job.

What is given to a call or on the command line comes first, then what recipes say, then defaults.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from reap_driver.base.arguments import mistake, typed
from reap_driver.data.recipe import Recipe, included, read_recipe
from reap_driver.workflow import exchange_jobs, fields, follow_up_jobs, jobs
from reap_driver.workflow.fields import every_field, flat, nested_in, refused
from reap_driver.workflow.jobs import PLANNING, TASKS
from reap_driver.workflow.options import JOURNAL, RUN
from reap_kernels.errors import DataError, UsageError

_Options = TypeVar("_Options")

# A recipe says what is computed, for anybody and on any machine. So it may not hold options without
# a group (models, outputs), those of running a model (devices, memory, and whose code to trust), of
# journals, of estimates and of tasks; nor the few options of data that are declared so.
_OF_A_RUN = ("", RUN, JOURNAL, PLANNING, TASKS)


@typed
def load_recipe(path: str | Path) -> Recipe:
    """A recipe: a mix of calibration data, with values of options.

    Args:
        path: a .yaml, .yml or .json file, or the name of a recipe that the package includes.

    Raises:
        DataError: the file does not exist or is no recipe; a source or an option in it is unknown
            or has a wrong value. The message names file, source and key.

    Example:
        >>> rd.load_recipe("reap-coding").sources[0].name
        'theblackcat102/evol-codealpaca-v1'
    """
    recipe = read_recipe(path)
    _checked(recipe)
    return recipe


def recipe_names() -> list[str]:
    """Names of the recipes that the package includes.

    Example:
        >>> rd.recipe_names()
        ['packed-40-30-10-20', 'reap-coding', 'reap-reasoning']
    """
    return sorted(included())


def build(cls: type[_Options], given: Mapping[str, Any]) -> _Options:
    """Options of a job from those that are given and those of the recipes among them.

    Args:
        cls: the job's class of options.
        given: {name: value}, see `fields.build`; None counts as not given where a recipe or the
            option itself has another default.

    Raises:
        OptionError: see `fields.build`.
        DataError: a recipe cannot be read, or two disagree.

    Example:
        >>> given = {"model": "MODEL", "recipe": "reap-coding", "out": "half"}
        >>> build(rd.PruneOptions, given).data.max_len
        16384
    """
    names = given.get("recipe")
    listed = [names] if isinstance(names, str | Path) else names
    if not listed or not any(field.name == "recipe" for field in every_field(cls)):
        listed = ()
    chosen = {name: value for name, value in given.items() if value is not None}
    said = _together(listed, chosen)
    taken = _taken(cls, said, chosen)
    defaults = {field.name: field.default for field in every_field(cls)}
    rest = {name: None for name in given if name not in chosen and defaults.get(name) is None}
    try:
        return fields.build(cls, {**rest, **taken, **chosen})
    except UsageError as error:
        blamed = [name for name in taken if re.search(rf"`{name}(=|`:)", str(error))]
        if not blamed:
            raise
        where = ", ".join(f"{_shown(name, taken[name])} of {said[name][1]}" for name in blamed)
        raise refused(f"{error} (with {where}, unless another is given)") from error


def recipe_notes(options: Any) -> Iterator[str]:
    """What a run takes from its recipes, and what it does not.

    Args:
        options: of a job; they may have been built without `build`.
    """
    for name in options.data.recipes:
        recipe, has = load_recipe(name), flat(options)
        said, kept = recipe.options, _checked(recipe)
        allowed = {field.name for field in _allowed(type(options))}
        same = [key for key in said if key in allowed and _same(has[key], kept[key])]
        other = [key for key in said if key in allowed and key not in same]
        unused = [key for key in said if key not in allowed]
        if same:
            yield f"from recipe {name}: {_list(said, same)}"
        if other:
            own = _list(has, _instead(type(options), other, has))
            yield f"recipe {name} has {_list(said, other)}; this run has " + (own or "none of it")
        if unused:
            job = type(options).__name__.removesuffix("Options").lower()
            yield f"recipe {name} also has {_list(said, unused)}, which {job} has no use for"


def _instead(cls: type, names: Sequence[str], has: Mapping[str, Any]) -> list[str]:
    """The options that a run has in place of those of a recipe: these, or ones excluding them."""
    fields = {field.name: field for field in every_field(cls)}
    words = {fields[name].metadata["exclusive"] for name in names} - {""}
    return [
        name
        for name, field in fields.items()
        if has[name] is not None
        and (name in names or (field.metadata["exclusive"] in words and has[name] != field.default))
    ]


def _taken(
    cls: type, said: Mapping[str, tuple[Any, str]], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """What a job takes of what recipes say: options that it has, that are not given, and that
    nothing given excludes.
    """
    allowed = {field.name: field for field in _allowed(cls)}
    defaults = {field.name: field.default for field in every_field(cls)}
    words = {field.metadata["exclusive"] for field in every_field(cls) if field.name in chosen} - {
        ""
    }
    taken = {
        name: value
        for name, (value, _) in said.items()
        if name in allowed
        and name not in chosen
        and allowed[name].metadata["exclusive"] not in words
    }
    for name in list(taken):
        for other, values in allowed[name].metadata["needs"].items():
            value = chosen.get(other, taken.get(other, defaults.get(other)))
            if value not in values if values else value is None:
                del taken[name]
                break
    return taken


def _together(names: Sequence[str | Path], chosen: Collection[str]) -> dict[str, tuple[Any, str]]:
    """{option: (value, recipe)} of all recipes.

    Raises:
        DataError: two have different values of an option that is not among those given, `chosen`.
    """
    found: dict[str, tuple[Any, str]] = {}
    for name in names:
        for key, value in _checked(read_recipe(name)).items():
            before, other = found.setdefault(key, (value, f"recipe {name}"))
            if key not in chosen and not _same(before, value):
                raise DataError(
                    f"recipe {name} has {_shown(key, value)} and {other} {_shown(key, before)}; "
                    f"give `{key}`, or one of them only"
                )
    return found


def _checked(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe, as the classes that declare them keep them.

    Raises:
        DataError: one is unknown, cannot stand in a recipe, or has a wrong value.
    """
    what = f"recipe {recipe.name}, options"
    declared = _declared()
    by_class: dict[type, dict[str, Any]] = {}
    for key, value in recipe.options.items():
        if key not in declared:
            every = {field.name for job in job_classes() for field in every_field(job)}
            known = ", ".join(sorted(declared))
            if key in every:
                raise DataError(
                    f"{what}: {key} belongs to a run, not to a recipe; give it with the recipe "
                    f"(a recipe can have {known})"
                )
            close = difflib.get_close_matches(str(key), declared, 1)
            hint = f"; did you mean {close[0]}?" if close else f"; there are {known}"
            raise DataError(f"{what}: {key} is no option of any job{hint}")
        cls = declared[key]
        found = mistake(cls, key, value)
        if found:
            raise DataError(f"{what}: {found}")
        by_class.setdefault(cls, {})[key] = value
    kept = dict(recipe.options)
    for cls, values in by_class.items():
        if cls in job_classes():  # what it requires is not for a recipe to say
            continue
        try:
            made = cls(**values)
        except UsageError as error:
            raise DataError(f"{what}: {error}") from error
        kept |= {key: getattr(made, key) for key in values}
    return kept


@functools.cache
def job_classes() -> tuple[type, ...]:
    """The classes of options of all jobs."""
    return tuple(
        one
        for module in (jobs, follow_up_jobs, exchange_jobs)
        for one in vars(module).values()
        if isinstance(one, type) and hasattr(one, "__dataclass_fields__")
        if one.__module__ == module.__name__
    )


def _allowed(cls: type) -> "Iterator[dataclasses.Field[Any]]":
    """The options of a job that a recipe may hold."""
    for field in every_field(cls):
        if field.metadata["recipe"] and field.metadata["group"] not in _OF_A_RUN:
            yield field


@functools.cache
def _declared() -> dict[str, type]:
    """{option: the class that declares it} of all that a recipe may hold."""
    found: dict[str, type] = {}
    for job in job_classes():
        for cls in [job, *filter(None, map(nested_in, dataclasses.fields(job)))]:
            own = {field.name for field in dataclasses.fields(cls) if nested_in(field) is None}
            found |= {f.name: cls for f in _allowed(cls) if f.name in own and f.name not in found}
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same, of which one may have been read from text."""
    return bool(one == other) or str(one) == str(other)


def _shown(name: str, value: Any) -> str:
    return f"`{name}={value!r}`"


def _list(values: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(_shown(name, values[name]) for name in names)
