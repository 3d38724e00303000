"""DBRX: three 2-D tensors hold the experts, each as a block of rows."""

from contextlib import AbstractContextManager

from torch import Tensor

from reap_driver.compat.experts_interface import eager_forward
from reap_driver.model.adapters.adapter import (
    ExpertsModule,
    KernelAdapter,
    Recorder,
    Sizes,
    forward_replaced,
)
from reap_kernels import Activation, ExpertWeights, probe_activation


class DbrxExperts(KernelAdapter):
    """`mlp.w1` gate, `mlp.v1` up, `mlp.w2` down, each [E * I, H]; batched hidden states."""

    name = "dbrx"

    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        mlp = getattr(module, "mlp", None)
        return all(getattr(getattr(mlp, leaf, None), "ndim", 0) == 2 for leaf in ("w1", "v1", "w2"))

    def sizes(self, module: ExpertsModule) -> Sizes:
        rows, hidden = module.mlp.w1.shape
        return Sizes(module.num_experts, hidden, rows // module.num_experts)

    def activation(self, module: ExpertsModule) -> Activation:
        mlp = module.mlp

        def function(projected: Tensor) -> Tensor:
            gate, up = projected.chunk(2, dim=-1)
            activated: Tensor = mlp.activation_fn(gate)
            return activated * up

        return probe_activation(
            function,
            intermediate_size=self.sizes(module).intermediate_size,
            gated=True,
            device=mlp.w1.device,
        )

    def weights(self, module: ExpertsModule, activation: Activation) -> ExpertWeights:
        sizes = self.sizes(module)
        blocks = (sizes.num_experts, sizes.intermediate_size, sizes.hidden_size)
        gate, up, down = (
            getattr(module.mlp, leaf).detach().view(blocks) for leaf in ("w1", "v1", "w2")
        )
        return ExpertWeights(up, down.transpose(1, 2), activation, gate=gate)

    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> AbstractContextManager[None]:
        own = eager_forward(module)

        def eager(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return own(hidden[None], ids, weights)[0]

        def run(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            flat = hidden_states.reshape(-1, hidden_states.shape[-1])
            out = recorder.observe(flat, top_k_index, top_k_weights, eager)
            return out.reshape(hidden_states.shape)

        return forward_replaced(module, run)
