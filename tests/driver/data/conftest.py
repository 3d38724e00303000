"""A folder with a byte-level tokenizer, three special tokens, and optionally a chat template."""

from pathlib import Path

import pytest
from transformers import PretrainedConfig

from reap_driver.data.encode import Encoder
from tests.driver.published.checkpoint import write_tokenizer

VOCAB = 259
EOS = 2
TEMPLATE = (
    "{% for t in tools or [] %}[{{ t['function']['name'] }}]{% endfor %}"
    "{% for m in messages %}"
    "{% if m['role'] == 'judge' %}{{ raise_exception('no such role') }}{% endif %}"
    "<bos>{{ m['role'] }}:{{ m['content'] }}{% if m['name'] %}!{% endif %}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}{% endfor %}"
)


class _Config(PretrainedConfig):
    """A configuration with only the fields that an encoder reads."""

    model_type = "bytes"


@pytest.fixture
def config() -> PretrainedConfig:
    return _Config(vocab_size=VOCAB, eos_token_id=EOS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer and a chat template."""
    path = tmp_path / "model"
    path.mkdir()
    write_tokenizer(path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture
def encoder(folder: Path, config: PretrainedConfig) -> Encoder:
    return Encoder(folder, config)
