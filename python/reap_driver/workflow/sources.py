"""The sources of data that options name. Apart, so that checks of paths import no transformers."""

from typing import Any

from reap_driver.data.source import DataSource
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.options import DataOptions
from reap_driver.workflow.recipes import load_recipe, recipe_notes


def sources_of(options: Any, heard: Listener | None = None) -> list[DataSource]:
    """What `recipe` and `data` of a job's options name, in this order, but for the groups that are
    held out.

    Args:
        options: the job's.
        heard: receives notes of what the run takes from recipes.

    Raises:
        DataError: there is no such recipe or data.
        OptionError: groups that are held out are not those of any source, or of all.
    """
    used, _ = divided_sources(options, heard)
    return used


def divided_sources(
    options: Any, heard: Listener | None = None
) -> tuple[list[DataSource], list[DataSource]]:
    """The sources to calibrate on, and those of the groups that are held out; see `sources_of`."""
    data: DataOptions = options.data
    if heard is not None:
        for note in recipe_notes(options):
            heard.note(note)
    listed = [source for recipe in data.recipes for source in load_recipe(recipe).sources]
    every = [*listed, *map(DataSource.parse, data.sources)]
    held = getattr(options, "hold_out_group", ())
    groups = {source.group for source in every}
    unknown = next((name for name in held if name not in groups), None)
    if unknown is not None:
        raise OptionError(
            f"`hold_out_group={unknown}`: no source is in this group; there are "
            f"{', '.join(sorted(groups))}"
        )
    if held and groups <= set(held):
        raise OptionError(
            f"`hold_out_group={','.join(held)}`: these are all groups of the data, and none is "
            "left to calibrate on; give sources of other groups too"
        )
    out = [source for source in every if source.group in held]
    return [source for source in every if source.group not in held], out
