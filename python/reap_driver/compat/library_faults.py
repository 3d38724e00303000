"""Refuses models that one version of transformers cannot run, before their weights are read."""

import transformers
from transformers import PreTrainedModel

from reap_kernels.errors import UnsupportedModel

# Class and version -> what is wrong. Versions before it run the class.
FAULTS = {
    ("Llama4ForConditionalGeneration", "5.24.0"): (
        "its forward pass reads `image_outputs`, which its text part does not return"
    ),
}


def fault(name: str) -> str | None:
    """What is wrong with a class in the installed transformers; None if nothing is known."""
    return FAULTS.get((name, transformers.__version__))


def check_runs(where: object, kind: type[PreTrainedModel]) -> None:
    """Checks that the library can run a model of this class.

    Args:
        where: the checkpoint, for the message.
        kind: its class.

    Raises:
        UnsupportedModel: the installed version cannot, with the reason and the remedy.
    """
    why, version = fault(kind.__name__), transformers.__version__
    if why is not None:
        raise UnsupportedModel(
            f"{where}: transformers {version} cannot run {kind.__name__}: {why}; run `pip install "
            f"'transformers<{version}'`"
        )
