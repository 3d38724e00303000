"""Finds what of a model can be fused, and binds it while a context is open."""

import contextlib
import inspect
import weakref
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from reap_driver.base.arguments import typed
from reap_driver.compat.text_model import text_model
from reap_driver.fusing.attention import rotated_norms
from reap_driver.fusing.binding import GlobalFunctions, forward_replaced, unfit
from reap_driver.fusing.deferred import Branch
from reap_driver.fusing.layers import pre_norm
from reap_driver.fusing.norms import NormFormula, is_candidate, norm_formula
from reap_driver.fusing.rotary_formula import Form
from reap_driver.fusing.sites import NormSite, RotarySite
from reap_driver.model.forward import forward, input_device
from reap_driver.model.unwrap import check_mode, unwrap_model
from reap_kernels import tuning
from reap_kernels.errors import UsageError

_FUNCTIONS = GlobalFunctions()
# The contexts that have bound parts of a model, by its part that takes text.
_OPEN: "weakref.WeakKeyDictionary[nn.Module, list[Fused]]" = weakref.WeakKeyDictionary()
# The number of tokens of a batch on a GPU, for which the launch table is asked.
_ROWS = 16_384


class Fused:
    """The context that `fused()` returns, and that an observer opens.

    Attributes:
        model: the model, without wrappers.

    Example:
        >>> with rd.fused(model) as fused:
        ...     output = fused(input_ids=ids)
        >>> fused.counts["norm"]
        5
    """

    def __init__(
        self, model: PreTrainedModel, fuse: bool | None = True, backend: str | None = None
    ) -> None:
        self.model = unwrap_model(model)
        self._fuse, self._backend = fuse, backend
        self._left: dict[str, str] = {}
        self._norms: dict[str, NormSite] = {}
        self._rotary: dict[str, RotarySite] = {}
        self._sums: dict[str, str] = {}  # a child whose output is added -> norm of the sum
        self._exit: contextlib.ExitStack | None = None

    @property
    def bound(self) -> dict[str, str]:
        """{name: kind} of modules and functions that kernels compute, as `counts` names kinds."""
        kinds = {}
        for name, site in self._norms.items():
            kind = "norm_rotary" if site.rotations else "residual_norm" if site.sums else "norm"
            kinds[name] = "" if site.left else kind
        kinds.update(dict.fromkeys(self._rotary, "rotary"))
        kinds.update(dict.fromkeys(self.left, ""))
        return {name: kind for name, kind in kinds.items() if kind}

    @property
    def left(self) -> dict[str, str]:
        """{name: reason} of modules and functions that were tried, and run the model's own code."""
        sites = [*self._norms.items(), *self._rotary.items()]
        unlike = {name: s.unlike for name, s in self._rotary.items() if s.unlike and not s.calls}
        return {**self._left, **unlike, **{name: site.left for name, site in sites if site.left}}

    @property
    def counts(self) -> dict[str, int]:
        """How many are bound: `norm`s, those that add a residual (`residual_norm`) or are computed
        with a rotation (`norm_rotary`) in the calls so far, and functions that rotate (`rotary`);
        and `left`, how many are not.
        """
        found = Counter(self.bound.values())
        kinds = ("norm", "residual_norm", "norm_rotary", "rotary")
        return {**{kind: found[kind] for kind in kinds}, "left": len(self.left)}

    @property
    def active(self) -> bool:
        """Whether anything is bound."""
        return bool(self._norms or self._rotary)

    def __enter__(self) -> "Fused":
        if self._exit is not None:
            raise UsageError("this context is entered already; call fused() again for another")
        check_mode("", self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            self.bind(stack)
            self._exit = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._exit is not None
        self._exit.close()
        self._exit = None

    def __call__(self, **batch: Any) -> Any:
        """Runs the model on a batch of its arguments, such as `input_ids` [batch, seq] int64.

        Raises:
            UsageError: called outside the `with` block.
        """
        if self._exit is None:
            raise UsageError(
                "this context is called outside its `with` block, where the model's own code runs; "
                "write `with rd.fused(model) as fused: fused(**batch)`"
            )
        return forward(self.model, batch)

    def bind(self, stack: contextlib.ExitStack) -> None:
        """Binds everything that fits until the stack is closed."""
        wanted = [op for op in ("norm", "rotary") if self._wants(op)]
        self._left, self._norms, self._rotary, self._sums = {}, {}, {}, {}
        modules = dict(text_model(self.model).named_modules()) if wanted else {}
        if "norm" in wanted:
            self._find_norms(modules)
        if "rotary" in wanted:
            self._bind_rotary(modules, stack)
        for name, site in self._norms.items():
            stack.enter_context(forward_replaced(modules[name], site.forward))
        for branch, norm in self._sums.items():
            binding = _branch(self._norms[norm])
            stack.enter_context(forward_replaced(modules[branch], binding))
        if self.active:
            stack.enter_context(self._open())

    @contextlib.contextmanager
    def _open(self) -> Iterator[None]:
        """Inside, other contexts know of this one."""
        others = _OPEN.setdefault(text_model(self.model), [])
        others.append(self)
        try:
            yield
        finally:
            others.remove(self)

    def check_alone(self) -> None:
        """Raises UsageError if another context has bound parts of the model: statistics, whose
        observer asked for its own, would not record it.
        """
        if any(one is not self for one in _OPEN.get(text_model(self.model), ())):
            raise UsageError(
                "the observed model is inside rd.fused() too, which its statistics would not "
                "record; leave that context, and write rd.observe(model, fuse=True) instead"
            )

    def _wants(self, op: str) -> bool:
        """Whether an op's kernel is to run: as asked for, else as the launch table has it."""
        if self._fuse is not None:
            return self._fuse
        device = input_device(text_model(self.model))
        if device.type != "cuda":
            return False
        found = tuning.choose_backend(device, op, self.model.dtype, self._hidden, _ROWS)
        return found != "model"

    @property
    def _hidden(self) -> int:
        """Width of the hidden states."""
        width = getattr(self.model.config.get_text_config(), "hidden_size", None)
        if width is None:  # a configuration may name it otherwise
            width = next(text_model(self.model).get_input_embeddings().parameters()).shape[-1]
        return int(width)

    def _find_norms(self, modules: dict[str, nn.Module]) -> None:
        """Norms, and the layers that give one a sum."""
        known: dict[Any, NormFormula | str] = {}
        for name, module in modules.items():
            if not is_candidate(module):
                continue
            found: NormFormula | str = unfit(module)
            if not found:
                key = _alike(module)
                if key not in known:
                    known[key] = norm_formula(module, self.model.dtype)
                found = known[key]
            if isinstance(found, str):
                self._left[name] = found
            else:
                [weight] = module._parameters
                self._norms[name] = NormSite(name, weight, found, self._backend)
        names = {module: name for name, module in modules.items()}
        for name, module in modules.items():
            if isinstance(modules.get(name.rpartition(".")[0]), nn.ModuleList):
                self._find_sum(name, module, names)

    def _find_sum(self, name: str, layer: nn.Module, names: dict[nn.Module, str]) -> None:
        """The norm of a layer's sum of its input and a child's output, if it has one; `names` has
        one for every module, also for those that several layers share.
        """
        own = self._norms_in(name, layer)
        if len(own) < 2:
            return
        found = pre_norm(layer, own, _width(layer.get_submodule(next(iter(own)))))
        if not isinstance(found, str):
            branch = layer.get_submodule(found.branch)
            reason = unfit(branch)
            if not reason:
                self._sums.setdefault(names[branch], f"{name}.{found.norm}")
                return
            found = f"{found.branch} {reason}"
        self._left[name] = f"residual and norm apart: {found}"

    def _norms_in(self, name: str, module: nn.Module) -> dict[str, NormSite]:
        """The norms among a module's children, by the children's names."""
        names = {child: f"{name}.{child}" for child in module._modules}
        return {child: self._norms[full] for child, full in names.items() if full in self._norms}

    def _bind_rotary(self, modules: dict[str, nn.Module], stack: contextlib.ExitStack) -> None:
        """Functions that rotate, in the Python modules of the classes that call them."""
        sites: dict[tuple[int, str], RotarySite | None] = {}
        for name, module in modules.items():
            code = inspect.unwrap(type(module).forward)
            names = getattr(code, "__globals__", {})
            keys = [(id(names), used) for used in code.__code__.co_names] if names else []
            for key in keys:
                if key not in sites:
                    sites[key] = self._rotary_site(names, key[1], stack)
            used = [site for key in keys if (site := sites[key]) is not None]
            own = self._norms_in(name, module)
            if used and own:
                widths = {child: _width(module.get_submodule(child)) for child in own}
                for child in rotated_norms(module, widths, used, self._hidden):
                    own[child].head = True

    def _rotary_site(
        self, names: dict[str, Any], used: str, stack: contextlib.ExitStack
    ) -> RotarySite | None:
        """The bound function of a name; None if it is no candidate, or does not fit."""
        own: Any = names.get(used)
        if isinstance(own, RotarySite) and own.ended:  # imported while a context was open
            own = own.own
        form = own.form if isinstance(own, RotarySite) else Form.of(own)
        if form is None:
            return None
        full = f"{names['__name__'].rpartition('.')[2]}.{used}"
        if isinstance(own, RotarySite) and own.backend != self._backend:
            self._left[full] = f"is bound with backend={own.backend!r} by another open context"
            return None
        site = own if isinstance(own, RotarySite) else RotarySite(full, own, form, self._backend)
        if not site.fits():
            self._left[full] = "rotates in none of the layouts that the kernel has"
            return None
        bound: RotarySite = stack.enter_context(_FUNCTIONS.replaced(names, used, site))
        stack.enter_context(bound.used())
        self._rotary[full] = bound
        return bound


def _branch(norm: NormSite) -> Any:
    """What runs instead of the forward of a child whose output is added to the residual."""

    def run(module: nn.Module, own: Any, args: Any, kwargs: Any) -> Any:
        found = own(*args, **kwargs)
        first = found[0] if isinstance(found, tuple) and found else found
        if not norm.runs(first) or first.is_inference():
            return found
        deferred = Branch.of(first)
        return (deferred, *found[1:]) if isinstance(found, tuple) else deferred

    return run


def _width(norm: nn.Module) -> int:
    """H, of a norm."""
    return len(next(norm.parameters()))


def _alike(module: nn.Module) -> Any:
    """Equal for modules that compute the same but for their weights."""
    [parameter] = module._parameters.values()
    facts = tuple(
        (name, value)
        for name, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | torch.dtype | torch.Size | type(None))
    )
    assert parameter is not None
    return type(module), facts, parameter.shape, parameter.dtype


@typed
def fused(model: PreTrainedModel, *, backend: str | None = None) -> Fused:
    """Computes norms, residual additions and rotary embeddings of a model in fewer kernels.

    Inside the context, `rms_norm` and `rotary` of `reap_kernels` run where the model's own code
    computes what they do: what a module computes is found from its outputs on made inputs, never
    from its name, and compared on a few rows of the first real input. Everything else, and
    everything that differs, runs the model's own code. Outputs are those of the model within
    rounding; no gradients are computed. The model is as before once the context is left.

    Functions that rotate belong to the Python module of an architecture: other models of it that
    run without gradients while the context is open use the kernel too.

    Args:
        model: a loaded model in evaluation mode. If `torch.compile`, `DataParallel` or
            `DistributedDataParallel` wraps it, the wrapped model runs.
        backend: of `rms_norm` and `rotary`, without fallback; None for the best one.

    Returns:
        The context; call it with a batch to run the model, or call the model itself.

    Raises:
        UsageError: `model` is not a model.
        UnsupportedModel: it is in training mode; or it changes a residual, query or key in place
            before what was computed from it is used.

    Example:
        >>> with rd.fused(model) as fused:
        ...     output = fused(input_ids=ids)  # int64 [batch, seq]
        >>> fused.counts["left"], list(fused.left.values())
        (0, [])
    """
    return Fused(model, True, backend)
