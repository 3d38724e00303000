"""The documentation says all that the code offers, and its JSON Schema agrees with the reader."""

import contextlib
import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from docs.generate import api, cli, exchange, fields, layers
from reap_driver.cli.main import main
from reap_driver.interchange.formats import FORMATS
from reap_driver.planning.plan import Plan
from reap_kernels.errors import PlanError


@pytest.mark.parametrize(("package", "prefix"), [("reap_kernels", "rk"), ("reap_driver", "rd")])
def test_the_reference_has_every_exported_name(package: str, prefix: str) -> None:
    text = api.render(package, prefix)
    homes = api.exported(package)
    own = [name for name in homes if homes[name].split(".")[0] == package]
    assert own
    for name in own:
        assert f'heading: "{prefix}.{name}"' in text or f"### {prefix}.{name} {{#" in text


@pytest.mark.parametrize("command", cli.commands())
def test_the_reference_has_every_option_that_help_prints(command: str) -> None:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([command, "--help"])
    section = cli.render().split(f"\n## {command}\n")[-1].split("\n## ")[0]
    options = re.findall(r"^  (?:-\w, )?(--[\w-]+)", printed.getvalue(), re.MULTILINE)
    assert "--json" in options
    for option in options:
        assert option == "--help" or re.search(rf"`{option}[ `]", section), option


@pytest.mark.parametrize("package", layers.ORDERS)
def test_the_architecture_page_has_every_module_of_the_order(package: str) -> None:
    order, folder = layers.ORDERS[package]
    text = layers.render(package)
    for name in [part for level in getattr(layers.test_layering, order) for part in level]:
        shown = folder.name if name == "__init__" else name
        assert re.search(rf"\| `{shown}(/|\.py)?` \| \S", text), name


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_of_formats_says_what_each_needs(name: str) -> None:
    one = FORMATS[name]
    [row] = [line for line in exchange.render().splitlines() if line.startswith(f"| `{name}` |")]
    assert one.what in row
    assert ("with `--model` |" in row) == one.reads or "model" in one.needs
    for option in {*one.options, *one.needs}:
        assert f"`--{option}`" in row
    page = (Path(__file__).parent.parent / "docs/guides/other-tools.md").read_text()
    assert f"`{name}`" in page, f"{name} has no section"


LAYER = {"num_experts": 4, "kept": [0, 2], "removed": [1, 3]}
PLAN: dict[str, Any] = {
    "format": "reap-plan",
    "version": 1,
    "model": {"id": "model", "config_digest": None, "layers": {"a": {"top_k": 2, "n_group": None}}},
    "criterion": "reap",
    "weights": {"code": 0.5, "text": 1},
    "allocation": "uniform",
    "ratio": 0.5,
    "scores_digest": "sha256:0",
    "data": [{"group": "code", "tokens": 100, "anything": []}],
    "notes": ["rounded down"],
    "layers": {"a": LAYER, "b": LAYER},
    "settings": {"protected": {"a": [0]}, "layer_ratios": {"b": 0.25}},
}
VALUES = (None, True, -1, 0, 0.5, 1, 1.5, 2**63, "", "text", [], [0], [-1], [1.5], {}, {"a": 1})
VALUES += ({"a": []}, {"a": LAYER}, {"a": {**LAYER, "more": 1}}, {"a": {**LAYER, "kept": ["0"]}})
# What a schema cannot say, and the reader checks: the ids of a layer, and what they mean together.
BEYOND = ("share out", "ascending", "kept is empty", "protected", "64 bits")


def variants() -> list[dict[str, Any]]:
    """Plans with each field left out, misspelled, or given each of `VALUES`, at three depths."""
    found = [PLAN, {**PLAN, "more": 1}]
    places = [(), ("layers", "a"), ("model", "layers", "a"), ("data", 0), ("settings",)]
    for place in places:
        inner: Any = PLAN
        for key in place:
            inner = inner[key]
        for name in inner:
            for value in ("left out", "misspelled", *VALUES):
                plan = copy.deepcopy(PLAN)
                target: Any = plan
                for key in place:
                    target = target[key]
                if value in ("left out", "misspelled"):
                    old = target.pop(name)
                    target.update({f"{name}s": old} if value == "misspelled" else {})
                else:
                    target[name] = copy.deepcopy(value)
                found.append(plan)
    return found


def test_the_json_schema_and_the_reader_agree_on_plans(tmp_path) -> None:
    schema = fields.plan_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    accepted, path = 0, tmp_path / "plan.json"
    for plan in variants():
        path.write_text(json.dumps(plan))
        try:
            Plan.load(path)
            refusal = ""
        except PlanError as error:
            refusal = str(error)
        accepted += not refusal
        if any(words in refusal for words in BEYOND):
            continue
        errors = [error.message for error in validator.iter_errors(plan)]
        assert bool(refusal) == bool(errors), f"{plan}\nreader: {refusal}\nschema: {errors}"
    assert accepted > 20
