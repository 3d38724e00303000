"""Observation files of the reference implementation: exact both ways, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from reap_driver.interchange import reference_observations
from reap_driver.interchange.content import Source
from reap_driver.planning.criteria import CRITERIA
from reap_driver.planning.planner import make_plan
from reap_driver.planning.scoring import score
from reap_kernels import SaliencyStats
from reap_kernels.errors import DataError
from tests.driver.interchange import facts

# The dtypes that the reference implementation records, from a file of its own.
DTYPES = {
    "total_tokens": torch.int64,
    "expert_frequency": torch.int64,
    "pairwise_expert_frequency": torch.int64,
    "ean_sum": torch.float64,
    "ean_mean": torch.float32,
    "weighted_ean_sum": torch.float64,
    "weighted_expert_frequency_sum": torch.float64,
    "reap": torch.float32,
    "max_activations": torch.float32,
}
# What its pruning methods are called, and by which key and which of our criteria they rank.
METHODS = {
    "frequency": ("expert_frequency", "frequency"),
    "ean_sum": ("ean_sum", "ean_sum"),
    "ean_mean": ("ean_mean", "ean_mean"),
    "weighted_ean_sum": ("weighted_ean_sum", "weighted_ean"),
    "reap": ("reap", "reap"),
}


def written(path: Path, **more: Any) -> dict[int, dict[str, torch.Tensor]]:
    reference_observations.write(path, Source(facts.model(), facts.stats(**more)))
    found: dict[int, dict[str, torch.Tensor]] = torch.load(path, weights_only=True)
    return found


def reference_prunes(keys: dict[str, torch.Tensor], key: str, ratio: float) -> set[int]:
    """The experts that the reference implementation prunes of a layer, by its rule: so many as the
    ratio gives, rounded down, those of the least values.
    """
    gone = int(len(keys["expert_frequency"]) * ratio)
    return set(torch.topk(keys[key], gone, largest=False).indices.tolist())


def test_what_is_written(tmp_path: Path) -> None:
    content, stats = written(tmp_path / "o.pt"), facts.stats()
    assert list(content) == list(facts.NUMBERS)
    for number, name in zip(facts.NUMBERS, facts.NAMES, strict=True):
        keys, layer = content[number], stats.layers[name].total()
        assert {key: value.dtype for key, value in keys.items()} == DTYPES
        assert keys["total_tokens"].shape == ()
        for value in keys.values():  # a view would be saved with all that it is of
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
        pairs = keys["pairwise_expert_frequency"]
        for i, row in enumerate(pairs.tolist()):
            assert row == [int(layer.count[0, i] + layer.count[0, j]) for j in range(len(row))]
        for expert, rows in enumerate(layer.count[0].tolist()):
            norm, weighted = float(layer.norm_sum[0, expert]), layer.weighted_norm_sum[0, expert]
            assert float(keys["ean_mean"][expert]) == pytest.approx(norm / max(rows, 1), rel=1e-7)
            mean = float(weighted) / max(rows, 1)
            assert float(keys["reap"][expert]) == pytest.approx(mean, rel=1e-7)
        highest = layer.out_max[0].where(layer.count[0] > 0, torch.zeros(()))
        assert torch.equal(keys["max_activations"], highest)


def test_there_and_back(tmp_path: Path) -> None:
    content = written(tmp_path / "o.pt")
    again = reference_observations.read(tmp_path / "o.pt", facts.model())
    assert again.missing == ("norm_sq_sum", "weighted_norm_sq_sum", "out_min")
    assert (again.groups, again.parts) == (["imported"], [])
    for name, layer in facts.stats().layers.items():
        for field, value in again.layers[name].fields().items():
            assert facts.same(value, getattr(layer.total(), field)), field
    again.save(tmp_path / "s")
    loaded = SaliencyStats.load(tmp_path / "s")
    reference_observations.write(tmp_path / "p.pt", Source(facts.model(), loaded))
    second = torch.load(tmp_path / "p.pt", weights_only=True)
    for number, keys in content.items():
        for key, value in keys.items():
            assert facts.same(second[number][key], value), key


@pytest.mark.parametrize("ratio", [0.2, 1 / 3, 0.5, 0.6])
@pytest.mark.parametrize("method", METHODS)
def test_the_same_experts_go(tmp_path: Path, method: str, ratio: float) -> None:
    key, criterion = METHODS[method]
    content = written(tmp_path / "o.pt")
    both = (facts.stats(), reference_observations.read(tmp_path / "o.pt", facts.model()))
    for stats in both:
        plan = make_plan(score(stats, criterion), ratio)
        for number, name in zip(facts.NUMBERS, facts.NAMES, strict=True):
            assert set(plan.layers[name].removed) == reference_prunes(content[number], key, ratio)


def test_what_is_not_recorded_is_not_ranked_by(tmp_path: Path) -> None:
    written(tmp_path / "o.pt")
    stats = reference_observations.read(tmp_path / "o.pt", facts.model())
    refused = ["reap_l2", "msan", "max_activation"]
    for name in refused:
        with pytest.raises(DataError, match="not recorded"):
            score(stats, name)
    for name in CRITERIA.keys() - refused:
        assert set(score(stats, name)) == set(facts.NAMES)


def test_keys_for_merging_are_passed_over_and_older_files_lack_some(tmp_path: Path) -> None:
    content: dict[int, dict[str, Any]] = dict(written(tmp_path / "o.pt"))
    for keys in content.values():
        del keys["max_activations"], keys["weighted_expert_frequency_sum"], keys["reap"]
        keys["router_logit_similiarity"] = torch.ones(6, 6)
    torch.save(content, tmp_path / "o.pt")
    stats = reference_observations.read(tmp_path / "o.pt", facts.model())
    assert {"router_weight_sum", "out_max"} <= set(stats.missing)
    with pytest.raises(DataError, match="router_weight_sum, not recorded"):
        score(stats, "weighted_frequency")
    with pytest.raises(DataError, match="router_weight_sum is not recorded"):
        reference_observations.write(tmp_path / "p.pt", Source(facts.model(), stats))


class Tracker:
    """Stands for a class of the reference implementation, which only its code can make."""


def changed(**values: Any) -> Any:
    def change(content: dict[Any, Any]) -> Any:
        content[1].update(values)
        return content

    return change


def without(key: str) -> Any:
    def change(content: dict[Any, Any]) -> Any:
        del content[1][key]
        return content

    return change


SIX = torch.ones(6, dtype=torch.float64)
WRONG: dict[str, tuple[Any, str]] = {
    "code": (changed(reap=Tracker()), r"run code \('tests\..*\), .* each block; give"),
    "no layers": (lambda _: {}, "it holds 'dict', no layers"),
    "a tensor": (lambda _: torch.ones(2), "it holds 'Tensor', no layers"),
    "names": (lambda content: {str(n): k for n, k in content.items()}, "entry '1' is no layer"),
    "fewer layers": (lambda content: {1: content[1]}, r"it has the layers \[1\], .* \[1, 2, 5\]"),
    "no count": (without("expert_frequency"), "layer 1 has no expert_frequency"),
    "more experts": (changed(ean_sum=torch.ones(7)), r"ean_sum is \[7\]; expected a tensor \[6\]"),
    "no tensor": (changed(ean_sum=[1.0] * 6), "layer 1: ean_sum is \\["),
    "no numbers": (changed(ean_sum=SIX.to("meta")), "nested or empty one; expected a dense tensor"),
    "nested": (changed(ean_sum=torch.nested.nested_tensor([SIX])), "nested or empty one; expected"),
    "sparse": (changed(ean_sum=SIX.to_sparse()), "a sparse, .*; expected a dense tensor"),
    "truths": (changed(expert_frequency=SIX > 0), "expert_frequency has the dtype torch.bool"),
    "fractions": (changed(expert_frequency=SIX), "expert_frequency has the dtype torch.float64"),
    "whole numbers": (changed(ean_sum=SIX.long()), "ean_sum has the dtype torch.int64"),
    "NaN": (changed(ean_sum=SIX * torch.nan), "norm_sum is nan; expected a finite number"),
    "negative": (changed(ean_sum=-SIX), "norm_sum is -1.0; expected 0"),
    "no tokens": (changed(total_tokens=torch.tensor(0)), "tokens is 0; expected no less than"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_file_of_the_model_is_refused(tmp_path: Path, wrong: str) -> None:
    change, message = WRONG[wrong]
    torch.save(change(written(tmp_path / "o.pt")), tmp_path / "o.pt")
    with pytest.raises(DataError, match=message) as caught:
        reference_observations.read(tmp_path / "o.pt", facts.model())
    assert str(caught.value).startswith(f"{tmp_path / 'o.pt'}: is no observation file")


def test_parameters_are_read_as_numbers(tmp_path: Path) -> None:
    content = written(tmp_path / "o.pt")
    expected = content[1]["ean_sum"].clone()
    content[1]["ean_sum"] = torch.nn.Parameter(content[1]["ean_sum"])
    torch.save(content, tmp_path / "o.pt")
    layer = reference_observations.read(tmp_path / "o.pt", facts.model()).layers[facts.NAMES[0]]
    assert not layer.norm_sum.requires_grad
    assert torch.equal(layer.norm_sum[0], expected)


class Malice:
    """Runs code when it is unpickled by pickle itself."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def test_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for save in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        save({1: {"reap": Malice()}}, tmp_path / "o.pt")
        with pytest.raises(DataError, match="is no observation file"):
            reference_observations.read(tmp_path / "o.pt", facts.model())
    assert [path.name for path in tmp_path.iterdir()] == ["o.pt"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"{}", b"\x80\x02.", b"x" * 1000])
def test_bytes_that_are_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "o.pt").write_bytes(content)
    with pytest.raises(DataError, match="is no observation file"):
        reference_observations.read(tmp_path / "o.pt", facts.model())
    with pytest.raises(DataError, match="cannot be read"):
        reference_observations.read(tmp_path / "none.pt", facts.model())


def test_statistics_that_cannot_be_written(tmp_path: Path) -> None:
    bad = facts.stats()
    bad.layers[facts.NAMES[0]].nonfinite[0, 0] = 1
    with pytest.raises(DataError, match="NaN or Inf"):
        reference_observations.write(tmp_path / "o.pt", Source(facts.model(), bad))
    partial = facts.stats()
    partial.provenance["unobserved"] = ["model.layers.7.mlp.experts"]
    with pytest.raises(DataError, match=r"layer model\.layers\.7.* is not in the statistics"):
        reference_observations.write(tmp_path / "o.pt", Source(facts.model(), partial))
