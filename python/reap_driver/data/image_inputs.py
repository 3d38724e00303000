"""Makes the inputs of a model from conversations with images, by the model's processor."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from reap_driver.compat.library_errors import wrap_errors
from reap_driver.compat.processors import load_processor
from reap_driver.data.images import decode
from reap_kernels.errors import DataError


@dataclass(frozen=True)
class ImageInputs:
    """A conversation with its images, from which the model's inputs are made for each batch.

    They are not kept, because pixels take hundreds of times the memory of the encoded images.

    Attributes:
        text: the conversation as the chat template renders it, with placeholders for the images.
        images: the encoded images.
        place: place of the record, for error messages.
        processor: the processor of the model.
    """

    text: str
    images: Sequence[bytes]
    place: str
    processor: Any = field(compare=False, repr=False)

    def inputs(self) -> dict[str, Tensor]:
        """Arguments of the model: `input_ids` [1, seq] int64, and the processor's other tensors.

        Raises:
            DataError: the processor fails.
        """
        images = [decode(image, self.place) for image in self.images]
        fails = f"{self.place}: the processor of the model fails on its text and images"
        remedy = "correct the images, the text or the chat template"
        if getattr(self.processor, "video_processor", self) is None:  # see `load_processor`
            remedy += ", or install torchvision, without which it has no part for videos"
        with wrap_errors(fails, remedy, error=DataError):
            made = self.processor(text=[self.text], images=[images], return_tensors="pt")
            inputs = {name: value for name, value in made.items() if isinstance(value, Tensor)}
            mask = inputs.pop("attention_mask", None)
            if mask is not None and not bool(mask.all()):
                raise ValueError("it pads a text that is alone")
            return inputs


class ImageEncoder:
    """Tokenizes conversations with images; loads the model's processor when it is first needed.

    Args:
        model: folder or hub id.
        config: configuration of the model.
        trust_remote_code: run code that comes with a processor.
    """

    def __init__(
        self, model: str | Path, config: PretrainedConfig, *, trust_remote_code: bool
    ) -> None:
        self._model, self._config, self._trust = model, config, trust_remote_code
        self._loaded = False
        self._processor: Any = None

    def of(
        self, place: str, text: str, images: Sequence[bytes], tokenizer: Any
    ) -> tuple[ImageInputs, list[int]]:
        """The conversation's inputs, and its token ids, those of images included.

        Raises:
            DataError: the model has no processor for images, or the processor fails.
        """
        if not self._loaded:
            remedy = "add its files (preprocessor_config.json, ...), or leave out images"
            fails = f"{place}: has images, and the processor of {self._model} cannot be loaded"
            with wrap_errors(fails, remedy, error=DataError):
                self._processor = load_processor(
                    self._model, self._config, tokenizer, trust_remote_code=self._trust
                )
            self._loaded = True
        if self._processor is None:
            raise DataError(
                f"{place}: has images, but {self._model} has no processor for them; use a model "
                "that takes images, or records of text"
            )
        made = ImageInputs(text, images, place, self._processor)
        ids: list[int] = made.inputs()["input_ids"].to(torch.int64).flatten().tolist()
        return made, ids
