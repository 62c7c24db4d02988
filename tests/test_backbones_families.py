"""Vision-language families with their own processors: prompts, images, teachers, training, both engines, what ends."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import AutoConfig
from transformers.models.smolvlm import processing_smolvlm

import dive_fast
from dive_fast.data import Record, generated_films, load_films
from dive_fast.data.collator import ReportCollator
from dive_fast.data.encoding import ReportEncoder
from dive_fast.errors import InputError
from dive_fast.models.backbone import load_backbone
from dive_fast.models.processors import load_processor
from dive_fast.models.spec import text_config_of
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from tests.tiny_models import randomize_adapters
from tests.tiny_processors import TOKENS, assert_same_inputs, tiny_backbone

FILMS = generated_films(6)
REAL_FILMS = Path(__file__).parents[2] / "shared" / "data" / "cxr_pairs"
ENGINES = ("native", "transformers")
QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "disable_tqdm": True}


@pytest.fixture(scope="module", params=TOKENS)
def backbone(request, tmp_path_factory):
    """A family's model and processor, and the folder they were saved in."""
    with pytest.MonkeyPatch.context() as patch:
        if processing_smolvlm.num2words is None:
            patch.setattr(processing_smolvlm, "num2words", str)  # it words the times in videos, of which there are none
        folder = tmp_path_factory.mktemp(request.param)
        model, processor = tiny_backbone(request.param)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        yield SimpleNamespace(
            family=request.param, folder=folder, model=model, processor=processor, tokens=TOKENS[request.param]
        )


def image_ids(backbone, ids: torch.Tensor) -> torch.Tensor:
    return ids == backbone.processor.tokenizer.convert_tokens_to_ids(backbone.tokens.image)


def greedy(model, inputs, engine, **options):
    return dive_fast.generate(model, inputs, engine=engine, max_new_tokens=10, **options).sequences


def assert_engines_agree(model, inputs, **options):
    rows = [greedy(model, inputs, engine, **options) for engine in ENGINES]
    assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True)), rows
    return rows[0]


def test_prompts_are_the_familys_own(backbone):
    """The family's turns, its BOS once, and the tokens of one image."""
    encoder = ReportEncoder(backbone.processor)
    ids = encoder.prompts([Record("a", "ASK", "", FILMS[0].images)])["input_ids"][0]
    images = image_ids(backbone, ids)
    features = sum(len(row) for row in features_of(backbone, [FILMS[0]]))
    assert images.sum() == features > 1
    # Runs of image tokens once; tiles are written one by one.
    kept = ids[~(images & torch.cat([images.new_zeros(1), images[:-1]]))]
    assert backbone.processor.tokenizer.decode(kept) == backbone.tokens.prompt


@torch.no_grad()
def features_of(backbone, records):
    """What the model makes of the images, in tokens."""
    batch = ReportEncoder(backbone.processor).prompts(records)
    options = {k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw", "image_sizes")}
    if "pixel_attention_mask" in batch:
        options["pixel_attention_mask"] = batch["pixel_attention_mask"]
    return list(backbone.model.model.get_image_features(**options).pooler_output)


def test_saved_it_loads_as_it_was(backbone):
    model, processor = load_backbone(str(backbone.folder), dtype="float32")
    batch, same = (ReportEncoder(p).prompts(FILMS[:2]) for p in (backbone.processor, processor))
    assert_same_inputs(batch, same, backbone.processor, processor)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, backbone.model(**batch).logits)
    assert ReportEncoder(processor).end_token_id == ReportEncoder(backbone.processor).end_token_id


def test_reports_end_with_the_token_of_the_template_and_both_engines_stop_there(backbone):
    model, processor = backbone.model, backbone.processor
    encoder = ReportEncoder(processor)
    end = encoder.response("clear lungs.").ids[-1]
    assert processor.tokenizer.convert_ids_to_tokens(end) == backbone.tokens.end
    batch = ReportCollator(encoder)(FILMS[:2])
    last = [row[row != -100][-1].item() for row in batch["labels"]]
    assert last == [end, end]
    # A head that says the end of a turn at once, whatever the model's own configuration calls EOS.
    with torch.no_grad():
        states = model(**encoder.prompts(FILMS[:1]), output_hidden_states=True).hidden_states[-1][0, -1]
        before = model.lm_head.weight[end].clone()
        model.lm_head.weight[end] = 100 * states / states.norm()
    try:
        for engine in ENGINES:
            out = dive_fast.generate(model, FILMS[:1], processor=processor, engine=engine, max_new_tokens=5)
            assert (out.finish_reasons, out.sequences[0].tolist(), out.texts) == (["eos"], [end], [""])
    finally:
        with torch.no_grad():
            model.lm_head.weight[end] = before


@pytest.mark.parametrize("scope", ["response", "all"])
def test_engines_agree_with_images_steered_and_not(backbone, scope):
    """Films beside text alone, prompts of unequal length, demonstrations with a film each."""
    steered = peft.get_peft_model(backbone.model, dive_fast.DiveConfig(r=4, scope=scope)).eval()
    try:
        randomize_adapters(steered, scale=0.1)
        text = Record("text", "No film is here, only text.", "")
        inputs = [FILMS[0], text, Record("two", "Compare.", "", (*FILMS[1].images, *FILMS[2].images))]
        shots = [(), (FILMS[3],), (FILMS[4], FILMS[5])]
        rows = assert_engines_agree(steered, inputs, processor=backbone.processor, demonstrations=shots)
        names = assert_engines_agree(
            steered, inputs, processor=backbone.processor, demonstrations=shots, adapter_names=["__base__"] * 3
        )
        assert any(not torch.equal(a, b) for a, b in zip(rows, names, strict=True)), "steering changed nothing"
        assert_engines_agree(steered, [text], processor=backbone.processor)
    finally:
        backbone.model = steered.unload()


def test_films_of_real_size_and_shape(backbone):
    """Chest films where their folder is there; else drawn ones, one of them cut to a portrait."""
    if REAL_FILMS.is_dir():
        films = load_films(REAL_FILMS)[:2]
    else:
        square, wide = generated_films(2, size=256)
        films = [square, dataclasses.replace(wide, images=(wide.images[0].crop((0, 0, 180, 256)),))]
    assert_engines_agree(backbone.model, films, processor=backbone.processor)


def test_films_matter(backbone):
    """Another film gives other logits; the same film as a demonstration gives others again."""
    encoder = ReportEncoder(backbone.processor)
    same = Record("same", FILMS[0].prompt, "", FILMS[1].images)
    with torch.no_grad():
        logits = [backbone.model(**encoder.prompts([record])).logits[0, -1] for record in (FILMS[0], same)]
        shots = [
            backbone.model(**encoder.prompts([FILMS[0]], [[Record("d", "P", "R", film.images)]])).logits[0, -1]
            for film in FILMS[1:3]
        ]
    assert (logits[0] - logits[1]).abs().max() > 1e-3 and (shots[0] - shots[1]).abs().max() > 1e-3


def test_a_teacher_with_films_trains_an_adapter_that_loads(backbone, tmp_path, caplog):
    result = dive_fast.train(
        str(backbone.folder),
        FILMS[:4],
        tmp_path / "run",
        steering=dive_fast.DiveConfig(r=4),
        teacher=dive_fast.Teacher(shots=2),
        supervision=dive_fast.Supervision(kl_weight=0.5, align_weight=0.5),
        args=QUICK,
    )
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)
    model = dive_fast.load(str(backbone.folder), result.adapter_dir, dtype="float32")
    moved = [p.abs().max() for name, p in model.named_parameters() if "dive_up" in name]
    assert moved and all(m > 0 for m in moved)
    assert_engines_agree(model, FILMS[4:])
    assert "whose pixels differ" not in caplog.text
    setup = result.adapter_dir / "dive_setup.json"
    noted = json.loads(setup.read_text())
    assert noted["images"] == backbone.processor.image_processor.backend
    setup.write_text(json.dumps(noted | {"images": "another library"}))
    dive_fast.load(str(backbone.folder), result.adapter_dir, dtype="float32")
    assert f"another library resized; here it is {noted['images']}, whose pixels differ" in caplog.text


def test_teachers_see_a_film_per_demonstration(backbone):
    encoder = ReportEncoder(backbone.processor)
    one = encoder.prompts([FILMS[0]])["input_ids"][0]
    three = encoder.prompts([FILMS[0]], [FILMS[1:3]])["input_ids"][0]
    assert image_ids(backbone, three).sum() == 3 * image_ids(backbone, one).sum()


def test_image_tokens_in_a_text_are_refused(backbone):
    token = getattr(backbone.processor, "boi_token", None) or backbone.processor.image_token
    encoder = ReportEncoder(backbone.processor)
    with pytest.raises(InputError, match=r"record 'a': its prompt has 2 image tokens \(.*\) for 1 images"):
        encoder.prompts([Record("a", f"What is {token}?", "", FILMS[0].images)])
    with pytest.raises(InputError, match=r"1 image tokens \(.*\) for 0 images; texts must not contain the token"):
        encoder.prompts([Record("a", "ASK", "")], [[Record("b", "ASK", f"It is {token}.")]])


@pytest.fixture
def spare_template(backbone):
    kept = backbone.processor.chat_template
    yield backbone
    backbone.processor.chat_template = kept


def test_without_a_chat_template_images_stand_in_front(spare_template):
    backbone = spare_template
    backbone.processor.chat_template = None
    encoder = ReportEncoder(backbone.processor)
    assert encoder.end_token_id == backbone.processor.tokenizer.eos_token_id
    token = getattr(backbone.processor, "boi_token", None) or backbone.processor.image_token
    text = encoder.prompt_text(FILMS[0], [Record("d", "P", "R", FILMS[1].images)])
    assert text == f"{token}\nP\nR\n\n{token}\n{FILMS[0].prompt}\n"
    assert_engines_agree(backbone.model, FILMS[:2], processor=backbone.processor)


def test_a_template_without_room_for_images_is_refused(spare_template):
    backbone = spare_template
    backbone.processor.chat_template = "{% for message in messages %}{{ message['role'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"has room for 0 of the 1 images of record 'generated-0-0'"):
        ReportEncoder(backbone.processor).prompts(FILMS[:1])
    backbone.processor.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(InputError, match="its chat template fails on turns of user and assistant .no such role"):
        ReportEncoder(backbone.processor)


def test_a_model_that_reads_text_refuses_films():
    with pytest.raises(InputError, match="record 'generated-0-0' has images, but .* only reads text"):
        dive_fast.generate(tiny_llama(), FILMS[:1], processor=tiny_tokenizer())


def test_folders_that_are_no_backbone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chexpert_net"}')
    with pytest.raises(InputError, match="config.json of a known architecture"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json of a known architecture"):
        load_backbone(str(tmp_path))
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="could not be loaded as llama"):  # no tokenizer
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("backbone", ["smolvlm"], indirect=True)
def test_a_package_that_a_processor_needs_is_named(backbone, monkeypatch):
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    with pytest.raises(InputError, match="processor of .* needs a package .*pip install num2words"):
        load_processor(str(backbone.folder), AutoConfig.from_pretrained(backbone.folder))


def test_the_context_is_the_text_models(backbone):
    assert text_config_of(backbone.model).max_position_embeddings == 1024
    with pytest.raises(InputError, match="its prompt has .* tokens and fills the model's context of 20"):
        ReportEncoder(backbone.processor, context_length=20).prompts(FILMS[:1], [FILMS[1:4]])
