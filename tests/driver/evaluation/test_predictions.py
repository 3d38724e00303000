"""Which predictions count, and that their logits equal the model's own for each sequence."""

import pytest
import torch

from reap_driver.compat.text_model import text_model
from reap_driver.evaluation.predictions import counted_targets, predict
from reap_kernels.errors import DataError, UnsupportedModel
from tests.driver import zoo

IDS = torch.arange(3, 15).view(2, 6)


def counted(**more: list[list[int]]) -> list[list[int]]:
    tensors = {name: torch.tensor(rows) for name, rows in more.items()}
    return counted_targets({"input_ids": IDS, **tensors}).int().tolist()


def test_every_next_token_counts_where_nothing_is_said() -> None:
    assert counted() == [[1, 1, 1, 1, 1]] * 2


def test_padding_is_neither_predicted_nor_predicted_from() -> None:
    mask = [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]
    assert counted(attention_mask=mask) == [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]


def test_nothing_is_predicted_across_documents() -> None:
    positions = [[0, 1, 2, 0, 1, 2], [5, 6, 0, 0, 1, 0]]
    assert counted(position_ids=positions) == [[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]]


def test_only_tokens_that_count_are_predicted() -> None:
    answers = [[1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    assert counted(token_mask=answers) == [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]
    mask = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]
    assert counted(token_mask=answers, attention_mask=mask) == [[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("inputs", "mentions"),
    [
        ({}, r"input_ids must be \[batch, seq\] .* there are none"),
        ({"input_ids": IDS[0]}, r"has shape \(6,\)"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 6, 6)},
            r"attention_mask has shape \(2, 1, 6, 6\).*\(2, 6\); give one entry per token",
        ),
        ({"input_ids": IDS, "token_mask": torch.ones(2, 5)}, r"token_mask has shape \(2, 5\)"),
    ],
)
def test_what_does_not_say_what_counts_is_refused(inputs: dict, mentions: str) -> None:
    with pytest.raises(DataError, match=mentions):
        counted_targets(inputs)


@pytest.mark.parametrize("name", [n for n in zoo.names() if n != "openai_privacy_filter"])
def test_logits_are_the_models_own(name: str) -> None:
    """For every architecture; and the head computes no other logits."""
    config, model = zoo.tiny(name)
    inputs = zoo.tiny_inputs(name, config, batch=3, seq=9)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) > 0.6
    rows: list[int] = []
    head = text_model(model).get_output_embeddings()
    handle = head.register_forward_hook(lambda _, args, out: rows.append(args[0][..., 0].numel()))
    found = predict(model, {**inputs, "token_mask": mask})
    handle.remove()
    with torch.no_grad():
        whole = text_model(model)(**inputs, use_cache=False).logits[:, :-1]
    assert found.logits.shape == (int(mask[:, 1:].sum()), whole.shape[-1])
    assert found.logits.dtype == whole.dtype
    torch.testing.assert_close(found.logits, whole[mask[:, 1:]], rtol=1e-4, atol=1e-5)
    assert torch.equal(found.labels, inputs["input_ids"][:, 1:][mask[:, 1:]])
    assert found.sequences.tolist() == mask[:, 1:].nonzero()[:, 0].tolist()
    assert rows[0] == len(found.labels)


def test_padded_and_packed_sequences_predict_as_alone() -> None:
    config, model = zoo.tiny("qwen3_moe")
    parts = [zoo.tiny_inputs("qwen3_moe", config, 1, n, n)["input_ids"] for n in (5, 3, 4)]
    alone = [predict(model, {"input_ids": part}) for part in parts]
    want = torch.cat([one.logits for one in alone])
    packed = predict(
        model,
        {
            "input_ids": torch.cat(parts, dim=1),
            "position_ids": torch.cat([torch.arange(n) for n in (5, 3, 4)])[None],
        },
    )
    torch.testing.assert_close(packed.logits, want, rtol=1e-4, atol=1e-5)
    ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
    for row, part in enumerate(parts):
        ids[row, : part.shape[1]], mask[row, : part.shape[1]] = part[0], 1
    padded = predict(model, {"input_ids": ids, "attention_mask": mask})
    torch.testing.assert_close(padded.logits, want, rtol=1e-4, atol=1e-5)
    assert padded.sequences.tolist() == [0] * 4 + [1] * 2 + [2] * 3
    assert torch.equal(padded.labels, torch.cat([one.labels for one in alone]))


def test_a_batch_of_which_nothing_counts() -> None:
    _, model = zoo.tiny("qwen3_moe")
    found = predict(model, {"input_ids": torch.tensor([[5], [6]])})
    assert found.logits.shape == (0, 96)
    assert found.labels.tolist() == found.sequences.tolist() == []


def test_a_head_that_is_not_called_costs_all_logits_and_changes_none(monkeypatch) -> None:
    config, model = zoo.tiny("qwen3_moe")
    inputs = zoo.tiny_inputs("qwen3_moe", config)
    inputs["token_mask"] = torch.arange(12).expand(2, 12) > 6
    want = predict(model, inputs)
    unused = torch.nn.Linear(1, 1)
    monkeypatch.setattr(type(model), "get_output_embeddings", lambda self: unused)
    torch.testing.assert_close(predict(model, inputs).logits, want.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "openai_privacy_filter"])
def test_models_that_predict_no_tokens_are_refused(name: str) -> None:
    config, model = zoo.tiny(name)
    body = model.model if name == "qwen3_moe" else model
    with pytest.raises(UnsupportedModel, match="has no language model head"):
        predict(body, zoo.tiny_inputs(name, config))


def test_nothing_stays_on_the_model() -> None:
    config, model = zoo.tiny("qwen3_moe")
    with pytest.raises(DataError, match="outside the model's vocabulary"):
        predict(model, {"input_ids": torch.full((1, 4), 1000)})
    assert not model.get_output_embeddings()._forward_pre_hooks
    assert not predict(model, zoo.tiny_inputs("qwen3_moe", config)).logits.requires_grad
