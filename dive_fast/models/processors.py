"""The processor of a vision-language checkpoint: its tokenizer, image processor and chat template."""

import functools

from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from dive_fast.errors import InputError


def load_processor(name: str, config):
    """The processor of the checkpoint `name`; of one without a vision part its fast tokenizer.

    Qwen-VL's, InternVL's and SmolVLM's processors also read videos, for which they want torchvision and a file that not
    every checkpoint has. They come without that part everywhere: reports are written from images.

    Raises:
        InputError: a package is missing that the processor cannot do without.
    """
    if not hasattr(config, "vision_config"):
        return AutoTokenizer.from_pretrained(name)
    cls = PROCESSOR_MAPPING[type(config)] if type(config) in PROCESSOR_MAPPING else AutoProcessor
    try:
        return (without_videos(cls) if _reads_videos(cls) else cls).from_pretrained(name)
    except ImportError as error:
        raise InputError(
            f"model: the processor of {name!r} needs a package that is not installed: {' '.join(str(error).split())}"
        ) from error


def image_backend(processor) -> str | None:
    """What its images are resized by, "torchvision" or "pil", whose pixels differ; None where it takes none."""
    return getattr(getattr(processor, "image_processor", None), "backend", None)


def _reads_videos(cls: type) -> bool:
    return issubclass(cls, ProcessorMixin) and "video_processor" in cls.get_attributes()


@functools.cache
def without_videos(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class that takes images and text, but no videos, saved under the name of the whole one."""
    whole = cls.get_attributes()
    attributes = [name for name in whole if name != "video_processor"]

    def from_args_and_dict(own, args, processor_dict, **options):
        loaded = dict(zip(attributes, args, strict=True))
        return super(own, own).from_args_and_dict([loaded.get(name) for name in whole], processor_dict, **options)

    body = {
        # What transformers loads, checks and saves.
        "get_attributes": classmethod(lambda own: list(attributes)),
        "from_args_and_dict": classmethod(from_args_and_dict),
        # SmolVLM's own asks how many frames its videos have.
        "apply_chat_template": ProcessorMixin.apply_chat_template,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), body)
