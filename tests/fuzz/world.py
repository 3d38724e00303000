"""Valid inputs of every kind: a tiny model, data, and what the commands write for them."""

import contextlib
import io
import json
import shutil
from functools import cached_property
from pathlib import Path

from reap_driver.cli.main import main
from reap_kernels.errors import DataError
from tests.driver import zoo
from tests.driver.published.checkpoint import write_tokenizer
from tests.fuzz.campaign import Nonsense

VOCAB = 259  # what write_tokenizer makes
_TEMPLATE = (
    "{{ tools | tojson if tools }}{% for message in messages %}<{{ message['role'] }}>"
    "{{ message['reasoning_content'] }}{{ message['content'] }}"
    "{% for call in message['tool_calls'] %}{{ call | tojson }}{% endfor %}\n{% endfor %}"
)


class Refused(DataError):
    """The command line ended with one error line; carries it."""


def command(*words: object) -> dict[str, object]:
    """Calls the command line with `--json` in this process; returns the object it printed.

    Raises:
        Refused: it ended with one error.
        Nonsense: it ended in another way.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([*map(str, words), "--json", "--quiet"])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("reap-kernels: err")]
    if code in (2, 3, 4) and len(errors) == 1:
        raise Refused(errors[0])
    if code or errors:
        raise Nonsense(f"exit code {code} with {len(errors)} error lines")
    found: dict[str, object] = json.loads(out.getvalue())
    return found


class World:
    """Valid inputs below one folder, each made when it is first asked for.

    Args:
        folder: empty; everything is written there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def model(self) -> Path:
        """A tiny checkpoint in two shards: 2 layers, 8 experts, 3 per token."""
        path = self.folder / "model"
        _, model = zoo.tiny("qwen3_moe", vocab_size=VOCAB)
        model.save_pretrained(str(path), max_shard_size="60KB")
        write_tokenizer(path)
        (path / "chat_template.jinja").write_text(_TEMPLATE)
        return path

    def model_copy(self, name: str) -> Path:
        """A copy of the model to spoil."""
        path = self.folder / name
        return path if path.exists() else Path(shutil.copytree(self.model, path))

    @cached_property
    def data(self) -> Path:
        """A file of texts."""
        path = self.folder / "data.jsonl"
        lines = [json.dumps({"text": f"def add_{i}(a):\n    return a + {i}\n"}) for i in range(12)]
        path.write_text("\n".join(lines) + "\n")
        return path

    @cached_property
    def stats(self) -> Path:
        """Statistics of the model on the data, with folds."""
        path = self.folder / "stats.safetensors"
        command("observe", self.model, "--data", self.data, "--seq-len", 16, "--out", path)
        return path

    @cached_property
    def plan(self) -> Path:
        """A plan that removes half of the experts."""
        path = self.folder / "plan.json"
        command("plan", self.stats, "--ratio", "0.5", "--out", path)
        return path

    @cached_property
    def masks(self) -> Path:
        """The plan as masks."""
        path = self.folder / "masks.safetensors"
        command("apply", self.model, self.plan, "--as-masks", path)
        return path

    @cached_property
    def comparison(self) -> bytes:
        """What `compare --json` prints."""
        words = (self.model, self.plan, "--data", self.data, "--seq-len", 16)
        return json.dumps(command("compare", *words)).encode()
