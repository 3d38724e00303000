"""Loads the processor of a model: it makes token ids and pixels from a text and its images."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


def load_processor(
    model: str | Path, config: PretrainedConfig, tokenizer: Any, *, trust_remote_code: bool
) -> Any | None:
    """The processor of a model, called with `text` and `images`; None if it has none for images.

    If a library is missing that it needs only for video or audio (torchvision), it is loaded
    without its parts for these.

    Raises:
        Exception: of any class, from the library, if files are missing or damaged.
    """
    trust = {"trust_remote_code": True} if trust_remote_code else {}
    try:
        found = AutoProcessor.from_pretrained(str(model), config=config, **trust)
    except ImportError:
        cls = PROCESSOR_MAPPING.get(type(config), None)
        if cls is None:
            raise
        images = AutoImageProcessor.from_pretrained(str(model), **trust)
        found = _for_images(cls)(image_processor=images, tokenizer=tokenizer)
    return found if getattr(found, "image_processor", None) is not None else None


def _for_images(cls: Any) -> Any:
    """A subclass of a processor class that allows its parts for video and audio to be missing."""

    def check(self: Any, name: str, part: Any) -> Any:
        if part is None:
            return None
        return cls.check_argument_for_proper_class(self, name, part)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})
