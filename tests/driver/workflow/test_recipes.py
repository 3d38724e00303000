"""Options of recipes: what comes first, what is left aside and said, and every mistake."""

import json
from pathlib import Path
from typing import Any

import pytest

import reap_driver as rd
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.fields import every_field
from reap_driver.workflow.recipes import build, recipe_notes
from reap_kernels.errors import DataError, UsageError


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    return tmp_path


def written(folder: Path, name: str = "mix.yaml", **options: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"options": options, "sources": [{"source": "a.jsonl"}]}))
    return path


def pruned(recipe: Any, **given: Any) -> rd.PruneOptions:
    return build(rd.PruneOptions, {"model": "M", "out": "o", "recipe": recipe, **given})


def test_given_values_come_before_the_recipes_and_these_before_defaults(here: Path) -> None:
    path = written(here, ratio=0.25, seed=7, criterion="frequency", weights={"a": 1})
    made = pruned(path, seed=9)
    assert (made.rank.ratio, made.data.seed, made.rank.criterion) == (0.25, 9, "frequency")
    assert made.rank.weights == {"a": 1}
    assert (made.data.packing, made.folds) == ("concat", 8)
    assert pruned(path, ratio=None).rank.ratio == 0.25


def test_python_and_the_command_line_decide_alike(here: Path) -> None:
    from reap_driver.cli.arguments import read
    from reap_driver.cli.main import build_parser

    path = written(here, packing="none", max_len=100, ratio=0.25, seed=7)
    words = ["prune", "M", "--recipe", str(path), "--seed", "9", "--out", "o"]
    assert read(rd.PruneOptions, build_parser().parse_args(words)) == pruned([str(path)], seed=9)


def test_what_is_given_takes_the_place_of_what_it_excludes(here: Path) -> None:
    path = written(here, packing="none", max_len=100, generations=3, allocation="uniform")
    made = pruned(path, packing="isolated", seq_len=64, allocation="global", normalize="max")
    assert (made.data.packing, made.data.max_len, made.data.seq_len) == ("isolated", None, 64)
    assert made.allocation.normalize == "max"
    sized = written(here, "sized.yaml", fits="16GB", context=4096)
    assert (pruned(sized).rank.fits, pruned(sized).rank.context) == (16_000_000_000, 4096)
    kept = pruned(sized, keep=8)
    assert (kept.rank.keep, kept.rank.fits, kept.rank.context) == (8, None, None)
    assert list(recipe_notes(kept)) == [
        f"recipe {sized} has `fits='16GB'`, `context=4096`; this run has `keep=8`"
    ]
    given = {"model": "M", "stats": "s", "recipe": path, "evaluations": 10}
    found = build(rd.SearchOptions, given)
    assert (found.evaluations, found.generations) == (10, None)
    assert build(rd.SearchOptions, {**given, "evaluations": None}).generations == 3


def test_a_contradiction_names_the_recipe(here: Path) -> None:
    path = written(here, packing="none")
    with pytest.raises(OptionError) as caught:
        pruned(path, seq_len=64)
    assert str(caught.value).startswith("`seq_len=64`: not together with `packing='none'`")
    assert str(caught.value).endswith(
        f"(with `packing='none'` of recipe {path}, unless another is given)"
    )


def test_recipes_together(here: Path) -> None:
    one, two = written(here, "a.yaml", seed=3, ratio=0.25), written(here, "b.yaml", seed=3, folds=2)
    made = pruned([one, two])
    assert (made.data.seed, made.rank.ratio, made.folds) == (3, 0.25, 2)
    assert len(made.data.recipes) == 2
    other = written(here, "c.yaml", seed=4)
    with pytest.raises(DataError, match=r"c.yaml has `seed=4` and recipe .*a.yaml `seed=3`; give"):
        pruned([one, other])
    assert pruned([one, other], seed=5).data.seed == 5


def test_what_a_run_takes_is_said(here: Path) -> None:
    path = written(here, packing="none", max_len=100, ratio=0.25, generations=3)
    given = {"model": "M", "recipe": path, "max_len": 50}
    notes = list(recipe_notes(build(rd.ObserveOptions, given)))
    assert notes == [
        f"from recipe {path}: `packing='none'`",
        f"recipe {path} has `max_len=100`; this run has `max_len=50`",
        f"recipe {path} also has `ratio=0.25`, `generations=3`, which observe has no use for",
    ]


def test_options_built_without_the_recipe_say_so(here: Path) -> None:
    path = written(here, packing="none", seed=7)
    made = rd.ObserveOptions(model="M", data=rd.DataOptions(recipe=path, seed=7))
    assert list(recipe_notes(made)) == [
        f"from recipe {path}: `seed=7`",
        f"recipe {path} has `packing='none'`; this run has `packing='concat'`",
    ]


def test_values_as_text_and_files_beside_the_recipe(here: Path) -> None:
    (here / "t.jinja").write_text("{{ messages }}")
    (here / "keep.json").write_text("{}")
    path = written(
        here, shard_size="5GB", chat_template="t.jinja", protect=["super", "3:1"], ratio=0.5
    )
    made = pruned(path)
    assert made.write.shard_bytes == 5_000_000_000
    assert made.data.chat_template == str(here / "t.jinja")
    assert made.rank.protected == ("super", ("3", (1,)))
    assert next(recipe_notes(made)).startswith(f"from recipe {path}: `shard_size='5GB'`")
    assert pruned(written(here, protect="keep.json")).rank.protected == (here / "keep.json",)


def test_the_recipes_that_are_included_hold_what_their_cards_say() -> None:
    packed = pruned("packed-40-30-10-20")
    assert (packed.data.packing, packed.data.seq_len, packed.data.seed) == ("concat", 2048, 42)
    assert (packed.rank.ratio, packed.rank.criterion) == (0.5, "reap")
    for name in ("reap-coding", "reap-reasoning"):
        made = pruned(name, ratio=0.25)
        assert (made.data.packing, made.data.max_len, made.rank.ratio) == ("none", 16384, 0.25)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seqlen": 5}, "options: seqlen is no option of any job; did you mean seq_len?"),
        ({"zzz": 5}, "options: zzz is no option of any job; there are allocation, "),
        ({"out": "x"}, "options: out belongs to a run, not to a recipe; give it with the recipe"),
        ({"trust_remote_code": True}, "options: trust_remote_code belongs to a run"),
        ({"device": "cpu"}, "options: device belongs to a run"),
        ({"resume": True}, "options: resume belongs to a run"),
        ({"data": ["b.jsonl"]}, "options: data belongs to a run"),
        ({"recipe": "b.yaml"}, "options: recipe belongs to a run"),
        ({"ratio": "half"}, "options: ratio is 'half', a str; expected float"),
        ({"ratio": 1.5}, "options: `ratio=1.5`: give a number above 0 and below 1"),
        ({"seed": 1.5}, "options: seed is 1.5, a float; expected int"),
        ({"packing": "some"}, "options: packing is 'some', a str; expected one of 'concat', "),
        ({"folds": "8"}, "options: folds is '8', a str; expected int"),
        ({"max_len": 5}, "options: `max_len=5`: only with `packing='none'`"),
        ({"criterion": "best"}, "options: `criterion`: criterion 'best' is unknown"),
    ],
)
@pytest.mark.parametrize("job", [rd.PruneOptions, rd.ObserveOptions])
def test_mistakes_are_one_error_that_names_recipe_and_key(
    here: Path, job: type, options: dict[str, Any], says: str
) -> None:
    path = written(here, **options)
    for use in (
        lambda: build(job, {"model": "M", "out": "o", "recipe": path}),
        lambda: rd.load_recipe(path),
    ):
        with pytest.raises(DataError) as caught:
            use()
        assert str(caught.value).startswith(f"recipe {path}, {says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("option: {}\nsources: [a.jsonl]", "does not know option (did you mean options?)"),
        ("options: [seed]\nsources: [{source: a.jsonl}]", "options is ['seed']; give names and"),
        ("options: {seed: 1\nsources: []", "is not YAML (line 2, column 8: "),
        ("description: 5\nsources: [{source: a.jsonl}]", "description is 5; it must be a text"),
    ],
)
def test_files_that_are_mistyped(here: Path, text: str, says: str) -> None:
    path = here / "mix.yaml"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        rd.load_recipe(path)
    assert says in str(caught.value)


def test_no_recipe_can_name_what_only_a_run_can(here: Path) -> None:
    """Whatever options there will be: those without a default never stand in a recipe."""
    allowed = set()
    for cls in (rd.PruneOptions, rd.SearchOptions, rd.CompareOptions, rd.ApplyOptions):
        for field in every_field(cls):
            try:
                rd.load_recipe(written(here, **{field.name: "x"}))
                allowed.add(field.name)
            except DataError as error:
                if "belongs to a run" not in str(error):
                    allowed.add(field.name)
    assert {"ratio", "packing", "mtp", "folds", "population"} <= allowed
    private = {"model", "out", "overwrite", "force_model", "device", "dtype", "batch_size", "stats"}
    private |= {"backend", "stream", "journal", "resume", "cache", "tasks", "trust_remote_code"}
    assert not allowed & private


def test_a_missing_option_is_still_the_jobs_error(here: Path) -> None:
    with pytest.raises(UsageError, match="`model` is required"):
        build(rd.PruneOptions, {"out": "o", "recipe": written(here, seed=1)})
