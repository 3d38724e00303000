"""Every check of a GPU there is; `tests.gpu.processes` runs them."""

from tests.gpu import (
    attention,
    facts,
    fp8,
    fusing,
    grams,
    jobs,
    logits,
    masks,
    models,
    norms,
    products,
    tma,
)
from tests.gpu import checks as layers
from tests.gpu.checks import Check


def plan(smoke: bool) -> list[Check]:
    """Every check there is: the GPU's own facts first, whole models and jobs last."""
    every = (
        facts,
        logits,
        norms,
        masks,
        products,
        tma,
        fp8,
        grams,
        layers,
        models,
        attention,
        fusing,
        jobs,
    )
    return [check for module in every for check in module.plan(smoke)]
