"""Step-3.5-Flash as a causal language model: transformers has the text model but not the head.

The published checkpoint has `architectures: ["Step3p5ForCausalLM"]` and `model_type: "step3p5"`.
transformers maps that type to `Step3p7TextConfig` and has `Step3p7TextModel`; only the class that
adds the language-model head is missing.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel


class Step3p5ForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """`Step3p7TextModel` under `model`, a linear head under `lm_head`, as published."""

    config: Step3p7TextConfig
    config_class = Step3p7TextConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Keys of MTP layers, which the text model ignores; loading reads the outermost class's
        # list.
        self._keys_to_ignore_on_load_unexpected = self.model._keys_to_ignore_on_load_unexpected
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [batch, kept positions, vocab] of token ids [batch, seq]."""
        output = self.model(input_ids=input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return CausalLMOutputWithPast(
            logits=self.lm_head(output.last_hidden_state[:, kept]),
            past_key_values=output.past_key_values,
        )


def _register_conversion() -> None:
    """Registers step3p7's key conversions for the class, except those that insert the
    prefixes of the multimodal model.
    """
    conversions = [
        conversion
        for conversion in get_checkpoint_conversion_mapping("step3p7")
        if not any(pattern.startswith("^") for pattern in conversion._original_source_patterns)
    ]
    register_checkpoint_conversion_mapping(Step3p5ForCausalLM.__name__, conversions, overwrite=True)


_register_conversion()
