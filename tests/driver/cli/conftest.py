"""A tiny checkpoint with a tokenizer, some data, and the command line called in this process."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reap_driver.cli.main import main
from tests.driver import zoo
from tests.driver.published.checkpoint import write_tokenizer

VOCAB = 259  # what write_tokenizer makes


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one object on stdout."""
        content: dict[str, Any] = json.loads(self.out)
        return content

    @property
    def error(self) -> str:
        """The one error line; that it is one, and no traceback, is checked."""
        assert "Traceback" not in self.err
        [line] = [line for line in self.err.splitlines() if line.startswith("reap-kernels: error")]
        assert self.err.endswith(line + "\n")
        return line


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls the command line; arguments may be paths and numbers."""

    def call(*words: object) -> Outcome:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def write_model(folder: Path, name: str, **overrides: Any) -> Path:
    """A tiny model of the zoo as a checkpoint of a few shards, with a tokenizer."""
    _, model = zoo.tiny(name, vocab_size=VOCAB, **overrides)
    model.save_pretrained(str(folder), max_shard_size="40KB")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def three_deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three decoder layers, of 8 experts of 24 neurons."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    return write_model(folder, "qwen3_moe", num_hidden_layers=3)


def observation(model: Path, batches: int, *groups: str) -> list[str]:
    """Words that observe a model on batches of two sequences of 16 tokens, with an entry of the
    journal behind each; the data are written beside the model, a file per group.
    """
    sources = []
    for group in groups:
        path = model.with_name(f"{group}.jsonl")
        ids = [(7 * i + len(group)) % 250 for i in range(2 * batches // len(groups) * 16)]
        path.write_text(json.dumps({"input_ids": ids}) + "\n")
        sources += ["--data", str(path)]
    options = ["--seq-len", "16", "--batch-size", "2", "--journal-every", "1", "--quiet"]
    return ["observe", str(model), *sources, *options]


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints that are never changed: 8 experts, 3 a token; `grouped` in 4 routing groups."""
    root = tmp_path_factory.mktemp("originals")
    return {
        "plain": write_model(root / "plain", "qwen3_moe"),
        "grouped": write_model(
            root / "grouped", "deepseek_v3", n_routed_experts=16, n_group=4, topk_group=2
        ),
    }


@pytest.fixture
def model(originals: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the plain checkpoint, for this test to spoil."""
    return Path(shutil.copytree(originals["plain"], tmp_path / "model"))


@pytest.fixture
def grouped(originals: dict[str, Path]) -> Path:
    """The checkpoint whose router has groups; read only."""
    return originals["grouped"]


def write_data(path: Path) -> Path:
    """A file of 30 texts."""
    lines = [json.dumps({"text": f"def add_{i}(a):\n    return a + {i}\n"}) for i in range(30)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 30 texts."""
    return write_data(tmp_path / "code.jsonl")
