"""Whether an observed model still has the modules that were found in it, in evaluation mode."""

from collections.abc import Sequence

from torch import nn

from reap_driver.model.discover import MoELayer
from reap_driver.model.unwrap import check_mode
from reap_kernels.errors import UnsupportedModel


def check_unchanged(
    model: nn.Module, layers: Sequence[MoELayer], *, all_modules: bool = False
) -> None:
    """Raises UnsupportedModel unless the modules are unchanged and in evaluation mode.

    Args:
        model: that is observed.
        layers: its MoE layers, as they were found.
        all_modules: check the mode of every module, not only of the MoE blocks.
    """
    blocks: list[tuple[str, nn.Module]] = [("", model)]
    for layer in layers:
        block_name, _, leaf = layer.name.rpartition(".")
        try:
            block = model.get_submodule(block_name)
            found = getattr(block, leaf, None)
        except AttributeError:
            found = None
        if found is not layer.module:
            raise UnsupportedModel(
                f"{layer.name} is another module than when observe() was called, so its tokens "
                "would not be counted; change the model first, then call observe() again"
            )
        blocks.append((block_name, block))
    for name, module in model.named_modules() if all_modules else blocks:
        check_mode(name, module)
