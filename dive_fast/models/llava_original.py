"""Checkpoints of LLaVA's own code that transformers' auto classes do not know, as `LlavaForConditionalGeneration`.

Liu et al., "Improved Baselines with Visual Instruction Tuning" (CVPR 2024) is the code base (haotian-liu/LLaVA); Li et
al., "LLaVA-Med" (NeurIPS 2023), version 1.5, and Chen et al., "HuatuoGPT-Vision" (EMNLP 2024) trained in it. Their
folders hold the language model's weights under its own names, `model.mm_projector.{0,2}` and, where the vision tower
was trained too, `model.vision_tower.vision_tower.*`. Prompts, padding and tokens are those of microsoft/LLaVA-Med
(llava/conversation.py "mistral_instruct", llava/mm_utils.py) and FreedomIntelligence/HuatuoGPT-Vision (cli.py).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
)
from transformers.utils import logging

from dive_fast.errors import InputError
from dive_fast.models.weight_files import read_weights

IMAGE_TOKEN = "<image>"


# What a message says: its parts in their order, `image` for each image; or a plain text.
_SAID = (
    "{% set said %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ image }}{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% endif %}{% endset %}"
)


@dataclass(frozen=True)
class Original:
    """A model type of LLaVA's code.

    Attributes:
        text: the language model's configuration class.
        user, assistant: its turns in Jinja, with what is `said`.
        cue: behind the last turn, for an answer.
        pads: whether its code pads every image to a square; else `image_aspect_ratio` in config.json says so.
    """

    text: type
    user: str
    assistant: str
    cue: str = ""
    pads: bool = False

    def template(self, image: str) -> str:
        """The chat template; `image` stands for an image. A BOS is the tokenizer's to write, as in LLaVA's code."""
        turn = f"{{% if message['role'] == 'user' %}}{self.user}{{% else %}}{self.assistant}{{% endif %}}"
        messages = f"{{% for message in messages %}}{_SAID}{turn}{{% endfor %}}"
        cue = f"{{% if add_generation_prompt %}}{self.cue}{{% endif %}}"
        return f"{{% set image = {image!r} %}}{messages}{cue}"


ORIGINALS: dict[str, Original] = {
    "llava_mistral": Original(MistralConfig, "[INST] {{ said }} [/INST]", " {{ said }} {{ eos_token }}"),
    "llava_qwen2": Original(
        Qwen2Config,
        "{{ '<|user|>\\n' + said + '\\n' }}",
        "{{ '<|assistant|>\\n' + said + ' \\n' }}",
        cue="{{ '<|assistant|>\\n' }}",
        pads=True,
    ),
}
"""`model_type` of a checkpoint's config.json -> what to make of it."""

_RENAMED = {
    "model.vision_tower.vision_tower.": "model.vision_tower.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "lm_head.": "lm_head.",
}
# Computed from the configuration; versions of transformers before 4.32 stored them.
_NO_WEIGHTS = (".rotary_emb.inv_freq", ".embeddings.position_ids")
_SELECTED = {"patch": "default", "cls_patch": "full"}


def load_llava_original(name: str, raw: dict, dtype: torch.dtype | str = "auto"):
    """(LlavaForConditionalGeneration, its LlavaProcessor) from a checkpoint whose config.json is `raw`.

    Weights are read where they lie, shard by shard, and each is used exactly once. "<image>" becomes a token of the
    tokenizer. Where the embedding and the head have no spare row for it, both gain one, the mean of the others; every
    other row stays as it was. A mean logit is never above the largest, so the token is never the greedy choice, and
    log-probabilities of the others move by log(1 + 1/V) at most.

    Args:
        name: a folder or a hub id.
        raw: the content of its config.json.
        dtype: of the weights; "auto": as stored.

    Raises:
        InputError: a setting of `raw` that transformers' LLaVA does not have, a vision tower that is not found, a
            weight that is missing, of another shape or of no known name, a shard that is missing or damaged.
    """
    original = ORIGINALS[raw["model_type"]]
    tower, subfolder = _tower_source(name, raw)
    vision = _vision_config(tower, subfolder)
    text = _text_config(original, raw)
    config = _llava_config(raw, text, vision)
    tokenizer = AutoTokenizer.from_pretrained(name, config=text)
    tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    config.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model = _load_weights(name, config, dtype, tower, subfolder)
    _make_room(model, config.image_token_id + 1)
    model.name_or_path = model.config._name_or_path = name
    return model, _processor(original, raw, config, tokenizer, tower, subfolder)


def _tower_source(name: str, raw: dict) -> tuple[str, str]:
    """(folder or hub id, subfolder) of the vision tower."""
    tower = raw.get("mm_vision_tower") or raw.get("vision_tower")
    if not isinstance(tower, str):
        raise InputError(f"model: {name!r} names no mm_vision_tower in its config.json; is it a language model only?")
    for folder in (Path(name) / tower, Path(tower)):
        if (folder / "config.json").is_file():
            return str(folder), ""
    # A path that belongs to the checkpoint: of a hub id, a folder in its repository.
    return (name, tower.removeprefix("./")) if tower.startswith(".") else (tower, "")


def _vision_config(tower: str, subfolder: str):
    where = f"{tower}/{subfolder}".rstrip("/")
    try:
        raw, _ = CLIPVisionConfig.get_config_dict(tower, subfolder=subfolder)
        if not raw:
            raise OSError("there is no config.json")
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: mm_vision_tower {where!r} was not found ({str(error).splitlines()[0]}); put its config.json and "
            "preprocessor_config.json into a folder, and that folder's path into config.json as mm_vision_tower"
        ) from error
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        raise InputError(f"model: mm_vision_tower {where!r} is a {raw.get('model_type')}; expected a CLIP model")
    return CLIPVisionConfig.from_dict(raw.get("vision_config", raw))


def _text_config(original: Original, raw: dict):
    known = {field.name for field in dataclasses.fields(original.text)} | {"rope_theta", "rope_scaling"}
    known -= {"architectures", "transformers_version"}
    return original.text(**{key: value for key, value in raw.items() if key in known})


def _llava_config(raw: dict, text, vision) -> LlavaConfig:
    expected = {"mm_projector_type": ("mlp2x_gelu",), "mm_vision_select_feature": tuple(_SELECTED)}
    expected |= {"mm_hidden_size": (vision.hidden_size,), "mm_use_im_start_end": (False,)}
    expected |= {"mm_patch_merge_type": ("flat",), "mm_vision_select_layer": tuple(range(-vision.num_hidden_layers, 0))}
    # What LLaVA's code takes where a setting is left out or null.
    given = {key: value for key, value in raw.items() if value is not None}
    raw = {"mm_vision_select_feature": "patch", "mm_vision_select_layer": -2} | given
    for key, values in expected.items():
        if raw.get(key, values[0]) not in values:
            raise InputError(
                f"model: {key} is {raw[key]!r} in config.json, expected {' or '.join(map(repr, values))}; this "
                "checkpoint is not the architecture of transformers' LLaVA"
            )
    select = _SELECTED[raw["mm_vision_select_feature"]]
    patches = (vision.image_size // vision.patch_size) ** 2
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        vision_feature_layer=raw["mm_vision_select_layer"],
        vision_feature_select_strategy=select,
        image_seq_length=patches + (select == "full"),
        projector_hidden_act="gelu",
        tie_word_embeddings=text.tie_word_embeddings,
        dtype=raw.get("dtype") or raw.get("torch_dtype"),
    )


def _load_weights(name: str, config, dtype, tower: str, subfolder: str):
    weights, unknown, has_tower = {}, [], False
    for key, tensor in read_weights(name):
        before = next((prefix for prefix in _RENAMED if key.startswith(prefix)), None)
        has_tower |= before == "model.vision_tower.vision_tower."
        if key.endswith(_NO_WEIGHTS):
            continue
        if before is None:
            unknown.append(key)
        else:
            weights[_RENAMED[before] + key.removeprefix(before)] = tensor
    if config.tie_word_embeddings and "lm_head.weight" in weights:
        head = weights.pop("lm_head.weight")
        if not torch.equal(head, weights.get("model.language_model.embed_tokens.weight", head)):
            unknown.append("lm_head.weight, which is not the embedding that tie_word_embeddings makes it")
    if not has_tower:
        own = _tower_weights(tower, subfolder)
        weights |= {f"model.vision_tower.{key}": tensor for key, tensor in own.items()}
    shown = logging.get_verbosity()
    logging.set_verbosity_error()  # what is missing or left over is an error below, under its own name
    try:
        model, info = LlavaForConditionalGeneration.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        logging.set_verbosity(shown)
    problems = {
        "unknown": [*unknown, *map(_original_name, info["unexpected_keys"])],
        "missing": [_original_name(key) for key in info["missing_keys"]],
        "of another shape": [_original_name(entry[0]) for entry in info["mismatched_keys"]],
    }
    found = [f"{kind}: {', '.join(sorted(keys)[:3])} ({len(keys)})" for kind, keys in problems.items() if keys]
    if found:
        raise InputError(
            f"model: the weights of {name!r} are not those that its config.json tells of; {'; '.join(found)}"
        )
    return model


def _original_name(key: str) -> str:
    after = next((prefix for prefix in _RENAMED.values() if key.startswith(prefix)), "")
    before = next((before for before, prefix in _RENAMED.items() if prefix == after), "")
    return before + key.removeprefix(after)


def _tower_weights(tower: str, subfolder: str) -> dict[str, torch.Tensor]:
    try:
        model, info = CLIPVisionModel.from_pretrained(tower, subfolder=subfolder, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: the checkpoint holds no vision tower, and mm_vision_tower {tower!r} has no weights "
            f"({str(error).splitlines()[0]}); put them into its folder"
        ) from error
    if info["missing_keys"]:
        raise InputError(
            f"model: mm_vision_tower {tower!r} lacks weights of a CLIP vision model, the first is "
            f"{sorted(info['missing_keys'])[0]}; copy it again"
        )
    return model.state_dict()


@torch.no_grad()
def _make_room(model, rows: int) -> None:
    """At least `rows` rows in the embedding and the head; new ones are the mean of the old ones."""
    before = model.get_input_embeddings().weight.shape[0]
    if before >= rows:
        return
    model.resize_token_embeddings(rows, mean_resizing=False)
    for weight in {id(w): w for w in (model.get_input_embeddings().weight, model.lm_head.weight)}.values():
        weight[before:] = weight[:before].float().mean(0)


def _processor(original: Original, raw: dict, config, tokenizer, tower: str, subfolder: str) -> LlavaProcessor:
    try:
        # The variant that needs PIL and NumPy only; the class without "Pil" needs torchvision.
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    except ImportError as error:
        raise InputError("images need the package pillow, which is not installed. Run `pip install pillow`") from error
    pad = original.pads or raw.get("image_aspect_ratio") == "pad"
    try:
        images = LlavaImageProcessorPil.from_pretrained(tower, subfolder=subfolder, do_pad=pad)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model: mm_vision_tower {tower!r} has no preprocessor_config.json ({str(error).splitlines()[0]}); put it "
            "beside its config.json"
        ) from error
    template = original.template(_image_text(tokenizer))
    # Where templates are kept when a processor is saved.
    tokenizer.chat_template = template
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _image_text(tokenizer) -> str:
    """An image and the line's end behind it, so that the tokens are those of LLaVA's code.

    It tokenizes the texts between images one by one, so that SentencePiece puts a space in front of each; some
    tokenizers do so behind every special token, others at the beginning of a text only.
    """
    alone = tokenizer("\nA", add_special_tokens=False)["input_ids"]
    for text in (f"{IMAGE_TOKEN}\n", f"{IMAGE_TOKEN} \n"):
        if tokenizer(text + "A", add_special_tokens=False)["input_ids"][1:] == alone:
            return text
    return f"{IMAGE_TOKEN}\n"
