"""The processors of models that take images: token ids and pixels from a text and its images."""

from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, PretrainedConfig
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING


def load_processor(
    model: str | Path, config: PretrainedConfig, tokenizer: Any, *, trust_remote_code: bool
) -> Any | None:
    """The processor of a model, called with `text` and `images`; None where it has none for images.

    Where a library that it needs for videos or sound alone is missing (torchvision), the same
    without its parts for these.

    Raises:
        Whatever the library does where files are missing or damaged.
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
    """The class of a processor that may do without its parts for anything but text and images."""

    def check(self: Any, name: str, part: Any) -> Any:
        if part is None:
            return None
        return cls.check_argument_for_proper_class(self, name, part)

    return type(cls.__name__, (cls,), {"check_argument_for_proper_class": check})
