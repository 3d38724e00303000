"""`reap-kernels recipe`: list the recipes that come with the package, or check and print one."""

import argparse
from typing import Any

from reap_driver.workflow.console import Console, emit

NAME = "recipe"
SUMMARY = "list the recipes that come with the package, or check and print one"
DESCRIPTION = """\
A recipe is a mix of calibration data with values of options: a YAML or JSON file that `--recipe`
takes. Without an argument, lists those that come with the package. With a name, prints its file, to
be saved and edited; with a file, checks it first: sources, their keys, and options.

A file has `sources`, and may have a `description` and `options`, whose names are those of Python's
calls (`seq_len` for --seq-len). Options that are given to a run come before those of its recipe.
"""
EXAMPLES = """\
examples:
  reap-kernels recipe
  reap-kernels recipe reap-coding > mix.yaml
  reap-kernels recipe mix.yaml --json
  reap-kernels prune MODEL --recipe mix.yaml --ratio 0.25 --out MODEL-small
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """The recipe."""
    parser.add_argument(
        "name",
        metavar="NAME|FILE",
        nargs="?",
        help="a recipe that comes with the package, or a .yaml or .json file",
    )


def run(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Lists, or checks and prints."""
    from reap_driver.workflow.recipes import load_recipe, recipe_names

    if args.name is not None:
        recipe = load_recipe(args.name)
        if not console.quiet and not console.as_json:
            emit(recipe.text.rstrip("\n"))  # as it is, without flags in place of names
        return recipe.facts()
    recipes = [load_recipe(name) for name in recipe_names()]
    width = max(len(recipe.name) for recipe in recipes)
    for recipe in recipes:
        console.say(f"{recipe.name:<{width}}  {recipe.description}")
    console.note("print one with `reap-kernels recipe NAME`; use it with `recipe=NAME`")
    return {"recipes": [recipe.facts() for recipe in recipes]}
