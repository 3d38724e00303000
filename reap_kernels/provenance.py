"""What statistics and plans record of where they come from: the kinds of the fields that are read.

Other fields may stand beside them: they are kept, and never computed with.
"""

from reap_kernels.schema import Anything, Flag, Int, Kind, ListOf, MapOf, OrNull, Real, Record, Text

MAX_EXPERTS = 1_000_000  # of a layer
MAX_TOKENS = 2**53  # float64, which scores are computed in, counts no further one by one

_NUMBER = OrNull(Int(0, MAX_TOKENS))
_NAME = OrNull(Text(1_000))  # a path may have more than 500 characters

# Of one MoE layer: `MoELayer.provenance` of the driver.
LAYER = Record(
    optional={
        "num_experts": Int(1, MAX_EXPERTS),
        "top_k": Int(1, MAX_EXPERTS),
        "n_group": OrNull(Int(0, MAX_EXPERTS)),
        "topk_group": OrNull(Int(0, MAX_EXPERTS)),
        "hidden_size": _NUMBER,
        "intermediate_size": _NUMBER,
        "scale": OrNull(Real()),
        "norm_space": _NAME,
        "mtp": OrNull(Flag()),  # a multi-token-prediction layer
        "expert_parameters": _NUMBER,  # of one expert, without its rows of the router
    },
    open=True,
)

MODEL = Record(
    optional={
        **dict.fromkeys(("id", "config_digest", "model_type", "architecture"), _NAME),
        "config": MapOf(Anything()),  # what its digest is of
        "parameters": _NUMBER,
        "dtype": _NAME,  # of the weights in memory
        "layers": MapOf(LAYER),  # of a plan
    },
    open=True,
)

# Of one source of calibration data.
SOURCE = Record(
    optional={
        **dict.fromkeys(("group", "source", "packing", "digest"), _NAME),
        **dict.fromkeys(("records", "tokens", "counted_tokens", "sequences", "seq_len"), _NUMBER),
    },
    open=True,
)

# How a model was observed: the model of the device, not the name of the machine.
OBSERVED = Record(
    optional={
        "device": _NAME,
        **dict.fromkeys(("devices", "memory_bytes", "threads"), _NUMBER),
        "seconds": OrNull(Real(low=0)),
        "seed": OrNull(Int(-(2**63), 2**63)),  # of the samples of the data
    },
    open=True,
)

_FIELDS: dict[str, Kind] = {
    "model": MODEL,
    "layers": MapOf(LAYER),
    "data": ListOf(SOURCE),
    "gate": _NAME,
    "backend": _NAME,
    "created": _NAME,
    "software": MapOf(_NAME),
    "unobserved": ListOf(Text(500)),
    "stacks": MapOf(ListOf(Text(500))),  # by field that counts experts: its layers
    "notes": ListOf(Text()),
    "fused": MapOf(Int(0)),  # norms and rotations that kernels computed, by kind
    "served": MapOf(ListOf(Text(500))),  # by layer, of a snapshot: the backends it ran on
    "observed": OBSERVED,
    "run": MapOf(Anything()),  # what the command that made them asked for
}
PROVENANCE = Record(optional=_FIELDS, open=True)
