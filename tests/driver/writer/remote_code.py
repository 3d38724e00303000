"""Model code as a checkpoint ships it: one module an expert, and a second stack with a count of its
own. Copied next to the weights, and run only with trust_remote_code.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH, INNER, VOCAB = 32, 24, 96


class TinyRemoteConfig(PretrainedConfig):
    """Configuration; `tower` is a second stack of experts, which nobody observes; with `method`,
    a method of the block gets the routing.
    """

    model_type = "tiny_remote_moe"

    def __init__(
        self,
        num_experts: int = 8,
        num_experts_per_tok: int = 3,
        tower: dict[str, Any] | None = None,
        moe_intermediate_size: int = INNER,
        method: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.moe_intermediate_size = moe_intermediate_size
        self.method = method
        self.num_experts = num_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.tower = tower
        self.hidden_size = WIDTH
        self.vocab_size = VOCAB


class TinyExpert(nn.Module):
    """A gated MLP."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, inner, bias=False)
        self.up_proj = nn.Linear(WIDTH, inner, bias=False)
        self.down_proj = nn.Linear(inner, WIDTH, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


class TinyBlock(nn.Module):
    """Softmax routing, inline."""

    def __init__(self, config: TinyRemoteConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.gate = nn.Linear(WIDTH, config.num_experts, bias=False)
        inner, experts = config.moe_intermediate_size, config.num_experts
        self.experts = nn.ModuleList([TinyExpert(inner) for _ in range(experts)])

    def route(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Router weights and ids of the experts of each token."""
        weights, ids = self.gate(flat).softmax(-1).topk(self.top_k)
        return weights / weights.sum(-1, keepdim=True), ids

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        weights, ids = self.route(flat)
        out = torch.zeros_like(flat)
        for expert, module in enumerate(self.experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            out[token] += module(flat[token]) * weights[token, slot, None]
        return hidden + out.reshape(hidden.shape)


class TinyMethodBlock(TinyBlock):
    """The same, the experts in a method that gets the routing."""

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        weights, ids = self.route(flat)
        return hidden + self.moe_infer(flat, ids, weights).reshape(hidden.shape)

    def moe_infer(self, flat: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs."""
        out = torch.zeros_like(flat)
        for expert, module in enumerate(self.experts):
            token, slot = (ids == expert).nonzero(as_tuple=True)
            out[token] += module(flat[token]) * weights[token, slot, None]
        return out


class TinyLayer(nn.Module):
    """One decoder layer: the block alone."""

    def __init__(self, config: TinyRemoteConfig) -> None:
        super().__init__()
        self.mlp = (TinyMethodBlock if config.method else TinyBlock)(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden)


class TinyTower(nn.Module):
    """Biases by expert of another stack: it depends on a count, and is no routed layer."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.scores = nn.Linear(WIDTH, config["num_experts"], bias=False)


class TinyRemoteForCausalLM(PreTrainedModel):
    """Two layers between an embedding and a head."""

    config_class = TinyRemoteConfig

    def __init__(self, config: TinyRemoteConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList([TinyLayer(config) for _ in range(2)])
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if config.tower is not None:
            self.tower = TinyTower(config.tower)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return CausalLMOutput(logits=self.head(hidden))
