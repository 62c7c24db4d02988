"""A LLaVA-architecture model small enough for a laptop: a text decoder, an untrained SigLIP tower, a projector.

Liu et al., "Visual Instruction Tuning" (NeurIPS 2023); Zhai et al., "Sigmoid Loss for Language Image Pre-Training"
(ICCV 2023). Its sight is random: it exercises everything a vision-language model has (image tokens, a vision tower, a
processor) at little cost, and says nothing about how well films are read.
"""

import copy

import torch

from dive_fast.errors import InputError
from dive_fast.models.tiny import CHATML_TEMPLATE, tiny_llama, tiny_tokenizer

IMAGE_TOKEN = "<image>"


def build_smol_llava(
    language_model=None,
    tokenizer=None,
    *,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    image_size: int = 64,
    patch_size: int = 16,
    seed: int = 0,
):
    """(LlavaForConditionalGeneration in eval mode, LlavaProcessor): any decoder behind a small untrained SigLIP tower.

    An image becomes (image_size // patch_size)^2 tokens. "<image>" is added to a copy of the tokenizer; the embedding
    (and the head, tied or not) gains a row for it, the mean of the others; it is never looked up, image features take
    its place. Apart from that row the decoder's weights are copied unchanged; `language_model` and `tokenizer` are not
    modified. The processor's chat template is ChatML, content as text or as image and text parts.

    Args:
        language_model, tokenizer: for instance `load_smollm2()`'s; both or neither. By default `tiny_llama` and
            `tiny_tokenizer`, for tests.
        vision_hidden, vision_layers, image_size, patch_size: the tower's; vision_hidden is a multiple of its heads' 32.
        seed: of the tower's and projector's weights; the caller's random state is untouched.

    Raises:
        InputError: one of language_model and tokenizer without the other, sizes that do not divide, pillow missing.
    """
    if (language_model is None) != (tokenizer is None):
        raise InputError("language_model, tokenizer: expected both or neither; a tokenizer belongs to its model")
    for name, whole, part in (("vision_hidden", vision_hidden, 32), ("image_size", image_size, patch_size)):
        if part < 1 or whole < part or whole % part:
            raise InputError(f"{name}: expected a multiple of {part}, got {whole}")
    if language_model is None:
        language_model, tokenizer = tiny_llama(seed=seed), tiny_tokenizer()
    processor = _build_processor(tokenizer, image_size, patch_size)
    model = _build_model(language_model, processor, vision_hidden, vision_layers, seed)
    return model, processor


def _build_processor(tokenizer, image_size: int, patch_size: int):
    from transformers import LlavaProcessor

    try:
        # The variant that needs PIL and NumPy only; the class without "Pil" needs torchvision.
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

        image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    except ImportError as error:
        raise InputError("images need the package pillow, which is not installed. Run `pip install pillow`") from error
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    tokenizer.chat_template = CHATML_TEMPLATE
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        chat_template=CHATML_TEMPLATE,
    )


def _build_model(language_model, processor, vision_hidden: int, vision_layers: int, seed: int):
    from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

    size, text = processor.image_processor.size["height"], language_model.config.to_dict()
    text["vocab_size"] = max(text["vocab_size"], processor.image_token_id + 1)
    vision = SiglipVisionConfig(
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=vision_hidden // 32,
        image_size=size,
        patch_size=processor.patch_size,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=(size // processor.patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=language_model.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).to(language_model.dtype).eval()
    _copy_decoder(language_model, model)
    model.generation_config = copy.deepcopy(language_model.generation_config)
    return model


@torch.no_grad()
def _copy_decoder(language_model, model) -> None:
    target = {**model.get_decoder().state_dict(), "lm_head.weight": model.lm_head.weight}
    source = {**language_model.get_decoder().state_dict(), "lm_head.weight": language_model.lm_head.weight}
    for name, weight in source.items():
        rows = len(weight)
        target[name][:rows] = weight
        # Only the embedding and the head have rows of their own for the image token.
        target[name][rows:] = weight.float().mean(0)
