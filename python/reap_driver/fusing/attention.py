"""Which norms of an attention module give a rotation what it rotates.

The module is run on stubs of its children while the function that rotates is watched. A norm is
found where the function is given the norm's very output, with dimensions exchanged at most.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from reap_driver.fusing.probing import Made, run_forward, with_stubs
from reap_driver.fusing.sites import RotarySite

_TOKENS = 3


def rotated_norms(
    attention: nn.Module, widths: Mapping[str, int], rotations: list[RotarySite], hidden: int
) -> set[str]:
    """Names of norms whose outputs are rotated.

    Args:
        attention: the module, on any device: none of its parameters is used.
        widths: {name: H} of its children that are norms.
        rotations: the functions that it may call, bound.
        hidden: width of its input.
    """
    made = Made()
    normed: dict[int, tuple[str, Tensor]] = {}
    found: set[str] = set()

    def answer(name: str, child: nn.Module) -> Any:
        weight = getattr(child, "weight", None)
        columns = weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None

        def norm(x: Tensor, *_: Any) -> Tensor:
            out = made.normal(*x.shape)
            if x.shape[-1] == widths[name]:
                normed[out.data_ptr()] = (name, out)
            return out

        def product(x: Tensor, *_: Any) -> Tensor:
            return made.normal(*x.shape[:-1], columns or x.shape[-1])

        return norm if name in widths else product

    def watch(heads: list[Any]) -> None:
        for one in heads:
            name, out = normed.get(one.data_ptr(), ("", None))
            if out is not None and one.numel() == out.numel() and one.shape[-1] == out.shape[-1]:
                found.add(name)

    angles = tuple(made.normal(1, _TOKENS, max(widths.values())) for _ in range(2))
    with contextlib.ExitStack() as stack:
        for site in rotations:
            stack.enter_context(site.watched(watch))
        with contextlib.suppress(Exception):  # what comes after the rotation may need more
            run_forward(
                with_stubs(attention, answer),
                made.normal(1, _TOKENS, hidden),
                position_embeddings=angles,
            )
    return found
