"""Figures of two tiny models equal their definitions in float64, in every layout of the data."""

import math

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.evaluation.figures import COLUMNS, Figures, figures
from reap_kernels.errors import DataError, ShapeError
from tests.driver import zoo

NAME = "qwen3_moe"
LENGTHS = (7, 4, 9, 6)


def documents(seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=rng) for n in LENGTHS]


def padded(parts: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    inside = torch.arange(ids.shape[1]) < torch.tensor([len(p) for p in parts])[:, None]
    return {"input_ids": ids, "attention_mask": inside.long()}


def packed(parts: list[Tensor]) -> dict[str, Tensor]:
    positions = torch.cat([torch.arange(len(part)) for part in parts])
    return {"input_ids": torch.cat(parts)[None], "position_ids": positions[None]}


def truth(model, pruned, parts: list[Tensor], answers: list[Tensor] | None = None) -> dict:
    """The figures from their definitions in float64, one document at a time."""
    total = dict.fromkeys(COLUMNS, 0.0)
    predictions = 0
    for number, ids in enumerate(parts):
        with torch.no_grad():
            p, q = (m(ids[None]).logits[0, :-1].double().softmax(-1) for m in (model, pruned))
        for at in range(len(ids) - 1):
            if answers is not None and not answers[number][at + 1]:
                continue
            a, b, label = p[at], q[at], ids[at + 1]
            predictions += 1
            total["original_loss"] -= math.log(a[label])
            total["pruned_loss"] -= math.log(b[label])
            total["kl"] += float((a * (a / b).log()).sum())
            total["acceptance"] += float(torch.minimum(a, b).sum())
            total["same_top"] += float(a.argmax() == b.argmax())
    return {"predictions": predictions, **{k: v / predictions for k, v in total.items()}}


def check(found: Figures, want: dict) -> None:
    assert found.predictions == want["predictions"]
    values = {
        "original_perplexity": math.exp(want["original_loss"]),
        "pruned_perplexity": math.exp(want["pruned_loss"]),
        "perplexity_ratio": math.exp(want["pruned_loss"] - want["original_loss"]),
        **{name: want[name] for name in ("kl", "acceptance", "same_top")},
    }
    for name, value in values.items():
        assert getattr(found, name).value == pytest.approx(value, rel=2e-5, abs=2e-6), name


@pytest.fixture(scope="module")
def models():
    """A model, and another of the same architecture whose predictions clearly differ."""
    _, original = zoo.tiny(NAME)
    _, pruned = zoo.tiny(NAME)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for model in (original, pruned):
            model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(2))
        noise = torch.randn(pruned.lm_head.weight.shape, generator=rng)
        pruned.lm_head.weight.add_(0.3 * noise)
    return original, pruned


@pytest.mark.parametrize("layout", ["alone", "padded", "packed"])
def test_definitions_whatever_the_layout(models, layout: str) -> None:
    parts = documents()
    batches = {
        "alone": [{"input_ids": part[None]} for part in parts],
        "padded": [padded(parts[:3]), padded(parts[3:])],
        "packed": [packed(parts)],
    }[layout]
    found = rd.compare_models(*models, batches, draws=50)
    check(found.overall, truth(*models, parts))
    assert found.overall.sequences == (1 if layout == "packed" else 4)


def test_answers_only(models) -> None:
    parts = documents()
    rng = torch.Generator().manual_seed(3)
    answers = [torch.rand(len(part), generator=rng) > 0.5 for part in parts]
    batch = padded(parts)
    batch["token_mask"] = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    check(rd.compare_models(*models, [batch]).overall, truth(*models, parts, answers))


def test_groups_are_their_own_and_add_up(models) -> None:
    parts = documents()
    batches = [padded(parts[:2]), padded(parts[2:])]
    found = rd.compare_models(*models, batches, groups=["code", "tools"], draws=200)
    assert list(found.by_group) == ["code", "tools"]
    check(found.by_group["code"], truth(*models, parts[:2]))
    check(found.by_group["tools"], truth(*models, parts[2:]))
    check(found.overall, truth(*models, parts))
    assert found.overall.sequences == 4


def test_a_model_is_like_itself(models) -> None:
    found = rd.compare_models(models[0], models[0], [padded(documents())]).overall
    assert found.acceptance.value == pytest.approx(1, abs=1e-6)
    assert found.kl.value == pytest.approx(0, abs=1e-6)
    assert (found.same_top.value, found.perplexity_ratio.value) == (1, 1)
    assert found.perplexity_ratio.low == found.perplexity_ratio.high == 1


def test_a_plan_is_the_model_with_masked_routers(models) -> None:
    original = models[0]
    layers = rd.find_moe_layers(original)
    kept = {la.name: tuple(range(n, n + 4)) for n, la in enumerate(layers)}
    plan, parts = plan_keeping(kept), documents()
    found = rd.compare_models(original, plan, [padded(parts)], draws=50).overall

    def masked(ids: Tensor):
        with rd.masked_experts(original, kept):
            return original(ids)

    check(found, truth(original, masked, parts))


def plan_keeping(kept: dict[str, tuple[int, ...]]) -> rd.Plan:
    layers = {name: rd.LayerPlan.keeping(8, ids) for name, ids in kept.items()}
    return rd.Plan({}, "none", "explicit", 0.5, layers, "")


def test_refusals(models) -> None:
    original = models[0]
    _, other = zoo.tiny(NAME, vocab_size=97)
    batch = padded(documents())
    with pytest.raises(ShapeError, match="gives 96 logits per token, the pruned model 97"):
        rd.compare_models(original, other, [batch])
    with pytest.raises(DataError, match="no prediction counts in the text given"):
        rd.compare_models(original, original, [{"input_ids": torch.tensor([[5]])}])
    with pytest.raises(DataError, match="0 batches and 0 groups"):
        rd.compare_models(original, original, [])
    _, broken = zoo.tiny(NAME)
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    with pytest.raises(DataError, match=r"logits of the pruned model are not finite in 22 of 22"):
        rd.compare_models(original, broken, [batch])


def sample(rng: torch.Generator, sequences: int) -> tuple[Tensor, Tensor]:
    """Skewed sums over sequences that differ in length and in level, as those of text do."""
    counts = torch.randint(5, 60, (sequences,), generator=rng)
    level = 2 + 0.6 * torch.randn(sequences, 1, generator=rng, dtype=torch.float64)
    noise = 0.3 * torch.randn(sequences, 5, generator=rng, dtype=torch.float64)
    means = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.0]) + level.clone()
    means[:, 2] = (noise[:, 2] * 3 - 2).exp()
    means[:, 3] = 1 / (1 + (level[:, 0] - 4 + noise[:, 3]).exp())
    means[:, 4] = means[:, 3].clamp(0, 1)
    means[:, :2] += noise[:, :2]
    return means * counts[:, None], counts


@pytest.mark.parametrize(("size", "least"), [(10, 0.85), (40, 0.89)])
def test_intervals_cover_what_they_should(size: int, least: float) -> None:
    """95 % of them, up to the error of 400 repetitions, except for the divergence of few sequences,
    whose sample is lognormal with sigma 0.9 here: its intervals cover 86 to 90 %.
    """
    sums, counts = sample(torch.Generator().manual_seed(0), 400_000)
    mean = sums.sum(0) / counts.sum()
    want = [mean[0].exp(), mean[1].exp(), (mean[1] - mean[0]).exp(), *mean[2:]]
    rng, repetitions = torch.Generator().manual_seed(1), 400
    inside = torch.zeros(6)
    for repetition in range(repetitions):
        found = figures(*sample(rng, size), torch.zeros(size).long(), 500, repetition)
        estimates = list(vars(found).values())[2:]
        inside += torch.tensor([e.low <= w <= e.high for e, w in zip(estimates, want, strict=True)])
    share = inside / repetitions
    assert float(share.min()) >= least, share
    assert float(share[[0, 1, 2, 4, 5]].min()) >= least + 0.03, share
    assert float(share.max()) <= 0.98, share


def test_intervals_are_of_a_seed_and_keep_the_mix() -> None:
    """Groups are resampled separately: if the sequences of each group are equal, nothing varies,
    however different the groups are."""
    counts = torch.full((12,), 10)
    group = torch.tensor([0] * 4 + [1] * 8)
    sums = (group[:, None] + 1.0).double().expand(12, 5) * 10
    found = figures(sums, counts, group, 100, 0)
    assert found.kl.value == pytest.approx(20 / 12)
    assert found.kl.low == pytest.approx(found.kl.value)
    assert found.kl.high == pytest.approx(found.kl.value)
    noisy = sums + torch.rand(12, 5, generator=torch.Generator().manual_seed(0))
    assert figures(noisy, counts, group, 100, 0) == figures(noisy, counts, group, 100, 0)
    assert figures(noisy, counts, group, 100, 0) != figures(noisy, counts, group, 100, 1)


def test_one_sequence_has_no_interval() -> None:
    found = figures(torch.ones(1, 5).double(), torch.tensor([3]), torch.zeros(1).long(), 100, 0)
    assert (found.kl.value, found.kl.low, found.kl.high) == (pytest.approx(1 / 3), None, None)
