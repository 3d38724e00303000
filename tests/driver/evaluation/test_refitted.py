"""A pruned model with new down projections, in memory or streamed, gives what they make of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import reap_driver as rd
from reap_driver.evaluation.compensation import RefittedModel, refitted_layers
from reap_driver.load.streamed_model import open_streamed
from reap_driver.workflow.comparing import Candidate, Subjects, Text, compared
from reap_driver.workflow.inspection import inspect_model
from reap_driver.workflow.listener import Listener
from reap_kernels.errors import PlanError

MODEL = Path(rd.__file__).parent / "demo" / "model"


@pytest.fixture(scope="module")
def matrices() -> dict[str, Tensor]:
    """Down projections of the bundled model's first and last layers, changed a little."""
    model = rd.load_model(MODEL)
    names = [layer.name for layer in rd.find_moe_layers(model)]
    generator = torch.Generator().manual_seed(1)
    found = {}
    for name in (names[0], names[-1]):
        down = model.get_submodule(name).down_proj.detach()
        noise = torch.randn(down.shape, generator=generator)
        found[name] = (down.float() + 0.02 * noise).to(down.dtype)
    return found


@pytest.fixture(scope="module")
def written(matrices: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refitted") / "out"
    rd.replace_matrices(MODEL, matrices, out, record={"by": "a test"})
    return out


def test_active_in_memory_and_restored(matrices: dict[str, Tensor], written: Path) -> None:
    model, other = rd.load_model(MODEL), rd.load_model(written)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        want = other(input_ids=ids).logits
        refitted = RefittedModel(model, matrices)
        for _ in range(2):
            with refitted.active():
                assert torch.equal(model(input_ids=ids).logits, want)
            assert not torch.equal(model(input_ids=ids).logits, want)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("stream", ["never", "always"])
def test_compared_as_the_checkpoint(
    matrices: dict[str, Tensor], written: Path, stream: str, tmp_path: Path
) -> None:
    """A half of the folds is read, and the same model serves with and without the matrices."""
    (tmp_path / "a.txt").write_text("def add(a, b):\n    return a + b\n" * 60)
    original, refitted = inspect_model(str(MODEL)), inspect_model(str(written))
    source = rd.calibration(MODEL, str(tmp_path / "a.txt"), seq_len=16).packed._batches[0].source
    text = Text([source], 2, lambda batches, number: batches.fold(number) == 1)
    run = rd.RunOptions(stream=stream, batch_size=3)
    candidates = [
        Candidate("as it was", original, None),
        Candidate("with matrices", original, None, matrices),
        Candidate("written", refitted, None),
    ]
    sums, lost = compared(Subjects(original, candidates), run, text, Listener())
    same, mine, want = (one.comparison(100, 0) for one in sums)
    assert len(same.counts) == source.sequences // 2
    assert lost == [{}, {}, {}]
    assert torch.equal(mine.sums, want.sums)
    assert float(same.overall.kl.value) == 0 < float(mine.overall.kl.value)


def test_matrices_of_another_model(matrices: dict[str, Tensor]) -> None:
    model = rd.load_model(MODEL)
    [first, _] = matrices
    with pytest.raises(PlanError, match=r"'model\.layers\.9\.mlp' is no MoE layer of the model"):
        RefittedModel(model, {"model.layers.9.mlp": matrices[first]})
    with pytest.raises(PlanError, match="those of layer"):
        RefittedModel(model, {first: matrices[first][:3]})
    with open_streamed(MODEL) as streamed, pytest.raises(PlanError, match="is no MoE layer"):
        refitted_layers(streamed, {"x": matrices[first]})
