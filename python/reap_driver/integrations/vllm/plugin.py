"""Entry point `vllm.general_plugins`, which every process of vLLM calls before it builds a model.

vLLM calls the plugins of this group that VLLM_PLUGINS names, and all of them where it is unset.
This one does nothing unless it is named, and imports nothing until then.
"""

import logging
import os

NAME = "reap"
_log = logging.getLogger("vllm.reap")


def named() -> bool:
    """Whether the environment variable VLLM_PLUGINS names this plugin."""
    return NAME in (name.strip() for name in os.environ.get("VLLM_PLUGINS", "").split(","))


def register() -> None:
    """Gives vLLM's workers the calls of `engine.worker`, where VLLM_PLUGINS names `reap`.

    Raises:
        BackendUnavailable: this vLLM lacks something that is hooked, so that it does not start.
    """
    if named():
        from reap_driver.integrations.vllm.engine import versions

        versions.check()
        said = versions.note()
        if said is not None:
            _log.warning(said)
        from reap_driver.integrations.vllm.engine.worker import install

        install()
