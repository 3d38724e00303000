"""The sources of data that options name. Apart, so that checks of paths import no transformers."""

from typing import Any

from reap_driver.data.source import DataSource
from reap_driver.workflow.listener import Listener
from reap_driver.workflow.options import DataOptions
from reap_driver.workflow.recipes import load_recipe, recipe_notes


def sources_of(options: Any, heard: Listener | None = None) -> list[DataSource]:
    """What `recipe` and `data` of a job's options name, in this order.

    Args:
        options: the job's.
        heard: receives notes of what the run takes from recipes.

    Raises:
        DataError: there is no such recipe or data.
    """
    data: DataOptions = options.data
    if heard is not None:
        for note in recipe_notes(options):
            heard.note(note)
    listed = [source for recipe in data.recipes for source in load_recipe(recipe).sources]
    return [*listed, *map(DataSource.parse, data.sources)]
