"""Whether an observation includes the model's multi-token-prediction layer."""

import dataclasses
from collections.abc import Container

from reap_driver.compat.mtp_layer import why_not_run
from reap_driver.load.streamed_model import mtp_refused
from reap_driver.workflow.inspection import Model
from reap_driver.workflow.jobs import EstimateOptions, ObserveOptions, PruneOptions
from reap_driver.workflow.listener import Listener


def with_mtp_choice(
    model: Model,
    options: ObserveOptions | PruneOptions | EstimateOptions,
    keys: Container[str] | None,
    listener: Listener,
) -> Model:
    """The model with its choice: `with_mtp` asks for the layer; `prune` observes it where it is
    pruned and can be run, which otherwise is noted.

    Args:
        model: what is known of it.
        options: of the job.
        keys: of the checkpoint's tensors; None if they are not known.
        listener: hears why the layer is not observed.

    Raises:
        UnsupportedModel: the layer is asked for, and it cannot be run.
    """
    asked = not isinstance(options, PruneOptions) and options.with_mtp
    pruned = not isinstance(options, ObserveOptions) and options.write.mtp == "prune"
    if not asked and not pruned:
        return model
    reason = why_not_run(model.meta, keys)
    if asked and reason is not None:
        raise mtp_refused(model.path, reason)
    if not isinstance(options, ObserveOptions) and options.shape.shape is not None:
        reason = reason or "`shape` needs Gram matrices, which are not summed in these layers"
    if options.run.device_map is not None:
        reason = reason or "the model is spread by `device_map`"
    if reason is not None:
        listener.note(f"multi-token-prediction layers are not observed: {reason}")
        return model
    return dataclasses.replace(model, mtp=True)
