"""The sources of data that options name. Apart, so that checks of paths import no transformers."""

from reap_driver.data.recipe import load_recipe
from reap_driver.data.source import DataSource
from reap_driver.workflow.options import DataOptions


def sources_of(data: DataOptions) -> list[DataSource]:
    """What `recipe` and `data` name, in this order.

    Raises:
        DataError: there is no such recipe or data.
    """
    listed = [source for recipe in data.recipes for source in load_recipe(recipe)]
    return [*listed, *map(DataSource.parse, data.sources)]
