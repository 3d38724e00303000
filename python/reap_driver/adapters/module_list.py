"""One module an expert: blocks of remote code and of transformers 4.x.

Where the block hands (hidden, ids, weights) to a method of its own (`moe_infer`, `moe`), that method
is replaced and the experts' matrices are read as a table. Where routing is inline in the block, the
block runs as it is: each expert returns a tensor that knows whose output it is, and the
multiplication by the gate is where the statistics are taken. That is exact and needs no knowledge
of the router, at the block's own speed.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from reap_driver.adapters.base import Adapter, Recorder, Sizes, forward_replaced
from reap_kernels import ExpertWeights, GateFormula, accumulate, probe_gate
from reap_kernels.errors import UnsupportedModel

# Names of the gate, up and down projections of one expert.
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
_METHODS = ("moe_infer", "moe")


def is_expert_list(module: nn.Module) -> bool:
    """A list of at least two modules of one class that carry weights."""
    if not isinstance(module, nn.ModuleList) or len(module) < 2:
        return False
    return len({type(child) for child in module}) == 1 and any(True for _ in module[0].parameters())


class MethodExperts(Adapter):
    """A block whose own method takes (hidden [T, H], ids [T, k], weights [T, k])."""

    name = "module-list"

    def serves(self, module: nn.Module, block: nn.Module) -> bool:
        return is_expert_list(module) and _method(block) is not None and _names(module) is not None

    def sizes(self, module: nn.Module) -> Sizes:
        down = self._projections(module[0])[2].weight
        return Sizes(len(module), down.shape[0], down.shape[1])

    def formula(self, module: nn.Module) -> GateFormula:
        expert = module[0]
        act = getattr(expert, "act_fn", None) or getattr(expert, "activation_fn", torch.nn.SiLU())

        def function(projected: Tensor) -> Tensor:
            gate, up = projected.chunk(2, dim=-1)
            activated: Tensor = act(gate)
            return activated * up

        weight = self._projections(expert)[0].weight
        return probe_gate(
            function,
            intermediate_size=weight.shape[0],
            gated=True,
            device=weight.device,
        )

    def weights(self, module: nn.Module, formula: GateFormula) -> ExpertWeights:
        gates, ups, downs = zip(*(self._projections(expert) for expert in module), strict=True)
        return ExpertWeights(
            [up.weight.detach() for up in ups],
            [down.weight.detach() for down in downs],
            formula,
            gate=[gate.weight.detach() for gate in gates],
            up_bias=_stacked_bias(ups),
            gate_bias=_stacked_bias(gates),
            down_bias=_stacked_bias(downs),
        )

    def bind(
        self, module: nn.Module, block: nn.Module, recorder: Recorder
    ) -> AbstractContextManager[None]:
        method = _method(block)
        assert method is not None  # serves() said so
        eager = getattr(block, method)

        def run(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return recorder.observe(hidden, ids, weights, eager)

        return forward_replaced(block, run, method)

    def _projections(self, expert: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        names = _names_of(expert)
        assert names is not None  # serves() said so
        gate, up, down = (getattr(expert, name) for name in names)
        return gate, up, down


class InlineExperts(Adapter):
    """A block that calls its experts itself and multiplies each output by a column of gates."""

    name = "module-list-inline"

    @property
    def takes_mask(self) -> bool:
        return False

    def serves(self, module: nn.Module, block: nn.Module) -> bool:
        return is_expert_list(module) and bool(_linears(module[0]))

    def sizes(self, module: nn.Module) -> Sizes:
        last = _linears(module[0])[-1]
        names = _names_of(module[0])
        if names is not None:
            last = getattr(module[0], names[2])
        return Sizes(len(module), last.out_features, last.in_features)

    def formula(self, module: nn.Module) -> GateFormula:
        raise NotImplementedError("inline experts run as they are; nothing asks for their formula")

    def weights(self, module: nn.Module, formula: GateFormula) -> ExpertWeights:
        raise NotImplementedError("inline experts run as they are; nothing asks for their weights")

    @contextlib.contextmanager
    def bind(self, module: nn.Module, block: nn.Module, recorder: Recorder) -> Iterator[None]:
        rows: list[int] = []

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            stats, group = recorder.open(hidden.device)
            stats.add_tokens(hidden.numel() // hidden.shape[-1], group)
            rows.clear()

        def output_of(expert: int) -> Callable[..., Tensor]:
            def record(y: Tensor, gates: Tensor) -> None:
                stats, group = recorder.open(y.device)
                ids = torch.full((len(y),), expert, device=y.device)
                accumulate(y, ids, gates, stats, group=group, backend=recorder.backend)
                rows.append(len(y))

            return lambda _, __, output: _Output.of(output, record)

        with contextlib.ExitStack() as stack:
            handles = [block.register_forward_pre_hook(begin, with_kwargs=True)]
            handles += [e.register_forward_hook(output_of(i)) for i, e in enumerate(module)]
            for handle in handles:
                stack.callback(handle.remove)
            yield


class _Output(Tensor):
    """An expert's output [n, H] on its way to being multiplied by its gates [n, 1]."""

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
        kwargs = kwargs or {}
        own = next(a for a in args if isinstance(a, cls))
        with torch._C.DisableTorchFunctionSubclass():
            plain = [a.as_subclass(Tensor) if isinstance(a, cls) else a for a in args]
            result = func(*plain, **kwargs)
            name = getattr(func, "__name__", "")
            if name in _PRODUCTS:
                others = [a for a in args if a is not own]
                own._record(own.as_subclass(Tensor), _column(own, others))
                return result
            if name in _CASTS and isinstance(result, Tensor) and result.shape == own.shape:
                return cls.of(result, own._record)
            if name in _QUERIES:
                return result
        raise UnsupportedModel(
            f"an expert's output reached {name or func} before being multiplied by its gate; this "
            "block cannot be observed, use a model class that transformers ships"
        )


_PRODUCTS = {"mul", "mul_", "__mul__", "__rmul__", "__imul__", "multiply"}
_CASTS = {"to", "type", "float", "bfloat16", "half", "contiguous", "type_as"}
_QUERIES = {"__get__", "size", "dim", "numel", "__len__", "is_floating_point"}


def _column(own: Tensor, others: list[Any]) -> Tensor:
    """The gates [n] among the factors of a product with `own` [n, H]."""
    for other in others:
        if isinstance(other, Tensor) and tuple(other.shape) == (len(own), 1):
            return other.reshape(-1)
    shapes = [tuple(o.shape) if isinstance(o, Tensor) else type(o).__name__ for o in others]
    raise UnsupportedModel(
        f"an expert's output {tuple(own.shape)} was multiplied by {shapes}, not by a column of "
        "gates; this block cannot be observed, use a model class that transformers ships"
    )


def _method(block: nn.Module) -> str | None:
    """The block's method of three arguments that runs the experts, if it has one."""
    for name in _METHODS:
        method = getattr(block, name, None)
        if callable(method) and len(inspect.signature(method).parameters) == 3:
            return name
    return None


def _names(experts: nn.Module) -> tuple[str, str, str] | None:
    return _names_of(next(experts.children()))


def _names_of(expert: nn.Module) -> tuple[str, str, str] | None:
    """The names of one expert's three linear projections, if it has exactly these weights."""
    for names in _PROJECTIONS:
        projections = [getattr(expert, name, None) for name in names]
        if all(isinstance(p, nn.Linear) for p in projections):
            return names if len(_linears(expert)) == len(names) else None
    return None


def _linears(expert: nn.Module) -> list[nn.Linear]:
    return [child for child in expert.modules() if isinstance(child, nn.Linear)]


def _stacked_bias(linears: tuple[nn.Linear, ...]) -> Tensor | None:
    """[E, out] biases; small enough to copy."""
    if linears[0].bias is None:
        return None
    return torch.stack([linear.bias.detach() for linear in linears])
