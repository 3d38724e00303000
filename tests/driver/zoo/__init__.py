"""A tiny random model of every mixture-of-experts architecture transformers loads natively.

Eight experts (unless overridden), two or three layers, hidden size 32. Router weights, selection
and correction biases, per-expert scales and routing tables are random: fresh models leave them at
zero or one, which hides bugs.
"""

from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import PretrainedConfig, PreTrainedModel

from tests.driver.zoo.build import make_config, make_model
from tests.driver.zoo.core import CORE
from tests.driver.zoo.extra import EXTRA, REFUSED

# aria joined the experts interface in transformers 5.18; before, it is refused by name.
_SINCE = {"aria_text": Version("5.18")}
_SPECS = {**CORE, **EXTRA, **REFUSED}


def names() -> list[str]:
    """Every architecture that can be observed and pruned, the most used first."""
    return [name for name in (*CORE, *EXTRA) if name not in refused_names()]


def refused_names() -> list[str]:
    """Architectures that this version of transformers has without its experts interface."""
    installed = Version(transformers.__version__)
    return [name for name, since in _SINCE.items() if installed < since]


def core_names() -> list[str]:
    """The architectures people prune most."""
    return list(CORE)


def tiny(
    name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config_overrides: Any
) -> tuple[PretrainedConfig, PreTrainedModel]:
    """A random model in eval mode, attention and experts eager, the same for the same arguments.

    `config_overrides` are fields of the (text) configuration, by the names its class uses.
    """
    config = make_config(_SPECS[name], config_overrides)
    return config, make_model(_SPECS[name], config, seed, dtype)


def tiny_inputs(
    name: str, config: PretrainedConfig, batch: int = 2, seq: int = 12, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Token ids [batch, seq], free of special tokens."""
    generator = torch.Generator().manual_seed(1000 + seed)
    vocab = config.get_text_config().vocab_size
    return {"input_ids": torch.randint(3, vocab, (batch, seq), generator=generator)}
