"""Converting as users call it: formats, models, outputs and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import reap_driver as rd
from reap_driver.interchange.formats import FORMATS
from reap_kernels.errors import CheckpointError, DataError
from tests.driver import zoo
from tests.driver.writer import saved

Place = tuple[Path, rd.SaliencyStats, rd.Plan]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A checkpoint with a dense layer, its statistics and a plan, as files too."""
    root = tmp_path_factory.mktemp("convert")
    model = saved.save("qwen3_moe", root / "model")
    with rd.observe(model) as obs:
        obs(**zoo.tiny_inputs("qwen3_moe", model.config))
    stats = obs.stats
    stats.provenance["model"]["id"] = str(root / "model")
    stats.save(root / "stats.safetensors")
    plan = rd.make_plan(rd.score(stats), 0.5)
    plan.save(root / "plan.json")
    return root, stats, plan


def extra(to: str, root: Path) -> dict[str, Any]:
    """What a format needs besides."""
    return {"vllm-ascend-map": {"ep": 2}, "auto-round": {"bits": 3.0}}.get(to, {})


@pytest.mark.parametrize("to", [one.name for one in FORMATS.values() if one.writes])
def test_every_format_from_a_file(place: Place, tmp_path: Path, to: str) -> None:
    root = place[0]
    source = "stats.safetensors" if FORMATS[to].made_from == "stats" else "plan.json"
    out = tmp_path / f"file{FORMATS[to].suffix}"
    found = rd.convert(str(root / source), to, out=str(out), **extra(to, root))
    assert (found.out, found.to, found.from_) == (out, to, source.split(".")[0])
    assert out.stat().st_size > 0
    assert found.describe() == f"wrote {out}: {FORMATS[to].what}"
    named = FORMATS[to].named
    assert not named or f"looks for this file by the name {named}" in " ".join(found.notes)
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        rd.convert(str(root / source), to, out=str(out), **extra(to, root))


@pytest.mark.parametrize("name", [one.name for one in FORMATS.values() if one.reads])
def test_there_and_back(place: Place, tmp_path: Path, name: str) -> None:
    root, stats, plan = place
    one, model = FORMATS[name], root / "model"
    content = stats if one.holds == "stats" else plan
    path = tmp_path / "file.json"
    rd.convert(content, name, out=path)
    known = one.holds == "stats" or bool(one.keys)
    back = rd.convert(
        path, one.holds, model=model, out=tmp_path / "own", from_=None if known else name
    )
    assert (back.from_, back.to) == (name, one.holds)
    if one.holds == "plan":
        assert rd.Plan.load(tmp_path / "own").kept == plan.kept
        rd.apply(model, back.content, out=tmp_path / "cut")
        card = (tmp_path / "cut" / "README.md").read_text()
        assert "chosen by another tool, whose plan was imported, and removed" in card
        assert back.content.notes[0].split(" ")[0] in card
    else:
        again = rd.make_plan(rd.score(rd.SaliencyStats.load(tmp_path / "own")), 0.5)
        assert again.kept == plan.kept
        assert again.notes == back.content.provenance["notes"]
        rd.report(back.content, out=tmp_path / "page")
        with pytest.raises(DataError, match=r"`protect=super`: needs out_min, .* by their ids"):
            rd.plan(tmp_path / "own", 0.5, protect="super")
    assert any("imported from" in note for note in back.notes)


def test_from_one_foreign_format_to_another(place: Place, tmp_path: Path) -> None:
    root, _, plan = place
    rd.convert(plan, "riy", out=tmp_path / "a.json")
    rd.convert(tmp_path / "a.json", "hipfire", out=tmp_path / "b.json", model=root / "model")
    back = rd.convert(tmp_path / "b.json", "plan", model=root / "model")
    assert (back.out, back.describe()) == (None, "converted hipfire to a plan")
    assert back.content.kept == plan.kept


def test_imported_statistics_merge_but_not_with_our_own(place: Place, tmp_path: Path) -> None:
    root, stats, _ = place
    rd.convert(stats, "reap-reference", out=tmp_path / "o.pt")
    back = rd.convert(tmp_path / "o.pt", "stats", model=root / "model").content
    both = back.merge(back)
    assert both.missing == back.missing
    name = next(iter(both.layers))
    assert torch.equal(both.layers[name].count, 2 * back.layers[name].count)
    with pytest.raises(DataError, match="gate is"):
        back.merge(stats)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"to": "gguf"}, "`to=gguf`: no such format; choose one of stats, plan"),
    "unknown source": ({"to": "riy", "from_": "sglang"}, "`from_=sglang`: no such format"),
    "the same": ({"to": "plan"}, "SOURCE is of this format"),
    "no output": ({"to": "riy", "out": None}, "`out` is required"),
    "no devices": ({"to": "vllm-ascend-map"}, "`to=vllm-ascend-map`: needs `ep` besides"),
    "no use": ({"to": "riy", "ep": 2}, "`ep=2`: only with `to` as one of vllm-ascend-map"),
    "a criterion": ({"to": "riy", "criterion": "msan"}, "`criterion=msan`: only with `to`"),
    "a plan": ({"to": "hipfire", "plan": "plan.json"}, "`plan=...`: only with `to` as one of"),
    "a suffix": ({"to": "sglang", "out": "x.pt"}, "end it with .json"),
    "a plan for counts": ({"to": "sglang"}, "made from statistics, and SOURCE has a plan; give"),
    "a number": ({"source": 3, "to": "riy"}, "SOURCE is a int; give the name of a file"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_is_refused(place: Place, tmp_path: Path, why: str) -> None:
    given, message = REFUSED[why]
    words = {"source": place[0] / "plan.json", "out": tmp_path / "x.json", **given}
    with pytest.raises(rd.OptionError) as caught:
        rd.convert(words.pop("source"), words.pop("to"), **words)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{}", "stats, plan, reap-reference, riy"),
        ("[1]", "stats, plan, reap-reference"),
        ("nothing", "stats, plan, reap-reference"),
        ('{"pruned_experts": [], "kept_per_layer": 1, "keep": []}', "riy, hipfire-older"),
    ],
)
def test_a_source_that_is_not_known_is_asked_for(
    place: Place, tmp_path: Path, content: str, named: str
) -> None:
    (tmp_path / "x").write_text(content)
    with pytest.raises(rd.OptionError, match=f"does not say which format .* `from_`, .*{named}"):
        rd.convert(tmp_path / "x", "plan", model=place[0] / "model")


def test_what_is_no_file_has_no_format_to_give(place: Place) -> None:
    for source, to in ((place[1], "plan"), (place[2], "stats")):
        with pytest.raises(rd.OptionError, match="`from_=riy`: only with the name of a file"):
            rd.convert(source, to, from_="riy")


def test_a_foreign_file_needs_its_model(place: Place, tmp_path: Path) -> None:
    rd.convert(place[2], "riy", out=tmp_path / "p.json")
    with pytest.raises(rd.OptionError, match="give the model by `model`"):
        rd.convert(tmp_path / "p.json", "plan")


def test_another_model_is_refused(place: Place, tmp_path: Path) -> None:
    saved.save("mixtral", tmp_path / "other")
    with pytest.raises(DataError, match="is not the model of the plan: model_type is"):
        rd.convert(place[2], "hipfire", out=tmp_path / "x", model=tmp_path / "other")
    record = rd.record_of(zoo.tiny("mixtral")[1])
    own = {name: range(facts["num_experts"]) for name, facts in record["layers"].items()}
    other = rd.make_plan(own, 0.5, criterion="mine", of=record)
    with pytest.raises(DataError, match="the plan is not of the model of the statistics"):
        rd.convert(place[1], "sglang", out=tmp_path / "x.json", plan=other)
    (tmp_path / "other" / "x").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        rd.convert(tmp_path / "other" / "x", "plan", model=tmp_path / "other")


def test_what_is_written_says_what_it_holds(place: Place, tmp_path: Path) -> None:
    found = rd.convert(place[2], "riy", out=tmp_path / "p.json")
    assert found.facts() == {
        "out": str(tmp_path / "p.json"),
        "from": "plan",
        "to": "riy",
        "notes": [],
    }
    assert json.loads((tmp_path / "p.json").read_text())["version"] == 1
