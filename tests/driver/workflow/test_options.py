"""Options: what is unknown, of a wrong type or contradictory is refused, and flags follow them."""

import dataclasses
import inspect
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reap_driver as rd
from reap_driver.cli import arguments, main
from reap_driver.cli.main import build_parser
from reap_driver.workflow import calls, exchange_calls
from reap_driver.workflow.console import flags
from reap_driver.workflow.errors import OptionError
from reap_driver.workflow.fields import build, every_field, flat
from reap_driver.workflow.recipes import job_classes
from reap_kernels.errors import ReapError, UsageError

COMMANDS = {
    "prune": (rd.PruneOptions, rd.EstimateOptions),
    "observe": (rd.ObserveOptions,),
    "plan": (rd.PlanOptions,),
    "search": (rd.SearchOptions,),
    "apply": (rd.ApplyOptions,),
    "refit": (rd.RefitOptions,),
    "compare": (rd.CompareOptions,),
    "report": (rd.ReportOptions,),
}
# Of a dry run; that of observe says nothing of what pruning leaves.
ESTIMATED = {"machine", "tokens"}
GIVEN = {
    "model": "M",
    "data": ["a.jsonl"],
    "out": "o",
    "stats": "s",
    "plan": "p",
    "pruned": "q",
    "original": "M",
}


def given(cls: type, **changes: Any) -> dict[str, Any]:
    """What a class of options needs at least."""
    also = (
        ("out",) if cls is rd.ApplyOptions else ("data", "out")
    )  # which takes data to re-fit only
    names = {f.name for f in every_field(cls) if f.default is MISSING or f.name in also}
    return {name: value for name, value in (GIVEN | changes).items() if name in names}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_a_flag_with_its_default_and_help(command: str) -> None:
    [subparsers] = [a for a in build_parser()._actions if a.dest == "command"]
    parser = subparsers.choices[command]  # type: ignore[index]
    actions = {action.dest: action for action in parser._actions}
    fields = {f.name: f for cls in COMMANDS[command] for f in every_field(cls)}
    rest = set(actions) - set(fields)
    assert rest <= {"help", "json", "quiet", "dry_run", *ESTIMATED}
    assert set(actions) >= ESTIMATED or command not in ("observe", "prune")
    assert set(fields) <= set(actions)
    for name, field in fields.items():
        first = flags(field.metadata["help"])[:30].replace("%", "%%")
        assert actions[name].help is not None
        if field.metadata["positional"]:
            continue
        # What is not given is left to the class of options.
        assert actions[name].default == "==SUPPRESS=="
        assert first in actions[name].help or name in ("out", "model")


@pytest.mark.parametrize("cls", list(dict.fromkeys(c for cs in COMMANDS.values() for c in cs)))
def test_options_have_defaults_docstrings_and_survive_a_round(cls: type) -> None:
    made = build(cls, given(cls))
    assert dataclasses.is_dataclass(made)
    assert build(cls, flat(made)) == made
    documented = inspect.getdoc(cls) or ""
    for field in dataclasses.fields(cls):
        assert f"{field.name}: " in documented
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.model = "other"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("cls", "changes", "says"),
    [
        (
            rd.PruneOptions,
            {"seqlen": 3},
            "seqlen is no option of PruneOptions; did you mean `seq_len`",
        ),
        (rd.PruneOptions, {"zzz": 3}, "zzz is no option of PruneOptions; there are model,"),
        (rd.PruneOptions, {"max_len": 5}, "`max_len=5`: only with `packing='none'`"),
        (rd.PruneOptions, {"packing": "none", "seq_len": 5}, "`seq_len=5`: not together with"),
        (rd.PruneOptions, {"resume": True, "journal": False}, "`resume=True`: not together with"),
        (rd.PruneOptions, {"resume": "auto", "journal": False}, "`resume=auto`: not together"),
        (rd.ObserveOptions, {"resume": "auto", "out": None}, "`resume=auto`: needs `out`"),
        (rd.PruneOptions, {"normalize": "max"}, "`normalize=max`: only with"),
        (rd.PruneOptions, {"device_map": "auto", "device": "cpu"}, "`device_map=auto`: not"),
        (rd.PruneOptions, {"data": []}, "no data to run the model on"),
        (rd.PruneOptions, {"out": None}, "`out` is required"),
        (rd.PruneOptions, {"criterion": "best"}, "`criterion`: criterion 'best' is unknown"),
        (rd.PruneOptions, {"protect": "3:x"}, "`protect`: '3:x' is not super, LAYER:ID,ID"),
        (rd.PruneOptions, {"keep": 0}, "`keep=0`: give a whole number above 0"),
        (rd.PruneOptions, {"keep": 4, "ratio": 0.5}, "`keep`: not together with `ratio`; give one"),
        (rd.SearchOptions, {"keep": 4, "fits": 9}, "`fits`: not together with `keep`; give one"),
        (rd.PlanOptions, {"fits": "16XB"}, "`fits=16XB`: not a size such as 5GB, 800MB or 4GiB"),
        (rd.PlanOptions, {"fits": "0GB"}, "`fits=0GB`: not a size"),
        (rd.PlanOptions, {"fits": 0}, "`fits=0`: give a whole number above 0"),
        (rd.PlanOptions, {"target_size": "-5GB"}, "`target_size=-5GB`: not a size"),
        (rd.ApplyOptions, {"shard_size": "5 apples"}, "`shard_size=5 apples`: not a size"),
        (rd.PruneOptions, {"context": 9}, "`context=9`: only with `fits`, or with --dry-run"),
        (rd.PruneOptions, {"context": 0, "fits": 9}, "`context=0`: give a whole number above 0"),
        (rd.PlanOptions, {"model": "M"}, "`model=M`: only with `target_size`, `fits` or `shape`"),
        (rd.PruneOptions, {"batch_size": 0}, "`batch_size=0`: give a whole number above 0"),
        (rd.PruneOptions, {"skip_first": -1}, "`skip_first=-1`: give 0 or more"),
        (rd.PruneOptions, {"shard_size": "big"}, "`shard_size=big`: not a size such as 5GB"),
        (rd.PruneOptions, {"shard_size": 0}, "`shard_size=0`: give a whole number above 0"),
        (rd.EstimateOptions, {"tokens": "few"}, "`tokens=few`: not a whole number such as 24M"),
        (rd.EstimateOptions, {"tokens": 5}, "`tokens=5`: not together with `data`"),
        (rd.EstimateOptions, {"data": ()}, "no data to plan for"),
        (rd.ApplyOptions, {"as_masks": "m"}, "give one of `out` and `as_masks`"),
        (rd.ApplyOptions, {"resume": "auto"}, "`resume=auto`: only with `refit`, which runs the"),
        (rd.ApplyOptions, {"hold_out_group": "x"}, "`hold_out_group=x`: only with `refit`"),
        (rd.ApplyOptions, {"dtype": "float32"}, "`dtype=float32`: only with `refit`"),
        (rd.ApplyOptions, {"recipe": "reap-coding"}, "`recipe=reap-coding`: only with `refit`"),
        (rd.ApplyOptions, {"refit": True}, "no data to run the model on; give `data`"),
        (rd.SearchOptions, {"stream": "always"}, "`stream='always'`: a search needs"),
        (rd.SearchOptions, {"elites": 40}, "`elites=40`: give fewer than the population of 32"),
        (rd.SearchOptions, {"validation": 1.5}, "`validation=1.5`: give 0, or a share from"),
        (rd.SearchOptions, {"validation": float("nan")}, "`validation=nan`: give 0, or a share"),
        (rd.SearchOptions, {"resume": True, "out": None}, "`resume=True`: needs `out`"),
        (rd.CompareOptions, {"tokens": 3, "sequences": 3}, "`tokens`: not together with"),
    ],
)
def test_options_that_cannot_be(cls: type, changes: dict[str, Any], says: str) -> None:
    values = given(cls) | changes
    with pytest.raises(OptionError) as caught:
        build(cls, values)
    assert str(caught.value).startswith(says)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seq_len": "9"}, "DataOptions: seq_len is '9', a str; expected int or None"),
        ({"packing": "some"}, "expected one of 'concat', 'isolated', 'none'"),
        ({"overwrite": 1}, "PruneOptions: overwrite is 1, a int"),
        ({"ratio": "half"}, "RankOptions: ratio is 'half', a str; expected float or None"),
    ],
)
def test_options_of_a_wrong_type(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(rd.PruneOptions, given(rd.PruneOptions) | changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16 gb", 16 * 10**9),
        ("16G", 16 * 10**9),
        ("16GiB", 16 * 2**30),
        ("1.5TB", 15 * 10**11),
        ("1.1kB", 1100),
        ("0.5KiB", 512),
        ("3MiB", 3 * 2**20),
        ("16.1GiB", 17287243366),
        ("4096B", 4096),
    ],
)
def test_sizes_are_bytes_or_text_in_powers_of_1000_or_1024(text: str, size: int) -> None:
    assert rd.RankOptions(fits=text).fits == size == rd.RankOptions(fits=size).fits
    assert rd.RankOptions(target_size=text).limit == ("target_size", size)
    assert rd.WriteOptions(shard_size=text).shard_size == size
    assert rd.RankOptions(keep=3).limit is None


def test_classes_of_options_can_be_given_whole() -> None:
    run = rd.RunOptions(device="cpu", batch_size=2)
    data = rd.DataOptions(data="code.jsonl", seq_len=64)
    made = build(rd.ObserveOptions, {"model": Path("M"), "run": run, "data": data})
    assert (made.run, made.data, made.model) == (run, data, "M")
    assert data.sources == ("code.jsonl",)


def test_protected_experts_in_all_their_forms() -> None:
    forms = ["super", "3:17,40", Path("ids.json"), "ids.yaml", ("0", (1,))]
    made = rd.RankOptions(protect=forms)
    expected = ("super", ("3", (17, 40)), Path("ids.json"), Path("ids.yaml"), ("0", (1,)))
    assert made.protected == expected
    assert rd.RankOptions(protect={"0": [1, 2]}).protected == (("0", (1, 2)),)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`seq_len=9`: give `resume=True`", "--seq-len 9: give --resume"),
        ("or `journal=False`, `packing='none'`", "or --no-journal, --packing none"),
        ("`as_masks` and `reap-kernels doctor`", "--as-masks and `reap-kernels doctor`"),
        ("`pruned` and `other=3` stay", "`pruned` and `other=3` stay"),
    ],
)
def test_options_in_texts_become_flags(text: str, shown: str) -> None:
    assert flags(text) == shown


def test_calls_show_the_options_of_their_job() -> None:
    functions = [
        f for m in (calls, exchange_calls) for f in vars(m).values() if hasattr(f, "options")
    ]
    assert {f.options for f in functions} == set(job_classes())
    for function in functions:
        shown = inspect.signature(function).parameters
        assert set(shown) == {*(f.name for f in every_field(function.options)), "progress"}


def test_flags_are_read_as_options() -> None:
    words = ["prune", "M", "--data", "a", "--data", "g=b", "--shard-size", "5GB", "--no-cache"]
    args = build_parser().parse_args([*words, "--out", "o", "--weights", "a=0.5,g=1"])
    made = arguments.read(rd.PruneOptions, args)
    assert made.data.sources == ("a", "g=b")
    assert (made.write.shard_bytes, made.data.cache) == (5 * 10**9, False)
    assert made.rank.weights == {"a": 0.5, "g": 1.0}
    assert made.run == rd.RunOptions()
    assert made.journal.resume is False
    for more, value in {("--resume",): True, ("--resume", "auto"): "auto"}.items():
        args = build_parser().parse_args([*words, "--out", "o", *more])
        assert arguments.read(rd.PruneOptions, args).journal.resume == value
    with pytest.raises(
        main.UsageError, match="'M' is not auto; put --resume alone behind the other"
    ):
        build_parser().parse_args(["prune", "--resume", "M", "--data", "a", "--out", "o"])


VALUES = [
    None, 3, -1, 0.5, float("nan"), True, "text", "", b"x", [1, 2], [], ["a"], ("a", 1), {"a": 1},
    {1: [2]}, {"a": {"b": 1}}, torch.ones(2), np.ones(2), int, len, Path("none/such"), object(),
]  # fmt: skip


@pytest.mark.parametrize("cls", list(dict.fromkeys(c for cs in COMMANDS.values() for c in cs)))
def test_no_value_of_an_option_ends_in_a_traceback(cls: type) -> None:
    """It is taken, or refused with an error that names the option."""
    taken, refused = 0, 0
    unnamed: list[Any] = []
    for field in every_field(cls):
        for value in VALUES:
            try:
                build(cls, given(cls) | {field.name: value})
                taken += 1
            except ReapError as error:
                refused += 1
                unnamed += [(value, error)] if field.name not in str(error) else []
    assert taken
    assert refused > taken
    assert not [value for value, error in unnamed if "no data" not in str(error)]
