"""What is published of provenance: names, not paths; shares of the mix."""

import pytest

from reap_driver.planning.public_provenance import (
    calibration_mix,
    public_name,
    recipes_of,
    router_weight_rule,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data/code.jsonl", "code.jsonl"),
        ("C:\\Users\\me\\model", "model"),
        ("~/data/code.jsonl", "code.jsonl"),
        ("acme/tools[x](train)", "acme/tools[x](train)"),
        ("data/code.jsonl", "data/code.jsonl"),
        ("standard library of Python 3.11.7", "standard library of Python 3.11.7"),
    ],
)
def test_where_files_are_kept_is_not_published(text: str, shown: str) -> None:
    assert public_name(text) == shown


def test_shares_are_of_all_tokens() -> None:
    mix = calibration_mix([{"group": "a", "tokens": 30}, {"group": "b", "tokens": 10}])
    assert [(entry.group, entry.share) for entry in mix] == [("a", 0.75), ("b", 0.25)]


def test_what_is_not_recorded_is_not_made_up() -> None:
    [entry] = calibration_mix([{"group": "a", "source": "x"}])
    assert (entry.records, entry.tokens, entry.share, entry.digest) == (None, None, None, None)


def test_router_weight_rules_are_named() -> None:
    assert router_weight_rule({"gate": "model"}) == "the model's own combine weights"
    assert router_weight_rule({"gate": "softmax"}) == "softmax"


def test_recipes_are_named_once_and_without_folders() -> None:
    given = {"name": "/home/me/mix.yaml", "digest": "sha256:1f"}
    data = [{"recipe": given}, {"recipe": given}, {"recipe": {"name": "reap-coding"}}, {}]
    assert recipes_of(data) == {"mix.yaml": "sha256:1f", "reap-coding": ""}
    assert recipes_of([{"recipe": "odd"}, {"recipe": {}}]) == {}
