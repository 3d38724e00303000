"""The page needs no other file, escapes all names, and is the same for the same input."""

import dataclasses
import html
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from reap_driver.planning.plan import LayerPlan, Plan
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_driver.reporting.inputs import Inputs
from reap_driver.reporting.page import FILES, write_report
from reap_kernels import LayerStats, SaliencyStats
from reap_kernels.errors import PlanError
from tests.driver.reporting.conftest import LAYERS, Make, large

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append(tag)
        self.ids += [named["id"]] if named.get("id") else []  # type: ignore[list-item]
        self.references += [str(named[k]) for k in ("href", "xlink:href", "src") if named.get(k)]
        if named.get("role") == "img":
            self.images.append(named)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("which", ["report", "report_in_parts"])
def test_the_page_needs_nothing_but_itself(which: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(which)
    page = read(folder)
    assert len(page.ids) == len(set(page.ids))
    for reference in page.references:
        if reference.startswith("#"):
            assert reference[1:] in page.ids
        else:
            assert reference.startswith("data:image/png;base64,")
    source = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)|@import|<script|<link|<iframe", source)
    outside = set(re.findall(r'https?://[^"\s<]+', source))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert {path.name for path in folder.iterdir()} == set(FILES) - {"budget.png"}


def test_every_picture_has_words_and_every_table_headings(report: Path) -> None:
    page = read(report)
    assert len(page.images) == 2 * 5  # for wide and for narrow pages
    assert all(len(image["aria-label"] or "") > 40 for image in page.images)
    source = (report / "report.html").read_text(encoding="utf-8")
    for table in re.findall(r"<table>.*?</table>", source, re.DOTALL):
        assert "<caption>" in table
        assert 'scope="col"' in table
        assert 'scope="row"' in table


def test_the_figures_are_on_the_page(report: Path, make: Make) -> None:
    stats, plan = make()
    text = " ".join(read(report).text.split())
    assert "keeps 3 of 6 experts in each of 3 layers and removes 50.0 % of all" in text
    shares = {}
    for name in LAYERS:
        gates = stats.layers[name].router_weight_sum.sum(0)
        shares[name] = float(gates[list(plan.layers[name].kept)].sum() / gates.sum())
    worst = min(LAYERS, key=lambda name: shares[name])
    number = worst.split(".")[2]
    assert f"least in layer {number}, {100 * shares[worst]:.1f} %" in text
    assert "3 dead experts" in re.sub(
        r"(\d)\s*dead", r"\1 dead", text
    )  # the expert NEVER in each layer
    assert "66.7 %" in text  # 200 of 300 tokens belong to the group tools
    assert "/home/me" not in text
    assert "observe with --folds" in text


def test_statistics_in_parts_show_the_margin(report_in_parts: Path) -> None:
    text = read(report_in_parts).text
    assert "experts in the decision margin" in text
    assert "observe with --folds" not in text


@pytest.mark.parametrize("which", ["report", "report_in_parts"])
def test_words_are_defined_where_they_are_first_used(
    which: str, request: pytest.FixtureRequest
) -> None:
    """With advice: what to do where little of the mass is kept, or the margin is large."""
    text = " ".join(visible(request.getfixturevalue(which)).split())
    first = text.index("routing mass")
    assert text[first:].startswith("routing mass, which is the sum of the weights that the router")
    assert "Routing mass the sum, over all tokens" in text
    assert "let it lose fewer experts" in text
    if which == "report_in_parts":
        first = text.index("decision margin")
        assert "another sample of the data may decide otherwise" in text[first : first + 100]
        assert "Decision margin the experts that another sample of the same data would keep" in text
        assert "If it holds many experts, observe more data" in text
    else:
        assert "Near the cut experts whose score differs by less than 5 % from the cut" in text


def visible(folder: Path) -> str:
    """The words of a page, without its title and style, and those of pictures."""
    source = (folder / "report.html").read_text(encoding="utf-8")
    body = re.sub(r"<svg.*?</svg>", "", source.partition("<main>")[2], flags=re.DOTALL)
    return html.unescape(re.sub(r"<[^>]+>", " ", body))


def test_sizes_before_and_after(make: Make, tmp_path: Path) -> None:
    """As the statistics record them; older ones do not."""
    stats, plan = make()
    write_report(stats, tmp_path, plan)
    assert "parameters" not in visible(tmp_path)
    stats.provenance["model"] = {
        **stats.provenance["model"],
        "parameters": 1_000_000,
        "dtype": "bfloat16",
    }
    layers = stats.provenance["layers"]
    stats.provenance["layers"] = {
        name: {**facts, "expert_parameters": 10_000} for name, facts in layers.items()
    }
    write_report(stats, tmp_path, plan)
    text = " ".join(visible(tmp_path).split())
    assert "≈ 910k parameters of 1M before" in text  # 9 experts are removed
    assert "≈ 1.82 MB of weights in bfloat16 of 2.00 MB before" in text


def test_rows_are_blocks_on_phones_and_digests_are_folded(report: Path, make: Make) -> None:
    source = (report / "report.html").read_text(encoding="utf-8")
    start = r"<div class=.table stacked.[^>]*>\s*<table><caption><span>Layers to"
    [first] = re.findall(start + ".*?</table>", source, re.DOTALL)
    headings = re.findall(r'<th scope="col".*?>(.*?)</th>', first)
    for row in re.findall(r"<tr>(?!<th scope=.col).*?</tr>", first, re.DOTALL):
        assert re.findall(r'data-name="(.*?)"', row) == headings
    assert '<div class="table" role="region" tabindex="0" aria-label="All layers">' in source
    digest = make()[1].scores_digest
    assert f"<summary>{digest[:15]}...</summary>{digest}</details>" in source


def test_without_a_plan_nothing_is_cut(report: Path, make: Make, tmp_path: Path) -> None:
    shutil.copytree(report, tmp_path, dirs_exist_ok=True)
    assert (tmp_path / "margin.png").exists()
    written = write_report(make()[0], tmp_path)
    text = read(tmp_path).text
    assert "No plan was given" in text
    assert "removed" not in text.replace("removed ↓", "").split("Data and method")[-1]
    # What was written is returned, and what an earlier report had more is gone.
    assert written.page == tmp_path / "report.html"
    assert [path.name for path in written.pictures] == [
        "cut.png",
        "map.png",
        "groups.png",
        "load.png",
    ]
    assert list(written) == [written.page, *written.pictures]
    assert set(written) == set(tmp_path.iterdir())


def test_one_group_says_how_to_have_more(make: Make, tmp_path: Path) -> None:
    stats, plan = make(groups=["all"])
    write_report(stats, tmp_path, plan)
    assert "All data are in one group (all)" in read(tmp_path).text
    assert not (tmp_path / "groups.png").exists()


def test_live_traffic(make: Make, tmp_path: Path) -> None:
    """Statistics that a server has counted: no records, no sequences, no folds, notes."""
    stats, _ = make(groups=["all"])
    source = {"group": "all", "source": "vLLM 0.32.0 live traffic", "tokens": 700}
    stats.provenance["data"] = [source | {"counted_tokens": 700, "mode": "shadow", "every": 8}]
    stats.provenance["notes"] = ["cached prompts are not counted"]
    stats.provenance["backend"] = "vllm"
    write_report(stats, tmp_path)
    text = read(tmp_path).text
    assert "cached prompts are not counted" in text
    assert "live traffic, in the mode shadow, one step in 8" in text
    assert "name one in the header X-Reap-Group of each request" in text
    assert "--data GROUP=SOURCE" not in text
    assert "sequence length" not in text
    assert "records" not in text
    plan = make_plan(score(stats), 0.5)
    inputs = Inputs.checked(stats, plan, None)
    assert inputs.notes() == ["cached prompts are not counted"]
    assert "live traffic have no folds" in str(inputs.doubt)


def test_layers_may_keep_different_numbers_and_all(make: Make, tmp_path: Path) -> None:
    stats, plan = make(parts=True)
    layers = {
        **plan.layers,
        LAYERS[0]: LayerPlan.keeping(6, (0, 1, 2, 3, 5)),
        LAYERS[1]: LayerPlan.keeping(6, tuple(range(6))),
    }
    write_report(stats, tmp_path, dataclasses.replace(plan, layers=layers))
    assert (tmp_path / "budget.png").exists()
    text = read(tmp_path).text
    assert "keeps between 3 and 6 experts in each of 3 layers" in text
    assert "100.0\u00a0%" in text


def test_names_from_files_stay_text(make: Make, tmp_path: Path) -> None:
    evil = '<script>alert("x")</script>&amp;$x_1$'
    stats, _ = make(groups=[evil, "b"])
    stats.provenance["model"] = {**stats.provenance["model"], "id": evil}
    stats.provenance["software"] = {evil: evil}
    plan = dataclasses.replace(make_plan(score(stats), 0.5), allocation=evil, notes=[evil])
    write_report(stats, tmp_path, plan)
    page = read(tmp_path)
    assert "script" not in page.tags
    assert page.text.count(evil) > 5


def test_what_a_reader_must_know_is_noted(make: Make) -> None:
    stats, plan = make()
    assert Inputs.checked(stats, plan, None).notes() == []
    other = dataclasses.replace(plan, scores_digest="sha256:other", notes=["of the plan"])
    [of_plan, note] = Inputs.checked(stats, other, None).notes()
    assert of_plan == "of the plan"
    assert "digests differ" in note
    [note] = Inputs.checked(stats, plan, "frequency").notes()
    assert "The plan was made by reap; the scores shown are by frequency" in note
    stats.provenance["unobserved"] = ["vision.0.experts"]
    [*_, note] = Inputs.checked(stats, plan, None).notes()
    assert "No token reached 1 of the MoE layers" in note


def test_why_the_margin_is_not_known(make: Make) -> None:
    stats, plan = make()
    assert "observe with --folds 8" in str(Inputs.checked(stats, plan, None).doubt)
    stats, plan = make(parts=True)
    assert Inputs.checked(stats, plan, None).doubt is None
    assert "another criterion" in str(Inputs.checked(stats, plan, "frequency").doubt)
    largest = make_plan(score(stats, "max_activation"), 0.5)
    assert "not a function of sums" in str(Inputs.checked(stats, largest, None).doubt)


def test_parts_that_say_nothing_of_the_margin_are_no_obstacle(make: Make) -> None:
    """With one short sequence, all tokens of a layer are in one fold."""
    whole, plan = make()
    empty = [LayerStats(6, 2) for _ in LAYERS]
    parts = [whole, *(SaliencyStats(dict(zip(LAYERS, empty, strict=True)), whole.groups),) * 7]
    stats = SaliencyStats(whole.layers, whole.groups, whole.provenance, parts)
    inputs = Inputs.checked(stats, plan, None)
    assert inputs.doubt is not None
    assert "one part of the data holds all its tokens" in inputs.doubt
    assert inputs.uncertainty == {}
    assert inputs.near == "within 5 % of the cut"
    assert len(inputs.layers) == 3


@pytest.mark.parametrize("named", ["fewer", "more"])
def test_whole_layers_of_the_plan_or_the_statistics_alone(make: Make, named: str) -> None:
    """Layers that a plan does not name, and layers that no token reached, keep all experts."""
    stats, plan = make(parts=True)
    layers = dict(plan.layers)
    if named == "fewer":
        del layers[LAYERS[1]]
    else:
        layers["vision.experts"] = LayerPlan.keeping(4, (0, 1, 2, 3))
    inputs = Inputs.checked(stats, dataclasses.replace(plan, layers=layers), None)
    assert inputs.doubt is None
    assert len(inputs.layers) == 3


def test_a_group_that_missed_a_layer_is_said(make: Make, tmp_path: Path) -> None:
    stats, plan = make()
    layer = stats.layers[LAYERS[0]]
    layer.counts[:, 1], layer.sums[:, 1], layer.tokens[1] = 0, 0, 0
    write_report(stats, tmp_path, plan)
    assert "Not every group reached every layer" in read(tmp_path).text


def test_plans_of_other_models_are_refused(make: Make, tmp_path: Path) -> None:
    stats, plan = make()
    other = dataclasses.replace(plan, model={"id": "b", "config_digest": "sha256:1"})
    with pytest.raises(
        PlanError, match=r"for 'b' .there.*, but the statistics are of.*digest is sha256:1 there"
    ):
        write_report(stats, tmp_path, other)
    smaller = {**plan.layers, LAYERS[2]: LayerPlan.keeping(4, (0, 1))}
    with pytest.raises(PlanError, match="has 4 experts in the plan, but 6 in the statistics"):
        write_report(stats, tmp_path, dataclasses.replace(plan, layers=smaller))
    assert list(tmp_path.iterdir()) == []


def test_layers_a_plan_does_not_name_are_whole(make: Make, tmp_path: Path) -> None:
    stats, plan = make()
    fewer = dataclasses.replace(plan, layers={LAYERS[0]: plan.layers[LAYERS[0]]})
    [first, *others] = Inputs.checked(stats, fewer, None).layers
    assert first.retained < 1
    assert [(layer.retained, bool(layer.cut.kept.all())) for layer in others] == [(1, True)] * 2
    write_report(stats, tmp_path, fewer)
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_the_largest_models_fit(tmp_path: Path) -> None:
    stats = large(92, 512, ["code", "agentic", "math", "science", "chat"])
    plan = make_plan(score(stats), 0.5)
    write_report(stats, tmp_path, plan)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    read(tmp_path)


def narrowed(plan: Plan, *, whole: bool = False) -> Plan:
    """The plan with half of the neurons of every expert that it keeps, which may be all."""
    half = tuple(range(0, 12, 2))
    kept = {n: tuple(range(6)) if whole else layer.kept for n, layer in plan.layers.items()}
    return dataclasses.replace(
        plan,
        layers={n: LayerPlan.keeping(6, ids, 12, (half,) * len(ids)) for n, ids in kept.items()},
        settings={"shape": "auto", "width_multiple": 2, "ridge": 0.001},
        matrices={"digest": "sha256:0123456789abcdef"},
    )


def test_a_plan_that_removes_neurons(make: Make, tmp_path: Path) -> None:
    """What it leaves of them stands on the first screen, in the table and in the record."""
    stats, plan = make()
    parameters = 3 * 8 * 12  # of an expert: a gate, an up and a down projection
    facts = {"hidden_size": 8, "intermediate_size": 12, "expert_parameters": parameters}
    stats.provenance["layers"] = {
        name: {**known, **facts} for name, known in stats.provenance["layers"].items()
    }
    stats.provenance["model"] = {**stats.provenance["model"], "parameters": 10_000}
    write_report(stats, tmp_path, narrowed(plan))
    text = " ".join(read(tmp_path).text.split())
    assert (
        "keeps 3 of 6 experts in each of 3 layers (6 of 12 neurons of each) and removes 50.0 % of "
        "all experts and 75.0 % of all neurons"
    ) in text
    assert "6 of 12 neurons of each kept expert" in text
    left = 10_000 - 3 * (3 * parameters + 3 * parameters // 2)
    assert f"≈ {left / 1000:.2f}k parameters of 10k before" in text
    assert "Shape asked for (experts x neurons)auto" in text
    assert "Digest of the new down projectionssha256:01234567..." in text
    whole = tmp_path / "whole"
    whole.mkdir()
    write_report(stats, whole, plan)
    assert "neurons" not in read(whole).text


def test_a_plan_that_removes_neurons_alone(make: Make, tmp_path: Path) -> None:
    """There is no cut among experts, so nothing is said of one."""
    stats, plan = make(parts=True)
    written = write_report(stats, tmp_path, narrowed(plan, whole=True))
    text = " ".join(read(tmp_path).text.split())
    assert "18 experts in 3 MoE layers, scored by reap." in text
    assert "The plan keeps all of them, with 6 of 12 neurons of each." in text
    assert "the cut" not in text.lower().replace("the cut where the cut is", "")
    assert [path.stem for path in written.pictures] == ["cut", "map", "groups", "load"]
