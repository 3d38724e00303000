"""Models that one version of the library cannot run are refused before their weights are read."""

from collections.abc import Callable
from pathlib import Path

import pytest
import transformers

import reap_driver as rd
from reap_driver.cli.main import main
from reap_driver.compat import library_faults
from reap_kernels.errors import UnsupportedModel
from tests.driver.writer import saved


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose class the installed version cannot run; its weights are damaged."""
    model = saved.save("qwen3_moe", tmp_path / "model")
    known = {(type(model).__name__, transformers.__version__): "its forward pass is wrong"}
    monkeypatch.setattr(library_faults, "FAULTS", known)
    for path in (tmp_path / "model").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1000])
    return tmp_path / "model"


@pytest.mark.parametrize("load", [rd.load_model, lambda p: rd.estimate(p, tokens=1000)])
def test_the_reason_and_the_remedy_are_named(load: Callable[[Path], object], faulty: Path) -> None:
    version = transformers.__version__
    with pytest.raises(UnsupportedModel) as refused:
        load(faulty)
    assert str(refused.value) == (
        f"{faulty}: transformers {version} cannot run Qwen3MoeForCausalLM: its forward pass is "
        f"wrong; run `pip install 'transformers<{version}'`"
    )


def test_a_dry_run_says_so_too(faulty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["observe", str(faulty), "--dry-run", "--tokens", "1000", "--out", "stats.safetensors"]
    assert main(words) == 3
    assert "cannot run Qwen3MoeForCausalLM: its forward pass is wrong" in capsys.readouterr().err


def test_other_versions_run_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    [(name, version)] = library_faults.FAULTS
    monkeypatch.setattr(library_faults.transformers, "__version__", version)
    assert library_faults.fault(name) is not None
    monkeypatch.setattr(library_faults.transformers, "__version__", "5.17.0")
    assert library_faults.fault(name) is None
