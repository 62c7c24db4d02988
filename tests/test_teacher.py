"""The teacher, its cache, and training on films."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dive_fast
from dive_fast.data.encoding import ReportEncoder, append_responses
from dive_fast.data.films import generated_films, load_films, split_by_patient
from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.likelihood import report_nll
from dive_fast.models.fingerprint import model_fingerprint
from dive_fast.models.smol_llava import build_smol_llava
from dive_fast.models.tiny import tiny_llama, tiny_tokenizer
from dive_fast.supervision.teacher import TeacherRunner

RECORDS = [Record(f"r{i}", f"Indication: case {i}.", f"finding number {i}.") for i in range(8)]
FILMS = __import__("pathlib").Path(__file__).parents[2] / "shared" / "data" / "cxr_pairs"


def runner(model=None, records=RECORDS, cache=None, tokenizer=None, **teacher):
    settings = dive_fast.Teacher(shots=2, **teacher)
    encoder = ReportEncoder(tokenizer or tiny_tokenizer())
    return TeacherRunner(model or tiny_llama(), encoder, settings.demonstration_pool(records), cache_dir=cache)


def test_a_second_run_reads_the_cache_and_gets_the_same_bits(tmp_path):
    first = runner(cache=tmp_path)
    targets = [first.targets(record) for record in RECORDS]
    assert first.passes == len(RECORDS)
    assert [first.targets(record) for record in RECORDS] and first.passes == len(RECORDS)  # memory
    second = runner(cache=tmp_path)
    for record, target in zip(RECORDS, targets, strict=True):
        again = second.targets(record)
        assert all(map(torch.equal, again.statistics, target.statistics))
    assert second.passes == 0


def test_fixed_demonstrations_are_run_once_and_give_the_same_targets(monkeypatch):
    """A report then costs its own prompt and itself; where a demonstration would leak, the whole prompt."""
    model, lengths = tiny_llama(), []
    model.model.register_forward_pre_hook(
        lambda m, args, kwargs: lengths.append(kwargs["inputs_embeds" if "input_ids" not in kwargs else "input_ids"]),
        with_kwargs=True,
    )
    fixed = runner(model, demos="fixed")
    demonstrations = {record.id for record in fixed.pool.for_record(Record("x", "x", "x"))}
    targets = [fixed.targets(record) for record in RECORDS]
    shared, counts = len(fixed.shared[0]), [tokens.shape[1] for tokens in lengths]
    assert shared > 20 and counts.count(shared) == 1
    own = [n for n in counts if n != shared]
    for record, count in zip(RECORDS, own, strict=True):
        assert count > shared if record.id in demonstrations else count < shared
    monkeypatch.setattr(TeacherRunner, "_shared_prefix", lambda self, batch: (0, None))
    whole = runner(demos="fixed")
    for record, target in zip(RECORDS, targets, strict=True):
        other = whole.targets(record).statistics._asdict()
        for name, figure in target.statistics._asdict().items():
            if name != "top_indices":  # equally probable tokens may change places
                torch.testing.assert_close(figure, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", ["model", "demonstrations", "report", "prompt", "tokenizer"])
def test_a_changed_input_is_never_served_from_the_cache(tmp_path, change):
    runner(cache=tmp_path).targets(RECORDS[0])
    record, options = RECORDS[0], {}
    if change == "model":
        options["model"] = tiny_llama(seed=1)
    elif change == "demonstrations":
        options["records"] = [RECORDS[0], *(Record(r.id, r.prompt, r.report + " again") for r in RECORDS[1:])]
    elif change == "report":
        record = Record("r0", record.prompt, "another finding.")
    elif change == "prompt":
        record = Record("r0", "Indication: none.", record.report)
    else:
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_start|>assistant", "<|im_start|>user")
        options["tokenizer"] = tokenizer
    changed = runner(cache=tmp_path, **options)
    changed.targets(record)
    assert changed.passes == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign"])
def test_a_damaged_entry_is_detected_and_replaced(tmp_path, damage, caplog):
    fresh = runner(cache=tmp_path)
    expected = fresh.targets(RECORDS[0])
    (file,) = tmp_path.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(data[:-5])
    elif damage == "flipped":
        data[-3] ^= 1
        file.write_bytes(data)
    else:
        save_file({"tail_mean_weight": torch.zeros(2, 2), "tail_mass": torch.zeros(2)}, file)
    again = runner(cache=tmp_path)
    found = again.targets(RECORDS[0])
    assert again.passes == 1 and "computed again" in caplog.text
    assert all(map(torch.equal, found.statistics, expected.statistics))
    assert runner(cache=tmp_path).targets(RECORDS[0]) is not None


def test_the_fingerprint_ignores_adapters_and_sees_weights():
    import peft

    model = tiny_llama()
    before = model_fingerprint(model)
    steered = peft.get_peft_model(model, dive_fast.DiveConfig(r=2))
    assert model_fingerprint(steered.get_base_model()) == before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(1e-3)
    assert model_fingerprint(model) != before


def test_a_head_with_a_logit_softcap_is_taught_from_hidden_states():
    model = tiny_llama()
    model.config.final_logit_softcapping = 5.0
    targets = runner(model).targets(RECORDS[0])
    assert targets.statistics is None and targets.final.shape[-1] == model.config.hidden_size


def test_targets_do_not_depend_on_an_active_adapter():
    import peft

    plain = runner().targets(RECORDS[0]).statistics
    model = peft.get_peft_model(tiny_llama(), dive_fast.DiveConfig(kind="fixed", scope="all"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dive_" in name:
                parameter.fill_(1.0)
    steered = runner(model.train()).targets(RECORDS[0]).statistics
    assert torch.equal(plain.tail_mean_weight, steered.tail_mean_weight)
    assert model.training and not model.base_model.model.model.layers[0].steering.disable_adapters


def test_demonstrations_that_do_not_fit_the_context_are_named():
    long = [Record(f"r{i}", "word " * 300, "finding.") for i in range(4)]
    long = [Record(r.id, r.prompt, f"finding {i}.") for i, r in enumerate(long)]
    model = tiny_llama(max_position_embeddings=1000)
    settings = dive_fast.Teacher(shots=3)
    encoder = ReportEncoder(tiny_tokenizer(), context_length=1000)
    with pytest.raises(InputError, match=r"record 'r0'.*fewer demonstrations"):
        TeacherRunner(model, encoder, settings.demonstration_pool(long)).targets(long[0])


@pytest.mark.parametrize(
    "options",
    [
        {"shots": 0},
        {"shots": 1.5},
        {"demos": "best"},
        {"seed": "a"},
        {"cache_dir": 5},
        {"pool": []},
        {"pool": [{"prompt": "p"}]},
        {"pool": 5},
    ],
)
def test_bad_teachers_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        dive_fast.Teacher(**options)


def test_a_teacher_takes_its_pool_in_every_form_of_a_data_set(tmp_path):
    rows = [{"id": record.id, "prompt": record.prompt, "report": record.report} for record in RECORDS]
    file = tmp_path / "pool.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pools = [dive_fast.Teacher(shots=2, pool=pool).demonstration_pool([]) for pool in (RECORDS, rows, file)]
    assert len({pool.fingerprint for pool in pools}) == 1


def test_padding_with_eos_keeps_the_eos_label():
    encoder = ReportEncoder(tiny_tokenizer(pad_token="<|im_end|>"))
    prompts = encoder.prompts(RECORDS[:2] + [Record("x", "Indication: a much longer one, of several words.", "y")])
    responses = [encoder.response(text).ids for text in ("short.", "a longer finding. and more.", "y")]
    batch = append_responses(prompts, responses, encoder.pad_token_id)
    for row, ids in enumerate(responses):
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == ids
        assert ids[-1] == encoder.tokenizer.eos_token_id
        start = int((batch["labels"][row] != -100).nonzero()[0])
        assert batch["input_ids"][row, start : start + len(ids)].tolist() == ids
        assert int(batch["attention_mask"][row].sum()) == start + len(ids)


def test_perplexity_equals_a_plain_forward_whatever_the_batch():
    model, encoder = tiny_llama(), ReportEncoder(tiny_tokenizer())
    sums, counts = report_nll(model, RECORDS, encoder, batch_size=3)
    for record, value, count in zip(RECORDS, sums, counts, strict=True):
        ids = encoder.response(record.report).ids
        prompt = encoder.prompts([record])["input_ids"][0]
        logits = model(input_ids=torch.cat([prompt, torch.tensor(ids)])[None]).logits[0].double()
        expected = -torch.log_softmax(logits[len(prompt) - 1 : -1], -1)[range(len(ids)), ids].sum()
        assert count == len(ids) and value == pytest.approx(expected.item(), rel=1e-5)


def film_records():
    """Real films where they lie beside the checkout, drawn ones elsewhere."""
    if FILMS.is_dir():
        train, held_out = split_by_patient(load_films(FILMS), 0.2)
        return train[:16], held_out[:4]
    films = generated_films(20, seed=0)
    return films[:16], films[16:]


def test_training_and_generation_run_on_films(tmp_path):
    records, held_out = film_records()
    model, processor = build_smol_llava()
    result = dive_fast.train(
        model,
        records,
        tmp_path,
        processor=processor,
        eval_dataset=held_out,
        steering=dive_fast.DiveConfig(r=4),
        teacher=dive_fast.Teacher(shots=2, cache_dir=str(tmp_path / "cache")),
        args={"max_steps": 12, "per_device_train_batch_size": 4, "logging_steps": 1, "disable_tqdm": True},
    )
    losses = [h["loss"] for h in result.history if "loss" in h]
    assert sum(losses[-4:]) < sum(losses[:4])
    out = dive_fast.generate(result.model, held_out, processor=processor, max_new_tokens=8)
    assert len(out.texts) == len(held_out)


def test_the_film_reaches_the_loss():
    """The same words with another film have another likelihood: the pixels are not lost on the way."""
    model, processor = build_smol_llava()
    encoder = ReportEncoder(processor)
    film, other = generated_films(2, seed=3)
    swapped = Record(film.id, film.prompt, film.report, other.images)
    assert report_nll(model, [film], encoder)[0] != report_nll(model, [swapped], encoder)[0]


def test_a_film_that_does_not_decode_is_named(tmp_path):
    broken = tmp_path / "film.png"
    broken.write_bytes(b"\x89PNG not really")
    model, processor = build_smol_llava()
    records = [*generated_films(3), Record("torn", "Describe the film.", "clear.", (broken,))]
    with pytest.raises(InputError, match="torn"):
        dive_fast.train(model, records, tmp_path / "run", processor=processor, args={"max_steps": 2})


def test_a_cache_that_cannot_be_written_names_cache_dir_and_stays_valid(tmp_path, monkeypatch):
    from dive_fast.supervision import cache as module

    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cache_dir: .*file cannot be used as a folder"):
        module.TensorCache(tmp_path / "file")
    cache = module.TensorCache(tmp_path / "c")
    cache.store("aa1", {"x": torch.ones(3)})
    real = module.save_file

    def full(tensors, path, metadata):
        real(tensors, path, metadata)
        path.write_bytes(path.read_bytes()[:20])
        raise module.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(InputError, match="cache_dir: .*No space left.*free disk space"):
        cache.store("aa2", {"x": torch.ones(3)})
    assert [path.name for path in (tmp_path / "c").rglob("*") if path.is_file()] == ["aa1.safetensors"]
    assert torch.equal(cache.load("aa1")["x"], torch.ones(3)) and cache.load("aa2") is None


def test_memory_bytes_below_zero_are_refused():
    with pytest.raises(InputError, match="memory_bytes: expected a whole number >= 0, got -1"):
        dive_fast.Teacher(memory_bytes=-1)
