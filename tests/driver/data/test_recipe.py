"""Recipes: every key and every error, and the included recipes on records with the data
sets' fields.
"""

import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from reap_driver.data.encode import Encoder
from reap_driver.data.sampling import read_records
from reap_driver.data.source import DataSource, HubDataset
from reap_driver.workflow.recipes import load_recipe, recipe_names
from reap_kernels.errors import DataError


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "mine.jsonl.gz").write_bytes(b"")
    (tmp_path / "owner" / "local").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("ending", ["yaml", "yml", "json"])
def test_every_key(here: Path, ending: str) -> None:
    path = here / f"mix.{ending}"
    sources = [
        {"source": "mine.jsonl.gz"},
        {"source": "owner/local", "group": "here", "samples": 7, "tools": [{"name": "f"}]},
        {"source": "owner/name[a](b)@c", "tokens": "2M"},
        {"source": "owner/name", "subset": "a", "split": "b", "revision": "c", "tokens": 5},
        {"source": "owner/name", "files": ["x.json", "y.json"], "tokens": "1.5ktok", "samples": 3},
    ]
    path.write_text(json.dumps({"description": "all keys", "sources": sources}))
    full = HubDataset("owner/name", "a", "b", "c")
    expected = [
        DataSource(here / "mine.jsonl.gz", "mine"),
        DataSource(here / "owner/local", "here", 7, tools='[{"name": "f"}]'),
        DataSource(full, "a", tokens=2_000_000),
        DataSource(full, "a", tokens=5),
        DataSource(HubDataset("owner/name", files=("x.json", "y.json")), "name", 3, 1500),
    ]
    assert list(load_recipe(path).sources) == expected
    path.write_text(json.dumps(sources))
    assert list(load_recipe(path).sources) == expected


def test_yaml_as_people_write_it(here: Path) -> None:
    path = here / "mix.yaml"
    path.write_text("sources:  # of mine\n  - source: mine.jsonl.gz\n    samples: 10\n")
    assert list(load_recipe(str(path)).sources) == [DataSource(here / "mine.jsonl.gz", "mine", 10)]


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        (
            {"source": "mine.jsonl.gz", "sample": 5, "x": 1},
            "does not know sample, x .did you mean samples..; the keys are ",
        ),
        ({"samples": 5}, "has no `source`; give a path or a hub data set"),
        ("mine.jsonl.gz", "is 'mine.jsonl.gz'; give an object with source, group, samples"),
        ({"source": "none.jsonl"}, "no file or folder '.*none.jsonl'; give"),
        ({"source": 5}, "source is 5; it must be a text"),
        ({"source": "mine.jsonl.gz", "group": 5}, "group is 5; it must be a text"),
        (
            {"source": "mine.jsonl.gz", "samples": 0},
            "samples is 0; it must be a whole number above",
        ),
        (
            {"source": "mine.jsonl.gz", "samples": True},
            "samples is True; it must be a whole number",
        ),
        ({"source": "mine.jsonl.gz", "samples": "7"}, "samples is '7'; it must be a whole number"),
        ({"source": "mine.jsonl.gz", "tokens": "many"}, "tokens is 'many'; .*, or such as 2M$"),
        ({"source": "mine.jsonl.gz", "split": "a"}, "split does not apply to .*mine.jsonl.gz, w"),
        ({"source": "o/n(a)", "split": "a"}, "names split in `source` and as a key; leave one"),
        ({"source": "o/n", "files": "a.json"}, "files is 'a.json'; it must be a list of names"),
        ({"source": "o/n", "tools": ["f"]}, r"tools is \['f'\]; it must be a list of objects"),
    ],
)
def test_mistakes_are_named_by_file_source_and_key(here: Path, entry: Any, says: str) -> None:
    path = here / "mix.json"
    path.write_text(json.dumps([{"source": "mine.jsonl.gz"}, entry]))
    with pytest.raises(DataError, match=rf"^recipe .*mix.json, source 2: {says}"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("mix.yaml", "sources: [", r"mix.yaml is not YAML \(.*line 1"),
        ("mix.json", "{", r"mix.json is not JSON \(.*line 1"),
        ("mix.yaml", "a: !!python/name:os.system", "mix.yaml is not YAML"),
        ("mix.yaml", "", "has no list of sources; give `sources`"),
        ("mix.yaml", "sources: []", "has no list of sources"),
        ("mix.yaml", "sources: owner/name", "has no list of sources"),
        ("mix.yaml", "data: []", "does not know data; the keys are description, options, sources"),
    ],
)
def test_files_that_are_no_recipes(here: Path, name: str, content: str, says: str) -> None:
    (here / name).write_text(content)
    with pytest.raises(DataError, match=rf"^recipe .*{says}"):
        load_recipe(here / name)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    names = ["packed-40-30-10-20", "reap-coding", "reap-reasoning"]
    assert recipe_names() == names
    with pytest.raises(
        DataError, match=f"recipe 'none': no such file.*; give .* {', '.join(names)}"
    ):
        load_recipe("none")


def test_a_file_comes_before_a_recipe_of_its_name(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    (here / "reap-coding").write_text("[{source: mine.jsonl.gz}]")
    assert [source.group for source in load_recipe("reap-coding").sources] == ["mine"]


# Two records per data set, with the fields that its card names and invented content.
_CALL = {
    "type": "function",
    "id": "c1",
    "function": {"name": "bash", "arguments": '{"command": 1}'},
}
_TRAJECTORY = [
    {"role": "system", "content": "You use tools.", "agent": "main", "message_type": "system"},
    {"role": "user", "content": [{"type": "text", "text": "Fix it."}], "agent": "main"},
    {"role": "assistant", "content": "I look.", "thought": "I look.", "tool_calls": [_CALL]},
    {"role": "tool", "content": [{"type": "text", "text": "ok"}], "tool_call_ids": ["c1"]},
]
_TOOL = {"name": "f", "description": "F.", "parameters": {"a": {"type": "int", "description": "A"}}}
_THOUGHT = {
    "messages": [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>t</think>a"},
    ],
    "num_tokens": 3,
    "source": "s",
}
ROWS: dict[str, dict[str, Any]] = {
    "theblackcat102/evol-codealpaca-v1": {"output": "b", "instruction": "a"},
    "Salesforce/xlam-function-calling-60k": {
        "id": 1,
        "query": "q",
        "answers": json.dumps([{"name": "f", "arguments": {"a": 1}}]),
        "tools": json.dumps([_TOOL]),
    },
    "SWE-bench/SWE-smith-trajectories(tool)": {
        "messages": json.dumps(_TRAJECTORY),
        "instance_id": "i",
        "resolved": True,
        "model": "m",
        "traj_id": "t",
        "patch": "",
    },
    **{f"open-r1/Mixture-of-Thoughts[{name}]": _THOUGHT for name in ("code", "math", "science")},
    "togethercomputer/CoderForge-Preview[trajectories](filtered_reward1)": {
        "trajectory_id": "t",
        "finish_reason": "submit",
        "image": "i",
        "messages": json.dumps(_TRAJECTORY),
        "reward": 1.0,
        "tools": json.dumps([{"type": "function", "function": {"name": "bash"}}]),
        "license": "MIT",
    },
    "bigcode/the-stack-smol": {
        "content": "def f(): ...",
        "avg_line_length": 12.0,
        "max_line_length": 12,
        "alphanum_fraction": 0.5,
        "licenses": ["mit"],
        "repository_name": "r",
        "path": "a.py",
        "size": 12,
        "lang": "Python",
    },
    "allenai/c4": {"text": "t", "timestamp": "2019", "url": "u"},
    "NeelNanda/pile-10k": {"text": "t", "meta": {"pile_set_name": "s"}},
}


@pytest.mark.parametrize(
    ("name", "groups", "samples", "tokens"),
    [
        ("reap-coding", ["code", "tools", "agents"], 1360, 0),
        (
            "reap-reasoning",
            ["code", "tools", "reasoning-code", "reasoning-math", "reasoning-science", "agents"],
            24576,
            0,
        ),
        ("packed-40-30-10-20", ["agents", "code", "web", "mixed"], 1000, 231 * 2048),
    ],
)
def test_included_recipes_read_what_the_data_sets_have(
    name: str,
    groups: list[str],
    samples: int,
    tokens: int,
    encoder: Encoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = load_recipe(name).sources
    assert [source.group for source in sources] == groups
    assert sum(source.samples or 0 for source in sources) == samples
    assert sum(source.tokens or 0 for source in sources) == tokens

    def load(hub: str, subset: str | None, *, split: str, **rest: Any) -> Any:
        wanted = HubDataset(hub, subset, None if split == "train" else split)  # of c4, one file
        return datasets.Dataset.from_list([ROWS[str(wanted)]] * 2)

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in sources:
        records = list(read_records(source, 0))
        documents = list(encoder.encode(records))
        assert len(documents) == 2
        assert documents[0].ids


def test_tools_of_a_recipe_are_for_records_without(here: Path) -> None:
    path = here / "a.jsonl"
    rows = [{"text": "a"}, {"text": "b", "tools": [{"name": "g"}]}, {"text": "c", "tools": []}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = here / "mix.json"
    recipe.write_text(json.dumps([{"source": "a.jsonl", "tools": [{"name": "f"}]}]))
    [source] = load_recipe(recipe).sources
    found = [record.fields["tools"] for record in read_records(source, 0)]
    assert found == ['[{"name": "f"}]', [{"name": "g"}], '[{"name": "f"}]']


BOMB = "a: &a [1, 1]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdefghij", "bcdefghijk", strict=True)
)
HOSTILE: dict[str, tuple[str, str]] = {
    "aliases": (BOMB, r"anchor or alias 'a' in line 1"),
    "recursive": ("&a [*a]", "anchor or alias 'a'"),
    "deep flow": ("[" * 50_000, "is nested too deeply"),
    "deep blocks": ("- " * 2000, "is nested too deeply"),
    "deep maps": ("".join(" " * n + "a:\n" for n in range(300)), "is nested deeper than 64"),
    "large": ("#" * 2**18 + "\n", "is larger than 262144 bytes"),
    "twice": ("sources: []\nsources: [a]", "has the name 'sources' twice"),
    "two kinds of one name": ("1: a\n'1': b", "has the name '1' twice"),
    "a list as a name": ("? [1]\n: 2", "names are texts"),
    "merge": ("<<: {a: 1}", "does not know <<"),
    "nan": ("- {source: mine.jsonl.gz, samples: .nan}", "holds the number nan"),
    "infinity": ("- {source: mine.jsonl.gz, samples: 1e999}", "1e999|holds the number inf"),
    "digits": (f"- {{source: mine.jsonl.gz, samples: {'9' * 5000}}}", "cannot be read"),
    "above 64 bits": (f"- {{source: mine.jsonl.gz, samples: {'9' * 30}}}", "64 bits"),
    "hexadecimal": (f"- {{source: mine.jsonl.gz, samples: 0x{'f' * 9000}}}", "64 bits"),
    "surrogate": ('- {source: mine.jsonl.gz, group: "\\ud800"}', "surrogate"),
    "no number": ("- !!int x", "that cannot be read"),
    "no truth": ("- !!bool x", "that cannot be read"),
    "no time": ("- !!timestamp x", "is not YAML"),
    "bytes": ("- {source: mine.jsonl.gz, group: !!binary aGk=}", "is not YAML"),
    "a set": ("!!set {a, b}", "is not YAML"),
    "not text": ("\0", "is not YAML"),
    "empty entry": ("- ''", "source 1: is ''; give an object"),
    "empty source": ("- {source: ''}", "source 1: source is ''; it must be a text"),
    "empty group": ("- {source: mine.jsonl.gz, group: ''}", "group is ''; it must be a text"),
    "empty file": ("- {source: o/n, files: ['']}", "files is .*; it must be a list of names"),
    "empty tokens": ("- {source: mine.jsonl.gz, tokens: ''}", "tokens is ''; it must be a whole"),
    "null": ("[null]", "source 1: is None; give an object"),
    "no keys of text": ("- {1: 2}", "source 1: does not know 1"),
    "long name": (f"- {{source: {'x' * 5000}}}", "source 1: no file or folder"),
    "zero in a name": ('- {source: "a\\0.jsonl"}', "source 1: no file or folder"),
    "a loop": ("- {source: loop.jsonl}", "source 1: no file or folder"),
    "a pipe": ("- {source: pipe.jsonl}", "source 1: is neither file nor folder"),
    "no home": ("- {source: ~nobody-of-that-name/a.jsonl}", "source 1: no folder"),
    "tokens without end": (f"- {{source: mine.jsonl.gz, tokens: {'9' * 20}M}}", "tokens is '9"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_recipes_are_one_short_error(here: Path, case: str) -> None:
    content, says = HOSTILE[case]
    (here / "loop.jsonl").symlink_to(here / "loop.jsonl")
    os.mkfifo(here / "pipe.jsonl")
    path = here / "mix.yaml"
    path.write_text(content)
    with pytest.raises(DataError, match=rf"^recipe .*mix.yaml.*({says})") as caught:
        load_recipe(path)
    assert len(str(caught.value).encode()) < 1200


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b'[{"source": "\\ud800"}]', b"[" * 10**5])
@pytest.mark.parametrize("ending", ["json", "yaml"])
def test_bytes_that_are_no_recipe(here: Path, content: bytes, ending: str) -> None:
    path = here / f"mix.{ending}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"^recipe .*mix"):
        load_recipe(path)


@pytest.mark.parametrize("name", ["x" * 300, "a\0", "loop.yaml", "pipe.yaml", ".", "", "y/" * 3000])
def test_names_that_are_no_recipe(here: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    (here / "loop.yaml").symlink_to(here / "loop.yaml")
    os.mkfifo(here / "pipe.yaml")
    with pytest.raises(DataError, match=r"^recipe '.*: no such file"):
        load_recipe(name)
