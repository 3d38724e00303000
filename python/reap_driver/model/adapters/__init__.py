"""Adapters: what differs between kinds of experts modules, one file per kind."""

from reap_driver.model.adapters.adapter import (
    Adapter,
    ExpertCall,
    ExpertsModule,
    KernelAdapter,
    Recorder,
    Sample,
    Sizes,
)
from reap_driver.model.adapters.dbrx import DbrxExperts
from reap_driver.model.adapters.llama4 import Llama4Experts
from reap_driver.model.adapters.module_list import InlineExperts, MethodExperts
from reap_driver.model.adapters.stacked import StackedExperts

# Tried in this order; the first adapter that serves a module is used.
ADAPTERS: tuple[Adapter, ...] = (
    Llama4Experts(),
    StackedExperts(),
    DbrxExperts(),
    MethodExperts(),
    InlineExperts(),
)

__all__ = [
    "ADAPTERS",
    "Adapter",
    "ExpertCall",
    "ExpertsModule",
    "KernelAdapter",
    "Recorder",
    "Sample",
    "Sizes",
]
