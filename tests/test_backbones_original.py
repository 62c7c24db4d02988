"""LLaVA-Med's and HuatuoGPT-Vision's checkpoints: their weights, prompts and tokens, and what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import dive_fast
from dive_fast.data import Record, generated_films
from dive_fast.data.encoding import ReportEncoder
from dive_fast.errors import InputError
from dive_fast.models.backbone import load_backbone
from tests.original_llava import (
    MISTRAL,
    QWEN,
    VISION,
    sentencepiece_tokenizer,
    write_original,
)
from tests.tiny_processors import assert_same_inputs

FILM = generated_films(1)[0].images[0]
FORMS = ("safetensors", "safetensors-sharded", "bin", "bin-sharded")


def batch_of(model, tokenizer, image_token: int):
    """Ids with the 16 tokens of one image, pixels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, len(tokenizer), (2, 25), generator=generator)
    ids[:, 4:20] = image_token
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(model.dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@torch.no_grad()
def logits_without_a_row(model, batch, image_token: int):
    """The logits of a model that has no row for images: LLaVA's code puts features where the id is -200."""
    inside = model.model
    features = torch.cat(list(inside.get_image_features(batch["pixel_values"]).pooler_output))
    is_image = batch["input_ids"] == image_token
    embedded = inside.get_input_embeddings()(batch["input_ids"].masked_fill(is_image, 0))
    embedded = embedded.masked_scatter(is_image[..., None], features)
    return model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("tower", [True, False], ids=["tower within", "tower apart"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [MISTRAL, QWEN])
def test_a_checkpoint_is_the_model_that_was_written(tmp_path, kind, form, tower):
    expected, tokenizer = write_original(tmp_path, kind, form=form, tower=tower)
    model, processor = load_backbone(str(tmp_path), dtype="float32")
    image = processor.image_token_id
    assert image == len(tokenizer) == model.config.image_token_id
    batch = batch_of(model, tokenizer, image)
    with torch.no_grad():
        logits = model(**batch).logits
    known = logits_without_a_row(expected, batch, image)
    assert torch.equal(logits[..., :image], known)
    # The row for images is the mean of the others, in the embedding and in the head.
    assert logits.shape[-1] == image + 1 == model.config.text_config.vocab_size
    torch.testing.assert_close(logits[..., image], known.mean(-1), rtol=1e-4, atol=1e-5)
    shift = logits.double().logsumexp(-1) - known.double().logsumexp(-1)
    assert 0 < shift.min() and shift.max() <= np.log1p(1 / image)


def test_the_names_are_those_of_the_published_files(tmp_path):
    names = []
    write_original(tmp_path, change=names.extend)
    assert {
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.2.bias",
        "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding",
        "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
        "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.2.self_attn.k_proj.bias",
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight",
    } <= set(names)


def test_spare_rows_of_the_head_make_room_for_the_image_token(tmp_path):
    """HuatuoGPT-Vision's head has 418 rows more than its tokenizer has tokens."""
    expected, tokenizer = write_original(tmp_path, QWEN, spare=5)
    model, processor = load_backbone(str(tmp_path), dtype="float32")
    assert processor.image_token_id == len(tokenizer)
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(model.get_input_embeddings().weight, expected.get_input_embeddings().weight)


def test_a_class_token_is_one_token_more(tmp_path):
    expected, tokenizer = write_original(tmp_path, mm_vision_select_feature="cls_patch", mm_vision_select_layer=-1)
    model, processor = load_backbone(str(tmp_path), dtype="float32")
    batch = ReportEncoder(processor).prompts([Record("a", "What?", "clear.", (FILM,))])
    image = processor.image_token_id
    assert (batch["input_ids"] == image).sum() == 17
    expected.config.vision_feature_layer = -1
    expected.config.vision_feature_select_strategy = "full"
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[..., :image], logits_without_a_row(expected, batch, image))


def test_a_head_stored_beside_the_embedding_it_is_tied_to(tmp_path):
    def same(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    write_original(tmp_path, tie_word_embeddings=True, change=same)
    model, _ = load_backbone(str(tmp_path), dtype="float32")
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_dtypes(tmp_path):
    expected, _ = write_original(tmp_path, dtype=torch.bfloat16)
    for dtype, wanted in ((None, torch.bfloat16), ("float16", torch.float16)):
        model, _ = load_backbone(str(tmp_path), dtype=dtype)
        assert {p.dtype for p in model.parameters()} == {wanted}
        assert torch.equal(model.model.language_model.norm.weight, expected.model.language_model.norm.weight.to(wanted))
        assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_it_saves_as_an_ordinary_llava(tmp_path):
    write_original(tmp_path / "original")
    model, processor = load_backbone(str(tmp_path / "original"), dtype="float32")
    assert model.name_or_path == str(tmp_path / "original")
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    again, other = load_backbone(str(tmp_path / "saved"), dtype="float32")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "llava"
    record = Record("a", "What?", "clear.", (FILM,))
    batch, same = (ReportEncoder(p).prompts([record]) for p in (processor, other))
    assert_same_inputs(batch, same, processor, other)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def original_tokens(tokenizer, prompt: str, image_token: int, count: int, bos: bool):
    """`tokenizer_image_token` of LLaVA's code: the texts between images one by one, BOS in front of the first."""
    ids = [tokenizer.bos_token_id] if bos else []
    for i, chunk in enumerate(prompt.split("<image>")):
        ids += [image_token] * count * (i > 0) + tokenizer(chunk, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("scheme", ["prepend", "first"])
def test_llava_med_prompts_have_the_tokens_of_its_own_code(tmp_path, scheme):
    _, tokenizer = write_original(tmp_path, tokenizer=sentencepiece_tokenizer(scheme))
    _, processor = load_backbone(str(tmp_path))
    encoder = ReportEncoder(processor)
    prompt = encoder.prompts([Record("a", "Describe it.", "", (FILM,))])["input_ids"][0].tolist()
    # conv_templates["mistral_instruct"] of llava/conversation.py
    written = "[INST] <image>\nDescribe it. [/INST]"
    assert prompt == original_tokens(tokenizer, written, processor.image_token_id, 16, bos=True)
    response = encoder.response("clear lungs.").ids
    assert response == [*tokenizer("clear lungs.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    shown = encoder.prompt_text(Record("a", "Q", "", (FILM,)), [Record("b", "P", "R", (FILM,))])
    assert shown.replace("<image> \n", "<image>\n") == "[INST] <image>\nP [/INST] R </s>[INST] <image>\nQ [/INST]"


def test_huatuo_prompts_have_the_tokens_of_its_own_code(tmp_path):
    _, tokenizer = write_original(tmp_path, QWEN)
    _, processor = load_backbone(str(tmp_path))
    encoder = ReportEncoder(processor)
    record, shot = Record("a", "Describe it.", "", (FILM,)), Record("b", "And this?", "clear.", (FILM, FILM))
    # HuatuoChatbot.preprocess_huatuo of cli.py, which tokenizes turn by turn
    written = ("<|user|>\n<image>\n<image>\nAnd this?\n", "<|assistant|>\nclear. \n")
    last = "<|user|>\n<image>\nDescribe it.\n<|assistant|>\n"
    ids = [original_tokens(tokenizer, turn, processor.image_token_id, 16, bos=False) for turn in (*written, last)]
    assert encoder.prompts([record])["input_ids"][0].tolist() == ids[-1]
    assert encoder.prompts([record], [[shot]])["input_ids"][0].tolist() == sum(ids, [])
    assert encoder.response("clear.").ids[-1] == tokenizer.eos_token_id


def test_films_are_padded_to_squares_with_the_mean_colour(tmp_path):
    write_original(tmp_path)
    _, processor = load_backbone(str(tmp_path))
    wide = Image.new("RGB", (64, 32), (10, 20, 30))
    pixels = processor.image_processor(wide, return_tensors="pt")["pixel_values"][0]
    assert pixels.shape == (3, 32, 32)
    # int(255 mean), normalised; the film itself fills the middle half
    mean = torch.tensor(processor.image_processor.image_mean)
    std = torch.tensor(processor.image_processor.image_std)
    rim = ((mean * 255).int() / 255 - mean) / std
    torch.testing.assert_close(pixels[:, 0, 5], rim, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pixels[:, 16, 5], (torch.tensor([10, 20, 30]) / 255 - mean) / std, rtol=1e-4, atol=1e-4)
    (tmp_path / "plain").mkdir()
    write_original(tmp_path / "plain", image_aspect_ratio=None)
    _, plain = load_backbone(str(tmp_path / "plain"))
    assert (plain.image_processor(wide, return_tensors="pt")["pixel_values"][0][:, 0, 5] - rim).abs().max() > 0.1


@pytest.mark.parametrize("setting", ["pad", "square", None])
def test_huatuo_pads_films_whatever_its_settings_say(tmp_path, setting):
    """get_image_tensors of its cli.py: `if True or self.data_args.image_aspect_ratio == 'pad'`."""
    write_original(tmp_path, QWEN, image_aspect_ratio=setting)
    _, processor = load_backbone(str(tmp_path))
    assert processor.image_processor.do_pad


REFUSED = {
    "another weight": (
        {"change": lambda w: w.update({"model.image_newline": torch.zeros(32)})},
        r"unknown: model\.image_newline \(1\)",
    ),
    "a weight missing": (
        {"change": lambda w: w.pop("model.mm_projector.2.bias")},
        r"missing: model\.mm_projector\.2\.bias \(1\)",
    ),
    "a weight of the tower missing": (
        {"change": lambda w: w.pop(VISION + "pre_layrnorm.weight")},
        r"missing: model\.vision_tower\.vision_tower\..*pre_layrnorm\.weight \(1\)",
    ),
    "a weight of another shape": (
        {"change": lambda w: w.update({"model.norm.weight": torch.zeros(31)})},
        r"of another shape: model\.norm\.weight \(1\)",
    ),
    "a projector of another kind": ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'.*'mlp2x_gelu'"),
    "patches merged": ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad'"),
    "image borders": ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
    "another select": (
        {"mm_vision_select_feature": "cls"},
        "mm_vision_select_feature is 'cls'.*'patch' or 'cls_patch'",
    ),
    "another width": ({"mm_hidden_size": 17}, "mm_hidden_size is 17.*16"),
    "a head that is not the embedding": ({"tie_word_embeddings": True}, "lm_head.weight, which is not the embedding"),
    "a width that is no number": ({"hidden_size": "big"}, "could not be loaded as llava_mistral: .*hidden_size"),
    "no tower named": ({"mm_vision_tower": None}, "names no mm_vision_tower"),
    "no such tower": ({"mm_vision_tower": "./vit/other"}, "mm_vision_tower '.*vit/other' was not found"),
}


@pytest.mark.parametrize(("spoiled", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_another_architecture_is_refused(tmp_path, spoiled, message):
    write_original(tmp_path, **spoiled)
    with pytest.raises(InputError, match=message):
        load_backbone(str(tmp_path))


def test_buffers_that_older_versions_stored_are_no_weights(tmp_path):
    def old(weights):
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
        weights[VISION + "embeddings.position_ids"] = torch.arange(17)[None]

    write_original(tmp_path, change=old)
    load_backbone(str(tmp_path))


@pytest.mark.parametrize("form", FORMS)
def test_damaged_files_are_named(tmp_path, form):
    write_original(tmp_path, form=form)
    files = sorted(p for p in tmp_path.iterdir() if p.suffix in (".safetensors", ".bin"))
    whole = files[-1].read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"not weights"):
        files[-1].write_bytes(damage)
        with pytest.raises(InputError, match=rf"{files[-1].name} is damaged, cut short or no file of weights"):
            load_backbone(str(tmp_path))
    files[-1].unlink()
    expected = rf"lacks the shard {files[-1].name}" if form.endswith("-sharded") else "has no weights; expected model"
    with pytest.raises(InputError, match=expected):
        load_backbone(str(tmp_path))


def test_an_index_that_names_nothing_and_a_key_twice(tmp_path):
    write_original(tmp_path, form="safetensors-sharded")
    first = tmp_path / "model-00001-of-00002.safetensors"
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(first.read_bytes())
    with pytest.raises(InputError, match=r"holds \S+ twice, a second time in model-00002-of-00002.safetensors"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(InputError, match="model.safetensors.index.json cannot be read"):
        load_backbone(str(tmp_path))


def test_a_pickle_that_does_more_than_hold_tensors_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    write_original(tmp_path, form="bin")
    torch.save({"model.norm.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="is damaged, cut short or no file of weights"):
        load_backbone(str(tmp_path))
    assert not (tmp_path / "harm").exists()


def test_a_tower_apart_must_be_whole(tmp_path):
    write_original(tmp_path, tower=False)
    (tmp_path / "vit" / "clip" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no vision tower, and mm_vision_tower .* has no weights"):
        load_backbone(str(tmp_path))
    config = json.loads((tmp_path / "vit" / "clip" / "config.json").read_text())
    (tmp_path / "vit" / "clip" / "config.json").write_text(json.dumps(config | {"model_type": "siglip_vision_model"}))
    with pytest.raises(InputError, match="is a siglip_vision_model; expected a CLIP model"):
        load_backbone(str(tmp_path))


def test_a_whole_clip_folder_serves_as_the_tower(tmp_path):
    """openai/clip-vit-large-patch14-336 is text and vision together."""
    from transformers import CLIPConfig, CLIPModel

    expected, tokenizer = write_original(tmp_path, tower=False)
    folder = tmp_path / "vit" / "clip"
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(
        CLIPConfig(text_config=small | {"vocab_size": 9}, vision_config=expected.config.vision_config.to_dict())
    )
    prefix = "vision_model." if any(k.startswith("vision_model.vision_model.") for k in whole.state_dict()) else ""
    state = {f"vision_model.{prefix}{k}": v for k, v in expected.model.vision_tower.state_dict().items()}
    state = {k if k in whole.state_dict() else k.removeprefix("vision_model."): v for k, v in state.items()}
    missing = whole.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys
    whole.save_pretrained(folder)
    model, processor = load_backbone(str(tmp_path), dtype="float32")
    batch = batch_of(model, tokenizer, processor.image_token_id)
    with torch.no_grad():
        logits = model(**batch).logits[..., : processor.image_token_id]
    assert torch.equal(logits, logits_without_a_row(expected, batch, processor.image_token_id))


def own_memory() -> int:
    """Bytes of this process that no file backs."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told apart by /proc/self/status, which Linux has")
@pytest.mark.parametrize("form", ["safetensors-sharded", "bin"])
def test_weights_are_not_in_memory_twice(tmp_path, form):
    """Weights of the stored dtype stay in the mapped file; others are converted one by one."""
    expected, _ = write_original(tmp_path, form=form, spare=300_000)
    size = 2 * expected.lm_head.weight.numel() * 4
    margin = 24 * 2**20
    assert size > 3 * margin
    for dtype, own in (("float32", 0), ("bfloat16", size // 2)):
        before = own_memory()
        model, _ = load_backbone(str(tmp_path), dtype=dtype)
        assert own_memory() - before < own + margin
        del model


@pytest.mark.parametrize("kind", [MISTRAL, QWEN])
def test_it_trains_and_generates_on_both_engines(tmp_path, kind):
    write_original(tmp_path / "base", kind)
    model, processor = load_backbone(str(tmp_path / "base"), dtype="float32")
    films = generated_films(6, size=40)
    result = dive_fast.train(
        model,
        films,
        tmp_path / "run",
        processor=processor,
        steering=dive_fast.DiveConfig(r=4),
        teacher=dive_fast.Teacher(shots=1),
        args={"max_steps": 2, "per_device_train_batch_size": 2, "disable_tqdm": True},
    )
    loaded = dive_fast.load(str(tmp_path / "base"), result.adapter_dir, dtype="float32")
    native, whole = (
        dive_fast.generate(loaded, films[:3], max_new_tokens=8, engine=engine).sequences
        for engine in ("native", "transformers")
    )
    assert all(torch.equal(a, b) for a, b in zip(native, whole, strict=True))
