"""Experts as modules of an `nn.ModuleList`, in remote code and transformers 4.x.

If the block passes (hidden, ids, weights) to a method of its own (`moe_infer`, `moe`), that method
is replaced and the kernels read the experts' matrices through a table of pointers. If the block
contains the routing code itself, it runs unchanged: each expert's output is a tensor subclass that
records statistics when it is multiplied by the router weights. This is exact and independent of the
router, but as slow as the block.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reap_driver.model.adapters.adapter import (
    Adapter,
    ExpertsModule,
    KernelAdapter,
    Recorder,
    Sizes,
    forward_replaced,
)
from reap_kernels import Activation, ExpertWeights, accumulate, probe_activation
from reap_kernels.errors import UnsupportedModel

# Names of the gate, up and down projections of one expert.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_METHODS = ("moe_infer", "moe")


def is_expert_list(module: ExpertsModule) -> bool:
    """Whether a module is a list of at least two modules of one class, with weights."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    return len({type(child) for child in module}) == 1 and any(True for _ in module[0].parameters())


class MethodExperts(KernelAdapter):
    """A block whose own method takes (hidden [T, H], ids [T, k], weights [T, k])."""

    name = "module-list"

    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        return is_expert_list(module) and _method(block) is not None and _names(module) is not None

    def sizes(self, module: ExpertsModule) -> Sizes:
        down = self._projections(module[0])[2].weight
        return Sizes(len(module), down.shape[0], down.shape[1])

    def activation(self, module: ExpertsModule) -> Activation:
        expert = module[0]
        # An expert without such an attribute calls its activation directly; SiLU is assumed, and
        # the comparison of the first call detects another one.
        named = (getattr(expert, key, None) for key in ("act_fn", "activation_fn"))
        act: Any = next((found for found in named if found is not None), functional.silu)

        def function(projected: Tensor) -> Tensor:
            gate, up = projected.chunk(2, dim=-1)
            activated: Tensor = act(gate)
            return activated * up

        weight = self._projections(expert)[0].weight
        return probe_activation(
            function,
            intermediate_size=weight.shape[0],
            gated=True,
            device=weight.device,
        )

    def weights(self, module: ExpertsModule, activation: Activation) -> ExpertWeights:
        gates, ups, downs = zip(*(self._projections(expert) for expert in module), strict=True)
        return ExpertWeights(
            [up.weight.detach() for up in ups],
            [down.weight.detach() for down in downs],
            activation,
            gate=[gate.weight.detach() for gate in gates],
            up_bias=_stacked_bias(ups),
            gate_bias=_stacked_bias(gates),
            down_bias=_stacked_bias(downs),
        )

    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> AbstractContextManager[None]:
        method = _method(block)
        assert method is not None  # checked by serves()
        eager = getattr(block, method)

        def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return recorder.observe(hidden, ids, weights, eager)

        return forward_replaced(block, run, method)

    def _projections(self, expert: ExpertsModule) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        names = _names_of(expert)
        assert names is not None  # checked by serves()
        gate, up, down = (getattr(expert, name) for name in names)
        return gate, up, down


class InlineExperts(Adapter):
    """A block that calls its experts and multiplies each output by a column of router weights."""

    name = "module-list-inline"

    @property
    def takes_mask(self) -> bool:
        return False

    @property
    def takes_gram(self) -> bool:
        return False

    def serves(self, module: ExpertsModule, block: ExpertsModule) -> bool:
        return is_expert_list(module) and bool(_linears(module[0]))

    def sizes(self, module: ExpertsModule) -> Sizes:
        last = _linears(module[0])[-1]
        names = _names_of(module[0])
        if names is not None:
            last = getattr(module[0], names[2])
        return Sizes(len(module), last.out_features, last.in_features)

    @contextlib.contextmanager
    def bind(
        self, module: ExpertsModule, block: ExpertsModule, recorder: Recorder
    ) -> Iterator[None]:
        call = _InlineCall(recorder)
        with contextlib.ExitStack() as stack:
            handles = [block.register_forward_pre_hook(call.begin, with_kwargs=True)]
            handles += [
                expert.register_forward_hook(call.output_of(index))
                for index, expert in enumerate(module)
            ]
            handles.append(block.register_forward_hook(call.end))
            for handle in handles:
                stack.callback(handle.remove)
            yield


class _InlineCall:
    """Hooks for one call of a block: at its start, at each expert's output, and at its end."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._tokens = 0
        self._rows = 0

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts the block's tokens."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self._tokens = hidden.numel() // hidden.shape[-1]
        self._rows = 0
        self._recorder.token_mask(self._tokens, hidden.device)
        self._recorder.watch(hidden.reshape(self._tokens, -1), None)
        stats, group = self._recorder.open(hidden.device)
        stats.add_tokens(self._tokens, group)

    def output_of(self, expert: int) -> Callable[..., Tensor]:
        """A hook after which the product of an expert's output and router weights is recorded."""

        def record(y: Tensor, router_weights: Tensor) -> None:
            stats, group = self._recorder.open(y.device)
            ids = torch.full((len(y),), expert, device=y.device)
            accumulate(y, ids, router_weights, stats, group=group, backend=self._recorder.backend)
            self._rows += len(y)

        return lambda _, __, output: _Output.of(output, record)

    def end(self, *_: Any) -> None:
        """Raises UnsupportedModel if a slot was not weighted, as with a limited expert capacity."""
        expected = self._tokens * self._recorder.top_k
        if self._rows != expected:
            raise UnsupportedModel(
                f"{self._recorder.name} weighted {self._rows} rows for {self._tokens} tokens, "
                f"expected {expected}: some reach no expert, or not through a product; use a model "
                "class that transformers ships"
            )


class _Output(Tensor):
    """An expert's output [n, H], until it is multiplied by its router weights [n, 1]."""

    _record: Callable[[Tensor, Tensor], None]

    @classmethod
    def of(cls, output: Tensor, record: Callable[[Tensor, Tensor], None]) -> "_Output":
        wrapped = output.detach().as_subclass(cls)
        wrapped._record = record
        return wrapped

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own = next((a for a in args if isinstance(a, cls)), None)
        name = getattr(func, "__name__", "")
        if own is not None and name in _PRODUCTS | _CASTS | _QUERIES:
            with torch._C.DisableTorchFunctionSubclass():
                if name in _PRODUCTS:  # recorded before the product, which may be in place
                    router_weights = _column(own, [a for a in args if a is not own])
                    own._record(own.as_subclass(Tensor), router_weights)
                plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
                result = func(*plain, **(kwargs or {}))
                return cls.of(result, own._record) if name in _CASTS else result
        raise UnsupportedModel(
            f"an expert's output reached {name} before being multiplied by its router weight; this "
            "block cannot be observed, use a model class that transformers ships"
        )


_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_CASTS = {"to", "type", "float", "bfloat16", "half", "contiguous", "type_as"}
_QUERIES = {"__get__", "size", "dim", "numel", "__len__", "is_floating_point"}


def _column(own: Tensor, others: list[Any]) -> Tensor:
    """The router weights [n] among the factors of a product with `own` [n, H]."""
    for other in others:
        if isinstance(other, Tensor) and tuple(other.shape) == (len(own), 1):
            return other.reshape(-1)
    shapes = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in others]
    raise UnsupportedModel(
        f"an expert's output {tuple(own.shape)} was multiplied by {shapes}, not by a column of "
        "router weights; this block cannot be observed, use a model class that transformers ships"
    )


def _method(block: ExpertsModule) -> str | None:
    """Name of the block's method with three arguments that runs the experts; None if it has
    none.
    """
    for name in _METHODS:
        method = getattr(block, name, None)
        if callable(method) and len(inspect.signature(method).parameters) == 3:
            return name
    return None


def _names(experts: ExpertsModule) -> tuple[str, str, str] | None:
    return _names_of(next(experts.children()))


def _names_of(expert: ExpertsModule) -> tuple[str, str, str] | None:
    """Names of an expert's three linear projections; None unless it has exactly these."""
    for names in _PROJECTIONS:
        projections = [getattr(expert, name, None) for name in names]
        if all(isinstance(p, nn.Linear) for p in projections):
            return names if len(_linears(expert)) == len(names) else None
    return None


def _linears(expert: ExpertsModule) -> list[nn.Linear]:
    return [child for child in expert.modules() if isinstance(child, nn.Linear)]


def _stacked_bias(linears: tuple[nn.Linear, ...]) -> Tensor | None:
    """[E, out], a copy of the biases of E linear layers; None if they have none."""
    if linears[0].bias is None:
        return None
    return torch.stack([linear.bias.detach() for linear in linears])
