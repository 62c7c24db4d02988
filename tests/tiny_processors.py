"""Tiny vision-language models with their real processors: invented vocabularies, the families' own turns and tokens."""

from dataclasses import dataclass

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3Processor,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen3VLConfig,
    Qwen3VLProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from dive_fast.models.processors import without_videos
from dive_fast.models.tiny import tiny_tokenizer


@dataclass(frozen=True)
class Tokens:
    """A family's special tokens and how it writes turns.

    Attributes:
        end: the token that ends an assistant's turn.
        image: what a prompt's text has for one image.
        prompt: of one image and the text "ASK", with the image as `image`.
    """

    template: str
    end: str
    image: str
    prompt: str
    eos: str
    bos: str | None = None
    named: tuple[tuple[str, str], ...] = ()
    others: tuple[str, ...] = ()


def _turns(before: str, image: str, after: str, cue: str, start: str = "") -> str:
    """A template whose turns are `before`, images, text, `after`."""
    return (
        start + "{% for message in messages %}" + before + "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + image + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
        + after + "{% endfor %}{% if add_generation_prompt %}" + cue + "{% endif %}"
    )  # fmt: skip


def _by_role(user: str, assistant: str) -> str:
    return "{% if message['role'] == 'user' %}" + user + "{% else %}" + assistant + "{% endif %}"


_CHATML = ("<|im_start|>{{ message['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
_QWEN = Tokens(
    _turns(_CHATML[0], _QWEN_IMAGE, *_CHATML[1:]),
    end="<|im_end|>",
    image="<|image_pad|>",
    prompt=f"<|im_start|>user\n{_QWEN_IMAGE}ASK<|im_end|>\n<|im_start|>assistant\n",
    eos="<|im_end|>",
    others=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
)
_UTTERANCES = Tokens(
    _turns(
        "{{ message['role'] | capitalize }}:{% if message['content'][0]['type'] != 'image' %} {% endif %}",
        "<image>",
        "<end_of_utterance>\n",
        "Assistant:",
        start="<|im_start|>",
    ),
    end="<end_of_utterance>",
    image="<image>",
    prompt="<|im_start|>User:<fake_token_around_image><global-img><image><fake_token_around_image>ASK"
    "<end_of_utterance>\nAssistant:",
    eos="<|endoftext|>",
    bos="<|im_start|>",
    others=("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
    + tuple(f"<row_{i}_col_{j}>" for i in (1, 2, 3, 4) for j in (1, 2, 3, 4)),
)
TOKENS = {
    "llava": Tokens(  # Vicuna's turns: no BOS, which the processor adds, and nothing ends an answer but the EOS
        _turns(_by_role("USER: ", "ASSISTANT: "), "<image>\n", " ", "ASSISTANT:"),
        end="</s>",
        image="<image>",
        prompt="<s>USER: <image>\nASK ASSISTANT:",
        eos="</s>",
        bos="<s>",
        others=("<image>",),
    ),
    "llava_next": Tokens(  # Mistral's
        _turns(_by_role("[INST] ", " "), "<image>\n", _by_role(" [/INST]", "</s>"), ""),
        end="</s>",
        image="<image>",
        prompt="<s>[INST] <image>\nASK [/INST]",
        eos="</s>",
        bos="<s>",
        others=("<image>",),
    ),
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": _QWEN,
    "gemma3": Tokens(
        _turns(
            "<start_of_turn>" + _by_role("user", "model") + "{{ '\n' }}",  # Jinja drops a line's end behind a block
            "<start_of_image>",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
            start="{{ bos_token }}",
        ),
        end="<end_of_turn>",
        image="<image_soft_token>",
        prompt="<bos><start_of_turn>user\n\n\n<start_of_image><image_soft_token><end_of_image>\n\nASK<end_of_turn>\n"
        "<start_of_turn>model\n",
        eos="<eos>",
        bos="<bos>",
        named=(
            ("boi_token", "<start_of_image>"),
            ("eoi_token", "<end_of_image>"),
            ("image_token", "<image_soft_token>"),
        ),
        others=("<start_of_turn>", "<end_of_turn>"),
    ),
    "idefics3": _UTTERANCES,
    "smolvlm": _UTTERANCES,
    "internvl": Tokens(
        _turns(_CHATML[0], "<IMG_CONTEXT>\n", *_CHATML[1:]),
        end="<|im_end|>",
        image="<IMG_CONTEXT>",
        prompt="<|im_start|>user\n<img><IMG_CONTEXT></img>\nASK<|im_end|>\n<|im_start|>assistant\n",
        eos="<|im_end|>",
        named=(
            ("context_image_token", "<IMG_CONTEXT>"),
            ("start_image_token", "<img>"),
            ("end_image_token", "</img>"),
            ("video_token", "<video>"),
        ),
    ),
}
IMAGE_SIZE = 32
_SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def tokenizer_of(tokens: Tokens):
    """A fast tokenizer with the family's special tokens; one with a BOS writes it in front, as Llama's does."""
    backend = tiny_tokenizer().backend_tokenizer
    options = {"bos_token": tokens.bos} if tokens.bos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=tokens.eos,
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(tokens.named),
        **options,
    )
    tokenizer.add_tokens(list(tokens.others), special_tokens=True)
    if tokens.bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{tokens.bos} $A", special_tokens=[(tokens.bos, tokenizer.bos_token_id)]
        )
    return tokenizer


def processor_of(family: str):
    """The family's processor, without what reads videos."""
    tokenizer, square = tokenizer_of(TOKENS[family]), {"size": _SQUARE}
    clip = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": _SQUARE}
    pixels = {"size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32}, "patch_size": 8, "merge_size": 2}
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": IMAGE_SIZE}, "do_image_splitting": False}
    llava = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    pinpoints = [[32, 64], [64, 32], [64, 64]]
    build = {
        "llava": lambda **o: LlavaProcessor(CLIPImageProcessorPil(**clip), tokenizer, **llava, **o),
        "llava_next": lambda **o: LlavaNextProcessor(
            LlavaNextImageProcessorPil(**clip, image_grid_pinpoints=pinpoints), tokenizer, **llava, **o
        ),
        "qwen2_5_vl": lambda **o: without_videos(Qwen2_5_VLProcessor)(
            Qwen2VLImageProcessorPil(**pixels), tokenizer, **o
        ),
        "qwen3_vl": lambda **o: without_videos(Qwen3VLProcessor)(Qwen2VLImageProcessorPil(**pixels), tokenizer, **o),
        "gemma3": lambda **o: Gemma3Processor(Gemma3ImageProcessorPil(**square), tokenizer, image_seq_length=4, **o),
        "idefics3": lambda **o: Idefics3Processor(Idefics3ImageProcessorPil(**tiles), tokenizer, image_seq_len=4, **o),
        "smolvlm": lambda **o: without_videos(SmolVLMProcessor)(
            SmolVLMImageProcessorPil(**tiles), tokenizer, None, image_seq_len=4, **o
        ),
        "internvl": lambda **o: without_videos(InternVLProcessor)(
            GotOcr2ImageProcessorPil(**square), tokenizer, image_seq_length=4, **o
        ),
    }[family]
    return build(chat_template=TOKENS[family].template)


def text_sizes(tokenizer, **more) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    } | more


def vision_sizes(**more) -> dict:
    return {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    } | more


def config_of(family: str, tokenizer):
    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    sizes, image = text_sizes(tokenizer), token(TOKENS[family].image)
    llava = {"vision_config": CLIPVisionConfig(**vision_sizes()), "image_token_index": image}
    mrope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    qwen_vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    qwen_vision |= {"patch_size": 8}
    qwen = {"image_token_id": image, "video_token_id": token("<|video_pad|>")}
    qwen["vision_start_token_id"] = token("<|vision_start|>")
    utterances = {"vision_config": vision_sizes(), "scale_factor": 2, "image_token_id": image, "pad_token_id": 0}
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return {
        "llava": lambda: LlavaConfig(text_config=LlamaConfig(**sizes), **llava),
        "llava_next": lambda: LlavaNextConfig(
            text_config=MistralConfig(**sizes), image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]], **llava
        ),
        "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
            text_config=sizes | {"rope_parameters": mrope},
            vision_config=qwen_vision | {"fullatt_block_indexes": [1], "window_size": 16},
            **qwen,
        ),
        "qwen3_vl": lambda: Qwen3VLConfig(
            text_config=sizes | {"rope_parameters": mrope, "head_dim": 8},
            vision_config=qwen_vision | {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16},
            **qwen,
        ),
        "gemma3": lambda: Gemma3Config(
            text_config=Gemma3TextConfig(**sizes, head_dim=8, sliding_window=6, layer_types=layers),
            vision_config=SiglipVisionConfig(**vision_sizes()),
            mm_tokens_per_image=4,
            image_token_index=image,
            boi_token_index=token("<start_of_image>"),
            eoi_token_index=token("<end_of_image>"),
            tie_word_embeddings=False,
        ),
        "idefics3": lambda: Idefics3Config(text_config=LlamaConfig(**sizes), **utterances),
        "smolvlm": lambda: SmolVLMConfig(text_config=LlamaConfig(**sizes), **utterances),
        "internvl": lambda: InternVLConfig(
            text_config=Qwen2Config(**sizes),
            vision_config=vision_sizes(),
            image_token_id=image,
            tie_word_embeddings=False,
        ),
    }[family]()


def randomize(model, seed: int = 0, std: float = 0.15):
    """Weights wide enough that positions, layers and images matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


def tiny_backbone(family: str):
    """(random model in eval mode, its processor)."""
    processor = processor_of(family)
    model = randomize(AutoModelForImageTextToText.from_config(config_of(family, processor.tokenizer)))
    model.generation_config.eos_token_id = None
    return model, processor


def assert_same_inputs(batch, other, processor, other_processor) -> None:
    """Two processors read the same; where torchvision is installed a loaded one resizes by it, to other pixels."""
    resized_alike = type(processor.image_processor) is type(other_processor.image_processor)
    assert batch.keys() == other.keys()
    for key in batch.keys() if resized_alike else batch.keys() - {"pixel_values"}:
        assert torch.equal(batch[key], other[key]), key
