"""The bundled model is what its card says, splits share no text, and the demo runs end to end."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import tomllib
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

import pytest
import torch
from matplotlib import pyplot as plt
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo_model import measure
from bench.demo_model.measure import unigram_loss
from bench.demo_model.specialization import (
    domain_information,
    routers,
    routing_shares,
    without_experts,
)
from bench.demo_model.train import (
    Recipe,
    as_matrices,
    balance_loss,
    batches,
    build_model,
    learning_rate,
    save,
    token_streams,
    train,
    train_tokenizer,
)
from reap_driver.demo import corpus
from reap_driver.demo import run as demo
from reap_driver.demo.evaluate import evaluate, token_windows
from reap_driver.demo.run import run_demo
from reap_driver.demo.table import format_report
from reap_driver.planning.plan import Plan
from reap_kernels.errors import DataError
from reap_kernels.stats import SaliencyStats

MODEL = Path(corpus.__file__).parent / "model"
ROOT = Path(__file__).parent.parent.parent


def test_the_card_states_the_license_that_its_script_writes() -> None:
    card = (MODEL / "README.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"\nlicense: {project['license'].lower()}\n" in card.partition("\n---\n")[0]
    section = card[card.index("## License") : card.index("## Measured on")]
    assert section in measure._CARD


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def documents():
    return corpus.load_corpus()


@pytest.fixture(scope="module")
def everything():
    return corpus.load_corpus(corpus.SPLITS)


@pytest.fixture(scope="module")
def windows(documents, tokenizer):
    held_out = [d for d in documents if d.split == "held_out"]
    return token_windows(held_out, tokenizer, per_domain=8, length=256)


# --- text ---------------------------------------------------------------------------------------


def test_splits_share_no_name_and_no_paragraph(everything):
    names: dict[str, set[str]] = {s: set() for s in corpus.SPLITS}
    paragraphs: dict[str, set[str]] = {s: set() for s in corpus.SPLITS}
    for d in everything:
        names[d.split].add(d.name)
        long = (p.strip() for p in d.text.split("\n\n"))
        paragraphs[d.split].update(p for p in long if len(p) >= 40)
    for a, b in (("train", "calibration"), ("train", "held_out"), ("calibration", "held_out")):
        assert not names[a] & names[b]
        assert not paragraphs[a] & paragraphs[b]
    assert {(d.split, d.domain) for d in everything} == {
        (s, d) for s in corpus.SPLITS for d in corpus.DOMAINS
    }


def test_held_out_text_does_not_depend_on_what_else_is_read(everything, documents):
    assert [d for d in everything if d.split != "train"] == documents


def _library(root: Path, modules: dict[str, str]) -> Path:
    for name, text in modules.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_code_and_docstrings_are_separated(tmp_path):
    source = '"""Module."""\n\ndef f(x):\n    """Double x."""\n    return 2 * x  # not 3\n'
    modules = {f"module{i}.py": f"{source}\nNUMBER = {i}\n" for i in range(30)}
    modules["encodings/cp1.py"] = "boilerplate = 1\ndecoding_table = (\n    'a' # 0x00\n)\n"
    modules["pydoc_data/topics.py"] = "topics = {'if': 'The if statement'}\n"
    modules["test/test_f.py"] = modules["site-packages/other.py"] = source
    modules["broken.py"] = "def f(:\n"
    documents = corpus.load_corpus(corpus.SPLITS, stdlib=_library(tmp_path, modules))
    texts = {(d.domain, d.name): d.text for d in documents}
    code = next(d for d in documents if d.domain == "code" and d.split == "held_out")
    assert "return 2 * x  # not 3" in code.text
    assert "Double" not in code.text
    docs = next(d for d in documents if d.domain == "docstrings" and d.split == "held_out")
    assert docs.text.split() == ["Module.", "Double", "x."]
    assert texts["tables", "encodings.cp1"].startswith("decoding_table")
    assert texts["reference", "if"] == "The if statement\n"
    assert not {"test.test_f", "site-packages.other", "broken"} & {d.name for d in documents}


def test_a_module_keeps_its_split_when_it_becomes_private_or_a_package():
    stable = corpus._stable_name
    assert stable("_pydatetime") == stable("datetime") == "datetime"
    assert stable("_strptime") == "strptime"
    assert stable("__future__") == "_future__"  # one underscore only: it stays itself


def test_a_library_without_sources_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"found 0 documents.*use a Python installation"):
        corpus.load_corpus(stdlib=tmp_path)


def test_windows_need_enough_text(documents, tokenizer):
    with pytest.raises(DataError, match=r"'code' has \d+ tokens, 1000000 windows"):
        token_windows(documents, tokenizer, per_domain=1_000_000, length=256)


# --- the model ----------------------------------------------------------------------------------


def test_model_is_a_small_qwen3_moe_in_the_published_format():
    assert sum(f.stat().st_size for f in MODEL.rglob("*") if f.is_file()) <= 8_000_000
    config = json.loads((MODEL / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe"
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_experts"] >= 16
    assert "num_local_experts" not in config


def test_the_card_states_how_the_weights_were_trained():
    card = (MODEL / "README.md").read_text()
    record = json.loads((MODEL / "training.json").read_text())
    assert record["note"] in card
    assert f"{record['parameters']:,} parameters" in card
    assert f"read {record['tokens_seen']:,} tokens" in card
    for module in re.findall(r"python -m ([\w.]+)", card):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def test_model_predicts_held_out_text(model, windows):
    result = evaluate(model, windows)
    unigram = math.exp(unigram_loss(windows, model.config.vocab_size))
    card = (MODEL / "README.md").read_text()
    recorded = float(re.search(r"^\| perplexity \| ([\d.]+)", card, re.MULTILINE)[1])
    assert result.perplexity < unigram / 10
    assert max(result.domain_loss.values()) < math.log(unigram) - 1
    # other windows and, on another Python version, other text than the card's: only near it
    assert result.perplexity == pytest.approx(recorded, rel=0.35)
    assert result.agreement == 1.0
    assert result.tokens == 4 * 8 * 255


def test_experts_are_all_used_and_differ_by_domain(model, windows):
    shares = routing_shares(model, windows)
    layers, domains, experts = shares.shape
    assert (layers, domains, experts) == (
        model.config.num_hidden_layers,
        len(corpus.DOMAINS),
        model.config.num_experts,
    )
    torch.testing.assert_close(shares.sum(-1), torch.ones(layers, domains, dtype=torch.float64))
    assert (shares.mean(1) > 0.02 / experts).all(), "an expert is as good as dead"
    # log2(4) = 2 bits would be experts that serve one domain only
    information = domain_information(shares)
    assert (information > 0.05).all()
    assert information.mean() > 0.15


def test_information_of_uniform_and_of_exclusive_experts():
    uniform = torch.full((1, 4, 8), 1 / 8, dtype=torch.float64)
    exclusive = torch.eye(4, dtype=torch.float64).repeat_interleave(2, dim=1)[None] / 2
    assert domain_information(uniform).item() == 0
    assert domain_information(exclusive).item() == pytest.approx(2)


def test_removed_expert_receives_nothing_and_returns_afterwards(model, windows):
    one = {"code": windows["code"][:2]}
    before = evaluate(model, one)
    busiest = int(routing_shares(model, one)[1, 0].argmax())
    with without_experts(routers(model)[1], [busiest]):
        shares = routing_shares(model, one)
        without = evaluate(model, one, reference=before)
    assert shares[1, 0, busiest] == 0
    assert shares[1, 0].sum() == pytest.approx(1)
    assert without.loss != before.loss
    assert 0.5 < without.agreement < 1
    assert evaluate(model, one).loss == before.loss


# --- training -----------------------------------------------------------------------------------


def test_balance_loss_is_one_when_balanced_and_experts_when_collapsed():
    even = torch.zeros(8, 4)
    assert balance_loss(even, torch.arange(8).reshape(8, 1) % 4).item() == pytest.approx(1)
    collapsed = torch.tensor([[50.0, 0, 0, 0]]).repeat(8, 1)
    assert balance_loss(collapsed, torch.zeros(8, 1, dtype=torch.long)).item() == pytest.approx(4)


def test_batches_follow_the_mixture_without_repeating_a_window():
    recipe = Recipe(batch=4, seq_len=8, mixture=(1.0, 0.0, 0.0, 0.0))
    streams = {d: torch.arange(8 * 20 + 8) for d in corpus.DOMAINS}
    source = batches(streams, recipe)
    epoch = torch.stack([next(source) for _ in range(4)]).reshape(16, 8)
    assert len({int(row[0]) for row in epoch}) == 16
    assert (epoch.diff(dim=1) == 1).all()


def test_learning_rate_warms_up_and_decays():
    recipe = Recipe(steps=100, warmup=10)
    rates = [learning_rate(s, recipe) for s in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.03


def test_training_learns_and_saves_the_published_format(tmp_path):
    text = {
        d: f"{d} " + "the quick brown fox jumps over the lazy dog; " * 40 for d in corpus.DOMAINS
    }
    documents = [corpus.Document(d, d, "train", t) for d, t in text.items()]
    recipe = Recipe(vocab_size=300, hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=16,
                    experts=8, experts_per_token=2, expert_size=16, seq_len=32, batch=4, steps=30,
                    warmup=5)  # fmt: skip
    tokenizer = train_tokenizer(documents, recipe.vocab_size)
    losses = train(small := build_model(recipe), token_streams(documents, tokenizer, 0), recipe)
    assert losses[0] == pytest.approx(math.log(300), rel=0.1)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
    save(small, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_experts"] == 8
    assert "num_local_experts" not in config
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in small.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    again = AutoTokenizer.from_pretrained(tmp_path)
    sentence = "naïve dog 犬\n\t\tindent"
    assert again.decode(again(sentence)["input_ids"]) == sentence
    chat = [{"role": "user", "content": "fox?"}]
    shown = again.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert shown == "user: fox?\n\nassistant: "


def test_muon_updates_each_matrix_of_stacked_experts_by_itself():
    torch.manual_seed(0)
    start, target = torch.randn(3, 8, 6), torch.randn(3, 8, 6)
    stack = torch.nn.Parameter(start.clone())
    alone = [
        torch.nn.Parameter(half.clone()) for expert in start for half in expert.chunk(2, dim=0)
    ]
    matrices = as_matrices(stack, blocks=2)
    for parameters, loss in (
        (matrices, (stack * target).square().sum()),
        (alone, (torch.cat(alone).view_as(target) * target).square().sum()),
    ):
        optimizer = torch.optim.Muon(parameters, lr=0.1, weight_decay=0.0)
        loss.backward()
        optimizer.step()
    assert not torch.equal(stack.detach(), start)
    torch.testing.assert_close(stack.detach(), torch.cat(alone).detach().view_as(start))


# --- the demo -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The demo's folder, figures and output; it ran over what looks like an earlier run's."""
    out = tmp_path_factory.mktemp("demo")
    for name in demo.FILES:
        (out / name).write_bytes(b"of an earlier run")
    for ratio in demo.RATIOS:
        shutil.copytree(MODEL, out / f"reap-{ratio * 100:.0f}")
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(demo, "HELD_OUT_WINDOWS", 4)  # a quarter of the demo's, to be quick
        patch.setattr(demo, "SAMPLE_TOKENS", 8)
        report = run_demo(out)
    return out, report, printed.getvalue()


def test_demo_end_to_end(ran):
    out, report, printed = ran
    json.dumps(report)
    assert printed.rstrip() == format_report(report)
    table = printed.partition("A sample of")[0].splitlines()
    assert len(table) > 10
    assert max(map(len, table)) <= 80

    base, rows = report["unpruned"], report["pruned"]
    assert [(r["ratio"], r["criterion"], r["experts"]) for r in rows] == [
        (ratio, criterion, experts)
        for ratio, experts in ((0.25, 24), (0.5, 16))
        for criterion in ("reap", "frequency", *["random"] * 5)
    ]
    assert len({r["perplexity"] for r in rows}) == len(rows)
    for row in rows:
        assert row["bytes"] < base["bytes"]
        assert 0.2 < row["agreement"] < 1
    for ratio in (0.25, 0.5):  # scores that say nothing would do no better than chance
        random = [
            r["perplexity"] for r in rows if (r["criterion"], r["ratio"]) == ("random", ratio)
        ]
        reap = next(r for r in rows if (r["criterion"], r["ratio"]) == ("reap", ratio))
        assert base["perplexity"] < reap["perplexity"] < sum(random) / len(random)

    stats = SaliencyStats.load(out / "stats.safetensors")
    assert stats.groups == list(corpus.DOMAINS)
    assert {entry["tokens"] for entry in stats.provenance["data"]} == {32 * 256}
    assert plt.imread(out / "scores.png").std() > 0.1
    assert not list(out.glob("compared-*"))
    assert set(report["samples"]) == {"the unpruned model", "reap-50"}
    assert all(s.startswith("def read_lines(path):") for s in report["samples"].values())


def test_quietly_into_folders_that_are_missing(tmp_path, capfd, monkeypatch):
    """The whole demo on less data, without random plans."""
    for name, less in {"CALIBRATION_WINDOWS": 2, "HELD_OUT_WINDOWS": 1, "SAMPLE_TOKENS": 1}.items():
        monkeypatch.setattr(demo, name, less)
    monkeypatch.setattr(demo, "RANDOM_SEEDS", 0)
    out = tmp_path / "missing" / "out"
    report = run_demo(out, quiet=True)
    assert capfd.readouterr() == ("", "")
    assert len(report["pruned"]) == len(demo.RATIOS) * len(demo.CRITERIA)
    checkpoints = {Path(folder).name for folder in report["checkpoints"]}
    assert {path.name for path in out.iterdir()} == checkpoints.union(demo.FILES)


def test_demo_measures_the_model_with_its_router_restricted_to_the_kept_experts(
    ran, documents, model, tokenizer
):
    """A pruned checkpoint has the figures of the whole model without the removed experts."""
    out, report, _ = ran
    texts = [d for d in documents if d.split == "held_out"]
    held_out = token_windows(texts, tokenizer, per_domain=4, length=demo.WINDOW)
    base = evaluate(model, held_out)
    assert report["unpruned"]["perplexity"] == pytest.approx(base.perplexity, rel=1e-5)
    for percent in (25, 50):
        plan = Plan.load(out / f"plan-{percent}.json")
        with ExitStack() as stack:
            for router, layer in zip(routers(model), plan.layers.values(), strict=True):
                stack.enter_context(without_experts(router, layer.removed))
            masked = evaluate(model, held_out, reference=base)
        row = next(r for r in report["pruned"] if r["ratio"] == percent / 100)
        assert row["criterion"] == "reap"
        assert row["perplexity"] == pytest.approx(masked.perplexity, rel=1e-5)
        assert row["agreement"] == pytest.approx(masked.agreement, abs=1e-3)
