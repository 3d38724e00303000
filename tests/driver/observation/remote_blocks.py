"""Stand-ins for remote code: blocks with one module per expert, in the two published forms.

`MethodBlock` passes (hidden, ids, weights) to a method, as DeepSeek's published code does;
`InlineBlock` routes in its forward and calls experts one by one, as transformers 4.x did.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

WIDTH, INNER, EXPERTS, TOP_K, VOCAB = 32, 24, 8, 3, 96


class RemoteConfig(PretrainedConfig):
    """Configuration of the stand-in models."""

    model_type = "remote_moe"

    def __init__(self, block: str = "method", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block = block
        self.hidden_size = WIDTH
        self.vocab_size = VOCAB
        self.num_experts_per_tok = TOP_K


class Expert(nn.Module):
    """A gated MLP; `names` are those of its gate, up and down projections."""

    def __init__(self, names: tuple[str, str, str], bias: bool = False) -> None:
        super().__init__()
        self.names = names
        sizes = ((WIDTH, INNER), (WIDTH, INNER), (INNER, WIDTH))
        for name, (inner, outer) in zip(names, sizes, strict=True):
            setattr(self, name, nn.Linear(inner, outer, bias=bias))
        self.act_fn = nn.SiLU()

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.act_fn(gate(hidden)) * up(hidden))


class _Block(nn.Module):
    names = ("gate_proj", "up_proj", "down_proj")
    bias = False

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList([Expert(self.names, self.bias) for _ in range(EXPERTS)])
        self.shared_experts = Expert(self.names)

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.gate(hidden).softmax(-1)
        weights, ids = scores.topk(TOP_K)
        return ids, weights


class MethodBlock(_Block):
    """DeepSeek's form: tokens sorted by expert, results gathered and weighted at the end."""

    bias = True

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        ids, weights = self.route(flat)
        routed = self.moe_infer(flat, ids, weights)
        return (routed + self.shared_experts(flat)).reshape(hidden.shape)

    def moe_infer(self, x: Tensor, topk_ids: Tensor, topk_weight: Tensor) -> Tensor:
        order = topk_ids.flatten().argsort()
        rows = x[order // topk_ids.shape[1]]
        counts = topk_ids.flatten().bincount(minlength=EXPERTS).tolist()
        parts = rows.split(counts)
        outs = torch.cat([self.experts[i](part) for i, part in enumerate(parts)])
        placed = torch.empty_like(outs)
        placed[order] = outs
        placed = placed.view(*topk_ids.shape, -1)
        return (placed * topk_weight[..., None]).sum(1).to(x.dtype)


class InlineBlock(_Block):
    """Mixtral's form in transformers 4.x."""

    names = ("w1", "w3", "w2")

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        ids, weights = self.route(flat)
        out = self.shared_experts(flat)
        mask = functional.one_hot(ids, EXPERTS).permute(2, 1, 0)
        for index, expert in enumerate(self.experts):
            slot, token = torch.where(mask[index])
            current = expert(flat[token]) * weights[token, slot, None]
            out.index_add_(0, token, current.to(out.dtype))
        return out.reshape(hidden.shape)


class InPlaceBlock(InlineBlock):
    """Multiplies an expert's output in place, in another dtype and from the left."""

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        ids, weights = self.route(flat)
        out = self.shared_experts(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(ids == index)
            gate = weights[token, slot, None]
            current = expert(flat[token])
            current = current.float().mul_(gate) if index % 2 else gate * current
            out.index_add_(0, token, current.to(flat.dtype))
        return out.reshape(hidden.shape)


class GatheredBlock(InlineBlock):
    """Concatenates expert outputs before any gate: cannot be observed."""

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        return torch.stack([expert(flat) for expert in self.experts]).sum(0)


class UngatedBlock(InlineBlock):
    """Adds expert outputs without a gate that could be seen: cannot be observed."""

    def forward(self, hidden: Tensor) -> Tensor:
        return sum(expert(hidden.reshape(-1, WIDTH)) + 0 for expert in self.experts)


class RowGateBlock(InlineBlock):
    """Multiplies by something that is not a column of router weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, WIDTH)
        return sum(expert(flat) * flat for expert in self.experts)


class CapacityBlock(InlineBlock):
    """Drops a token of the first expert, as capacity-limited dispatch does."""

    def route(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = super().route(hidden)
        return ids[:, :-1], weights[:, :-1]


BLOCKS = {
    "method": MethodBlock,
    "inline": InlineBlock,
    "in place": InPlaceBlock,
    "gathered": GatheredBlock,
    "ungated": UngatedBlock,
    "row gate": RowGateBlock,
    "capacity": CapacityBlock,
}


class RemoteModel(PreTrainedModel):
    """Embedding, two residual MoE blocks, head."""

    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": BLOCKS[config.block]()}) for _ in range(2)
        )
        self.lm_head = nn.Linear(WIDTH, VOCAB)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = hidden + layer["mlp"](hidden)
        return CausalLMOutput(logits=self.lm_head(hidden))


def remote(block: str) -> RemoteModel:
    """A random model with blocks of one form."""
    torch.manual_seed(0)
    model = RemoteModel(RemoteConfig(block)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model
