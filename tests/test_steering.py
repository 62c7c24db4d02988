"""The steering tuner on every family, kind, site and scope."""

import copy

import peft
import pytest
import torch
from transformers import StaticCache

from dive_fast import ops
from dive_fast.errors import InputError
from dive_fast.models.cache_argument import cache_among, cache_argument
from dive_fast.models.spec import decoder_of
from dive_fast.steering import KINDS, DiveConfig, response_positions_from_labels
from dive_fast.steering.heads import demonstration_share
from tests.tiny_models import FAMILIES, VOCAB, randomize_adapters, text_batch, tiny_model

SCOPES = ("response", "prompt", "all")
KIND_SITES = [
    (kind, site) for kind in KINDS for site in ("block", "attention") if not (kind == "heads" and site != "block")
]


def steered(family="llama", kind="lowrank", dtype=torch.float32, random=True, **options):
    model = peft.get_peft_model(tiny_model(family, dtype), DiveConfig(kind=kind, r=4, **options)).eval()
    return randomize_adapters(model) if random else model


def step_logits(model, batch, steps=6, **options):
    """Tokens and logits [B, steps, V] of greedy decoding."""
    out = model.generate(
        **batch, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True, **options
    )
    return out.sequences[:, -steps:], torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_steering_inside_the_layer_equals_a_hook_around_the_layers_own_forward(family, monkeypatch):
    """One forward for every described family, against each family's own."""
    batch, found = text_batch(), []
    for described in (True, False):
        if not described:
            monkeypatch.setattr("dive_fast.steering.model.spec_of", lambda model: None)
        model = steered(family, dtype=torch.float64, scope="all").to(torch.float64)
        logits = model(**batch).logits[batch["attention_mask"].bool()]
        (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((logits.detach(), gradients, type(decoder_of(model.get_base_model()).layers[0])))
    (inside, inside_gradients, inside_class), (around, around_gradients, own_class) = found
    assert issubclass(inside_class, own_class) and inside_class is not own_class
    assert inside_class.__name__ == own_class.__name__
    torch.testing.assert_close(inside, around, rtol=1e-10, atol=1e-11)
    assert inside_gradients.keys() == around_gradients.keys() and inside_gradients
    for name, gradient in around_gradients.items():
        torch.testing.assert_close(inside_gradients[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_unloading_gives_the_layers_their_class_back():
    base = tiny_model("llama")
    before = type(base.model.layers[0])
    model = steered("llama", site="attention")
    assert isinstance(decoder_of(model.get_base_model()).layers[0], before)
    assert all(type(layer) is before for layer in decoder_of(model.unload()).layers)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lowrank", "reft", "gated"])
@pytest.mark.parametrize("site", ["block", "attention"])
def test_fresh_adapter_is_an_exact_no_op(family, kind, site):
    base, batch = tiny_model(family), text_batch()
    expected = base(**batch).logits
    model = peft.get_peft_model(base, DiveConfig(kind=kind, r=4, site=site, scope="all")).eval()
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_disabled_adapter_is_bit_equal_to_the_base_and_enabled_is_not(family, kind):
    batch = text_batch()
    expected = tiny_model(family)(**batch).logits
    model = steered(family, kind, scope="all")
    assert not torch.allclose(model(**batch).logits, expected, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.unload()(**batch).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind, site", KIND_SITES)
def test_cached_decoding_equals_recomputing_the_sequence_at_every_step(family, scope, kind, site):
    model, batch = steered(family, kind, site=site, scope=scope), text_batch()
    tokens, logits = step_logits(model, batch)
    again, uncached = step_logits(model, batch, use_cache=False)
    assert torch.equal(tokens, again)
    torch.testing.assert_close(logits, uncached, atol=2e-5, rtol=1e-4)
    with model.disable_adapter():
        _, base_logits = step_logits(model, batch)
    assert not torch.allclose(logits[:, -1], base_logits[:, -1], atol=1e-3), "the adapter stopped acting"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("kind, site", [("lowrank", "block"), ("lowrank", "attention"), ("heads", "block")])
def test_teacher_forcing_equals_cached_decoding(family, scope, kind, site):
    """Training sees prompt + response at once, right-padded; decoding sees them token by token, left-padded."""
    model, batch = steered(family, kind, site=site, scope=scope), text_batch()
    tokens, logits = step_logits(model, batch)
    for row in range(3):
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        ids = torch.cat([prompt, tokens[row], torch.zeros(3, dtype=torch.long)])[None]
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        labels = torch.full_like(ids, -100)
        labels[:, len(prompt) : len(prompt) + 6] = tokens[row]
        forced = model(input_ids=ids, attention_mask=mask, labels=labels).logits
        torch.testing.assert_close(
            forced[0, len(prompt) - 1 : len(prompt) + 5], logits[row], atol=2e-5, rtol=1e-4, msg=f"row {row}"
        )


def test_cached_loop_written_by_hand_equals_generate():
    model, batch = steered("llama"), text_batch()
    tokens, logits = step_logits(model, batch, steps=4)
    mask, cache, ids = batch["attention_mask"], None, batch["input_ids"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    for step in range(4):
        past = {} if cache is None else cache_argument(model.get_base_model(), cache)
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions, **past, use_cache=True)
        torch.testing.assert_close(out.logits[:, -1], logits[:, step], atol=2e-5, rtol=1e-4)
        cache, ids = cache_among(out.values()), tokens[:, step : step + 1]
        mask = torch.cat([mask, torch.ones(3, 1, dtype=mask.dtype)], dim=1)
        positions = positions[:, -1:] + 1


@pytest.mark.parametrize(("columns", "words"), [(-1, "expected {0} columns"), (1, "no transformers Cache is among")])
def test_a_mask_that_does_not_fit_cache_and_tokens_is_refused(columns, words):
    model, batch = steered("llama"), text_batch()
    length = batch["input_ids"].shape[1]
    mask = torch.ones(3, length + columns, dtype=torch.long)
    with pytest.raises(InputError, match=f"attention_mask: .*{words.format(length)}"):
        model(input_ids=batch["input_ids"], attention_mask=mask)


def test_a_mask_may_be_as_wide_as_a_static_cache():
    model, batch = steered("llama"), text_batch()
    base, (rows, length) = model.get_base_model(), batch["input_ids"].shape
    wide = torch.cat([batch["attention_mask"], batch["attention_mask"].new_zeros(rows, 4)], dim=1)
    past = cache_argument(base, StaticCache(base.config, length + 4))
    logits = model(input_ids=batch["input_ids"], attention_mask=wide, **past).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], model(**batch).logits[real], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_response_scope_leaves_the_prompt_cache_to_the_base_model(kind):
    model, batch = steered("llama", kind), text_batch()
    cache = cache_among(model(**batch, use_cache=True).values())
    with model.disable_adapter():
        base = cache_among(model(**batch, use_cache=True).values())
    for ours, theirs in zip(cache.layers, base.layers, strict=True):
        assert torch.equal(ours.keys[:, :, :-1], theirs.keys[:, :, :-1])
    if kind != "heads":  # the last prompt token is steered, and from the second layer on its keys show it
        assert not torch.allclose(cache.layers[-1].keys[:, :, -1], base.layers[-1].keys[:, :, -1])


@pytest.mark.parametrize("site", ["block", "attention"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_residual_stream_is_steered_by_the_formula(family, site):
    """One steered layer: what comes out equals the formula applied to what the unsteered layer computes."""
    model = steered(family, site=site, scope="all", layers_to_transform=[1])
    base, batch = model.get_base_model(), text_batch(rows=1, left_padding=(0,))
    layer = decoder_of(base).layers[1]
    seen = {}
    name = "mlp" if family == "llama" else "pre_feedforward_layernorm"
    norm = layer.post_attention_layernorm if family == "llama" else layer.pre_feedforward_layernorm
    handles = [
        norm.register_forward_pre_hook(lambda m, a: seen.__setitem__("attention", a[0])),
        layer.register_forward_hook(lambda m, a, o: seen.__setitem__("block", o)),
    ]
    steered_states = model(**batch) and dict(seen)
    with model.disable_adapter():
        plain = model(**batch) and dict(seen)
    for handle in handles:
        handle.remove()
    adapter = layer.steering
    expected = ops.steer(
        plain[site],
        down=adapter.dive_down["default"],
        up=adapter.dive_up["default"],
        bias=adapter.dive_bias["default"],
        static=adapter.dive_static["default"],
        norm_eps=adapter.norm_eps,
    )
    torch.testing.assert_close(steered_states[site], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_captured_hidden_states_are_the_steered_ones():
    base, batch = tiny_model("llama"), text_batch()
    base(**batch, output_hidden_states=True)  # installs transformers' own capturing hooks before ours
    model = randomize_adapters(peft.get_peft_model(base, DiveConfig(scope="all")).eval())
    states = model(**batch, output_hidden_states=True).hidden_states
    with model.disable_adapter():
        plain = model(**batch, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], plain[0])
    assert not torch.allclose(states[1], plain[1])


@pytest.mark.parametrize("kind", KINDS)
def test_save_load_and_reload_give_the_same_model(kind, tmp_path):
    model, batch = steered("qwen2", kind, scope="all"), text_batch()
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = peft.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.peft_config["default"].to_dict() | {"inference_mode": False} == model.peft_config["default"].to_dict()
    assert not any(p.requires_grad for p in loaded.parameters())


def test_several_adapters_set_delete_and_mix(tmp_path):
    batch = text_batch()
    model = steered("llama", scope="all")
    first = model(**batch).logits
    model.add_adapter("second", DiveConfig(kind="gated", layers_to_transform=[0, 2], scope="response"))
    randomize_adapters(model, seed=7)
    model.set_adapter("second")
    second = model(**batch).logits
    assert not torch.allclose(first, second, atol=1e-3)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "second" / "adapter_model.safetensors").exists()
    model.delete_adapter("default")
    assert torch.equal(model(**batch).logits, second)
    model.load_adapter(tmp_path, "again")
    model.set_adapter("again")
    assert model.active_adapters == ["again"]
    with pytest.raises(ValueError, match="missing"):
        model.set_adapter("missing")


@pytest.mark.parametrize("site_kind", [("block", "lowrank"), ("attention", "lowrank"), ("block", "heads")])
def test_adapter_names_steer_each_row_by_its_own_adapter(site_kind):
    site, kind = site_kind
    batch = text_batch()
    model = steered("llama", kind, site=site, scope="all")
    model.add_adapter("other", DiveConfig(kind="fixed", scope="response"))
    randomize_adapters(model, seed=5)
    alone = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        alone[name] = step_logits(model, batch)
    with model.disable_adapter():
        alone["__base__"] = step_logits(model, batch)
    names = ["other", "__base__", "default"]
    mixed_tokens, mixed = step_logits(model, batch, adapter_names=names)
    for row, name in enumerate(names):
        assert torch.equal(mixed_tokens[row], alone[name][0][row])
        torch.testing.assert_close(mixed[row], alone[name][1][row], atol=1e-5, rtol=1e-5)
    beams = model.generate(**batch, adapter_names=names, num_beams=3, do_sample=False, max_new_tokens=3)
    with model.disable_adapter():
        base_beams = model.generate(**batch, num_beams=3, do_sample=False, max_new_tokens=3)
    assert torch.equal(beams[1], base_beams[1])
    with pytest.raises(InputError, match="nobody"):
        model(**batch, adapter_names=["nobody", "default", "default"])
    with pytest.raises(InputError, match="one name per row"):
        model(**batch, adapter_names=["default", "default"])
    with pytest.raises(InputError, match="eval"):
        model.train()(**batch, adapter_names=names)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "llava"])
def test_gradients_reach_every_parameter_and_survive_checkpointing(family, kind):
    batch = text_batch()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :5] = -100

    def gradients(checkpointing):
        model = steered(family, kind).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        loss = model(**batch, labels=labels).loss
        with torch.no_grad():  # another pass in between must not change what the recomputation sees
            model(input_ids=batch["input_ids"][:1, 4:])
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain and all(g is not None and g.abs().sum() > 0 for g in plain.values())
    assert all("dive_" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_half_precision_backbones_keep_their_dtype_and_float32_adapters(dtype, kind, family):
    model, batch = steered(family, kind, dtype), text_batch()
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "dive_" in n)
    out = model.train()(**batch, labels=batch["input_ids"])
    assert out.logits.dtype == dtype and torch.isfinite(out.loss)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_padding_is_never_steered():
    model, batch = steered("llama", scope="all"), text_batch()
    call = {}
    hook = (
        decoder_of(model.get_base_model())
        .layers[0]
        .register_forward_pre_hook(lambda m, a, k: call.update(k), with_kwargs=True)
    )
    model(**batch)
    hook.remove()
    assert torch.equal(call["dive_steering"].masks["all"], batch["attention_mask"].bool())


def test_response_positions_predict_the_labelled_tokens():
    labels = torch.tensor([[-100, -100, 5, 6, -100], [-100, 7, 8, 9, 2]])
    expected = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    assert torch.equal(response_positions_from_labels(labels), expected)


@pytest.mark.parametrize("masked", ["none", "bool", "float"])
def test_demonstration_share_is_causal_and_padding_masked(masked):
    torch.manual_seed(0)
    rows, heads, kv_heads, length, dim = 2, 4, 2, 5, 8
    query, key = torch.randn(rows, heads, length, dim), torch.randn(rows, kv_heads, length, dim)
    w, b = torch.randn(heads, dim), torch.randn(heads)
    allowed = torch.ones(length, length).tril().bool().expand(rows, 1, length, length).clone()
    mask = None
    if masked != "none":
        allowed[1, :, :, :2] = False
        allowed[1, :, :2, :2] = torch.eye(2).bool()  # a padded query attends to something, or nothing is defined
        mask = allowed if masked == "bool" else torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo().min)
    share = demonstration_share(query, key, mask, 0.3, w, b)
    for row in range(rows):
        for head in range(heads):
            for t in range(length):
                q = query[row, head, t].double()
                keys = key[row, head // 2].double()[allowed[row, 0, t]]
                z1 = torch.exp(q @ w[head].double() + b[head].double())
                z2 = torch.exp(0.3 * keys @ q).sum()
                torch.testing.assert_close(share[row, t, head].double(), z1 / (z1 + z2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_heads_agree_between_attention_implementations_and_refuse_the_rest(implementation):
    model, batch = steered("llama", "heads", scope="all"), text_batch()
    expected = model(**batch).logits
    model.get_base_model().set_attn_implementation(implementation)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], expected[real], atol=1e-5, rtol=1e-4)
    model.get_base_model().config._attn_implementation_internal = "flex_attention"
    with pytest.raises(InputError, match="set_attn_implementation"):
        model(input_ids=batch["input_ids"][:1])


def test_heads_reproduce_attention_over_demonstrations():
    """MimIC's identity: attention over [demonstrations; own context] = own + mu * (demonstrations - own)."""
    torch.manual_seed(0)
    q = torch.randn(6, dtype=torch.float64)
    keys, values, demo_keys, demo_values = (torch.randn(n, 6, dtype=torch.float64) for n in (5, 5, 3, 3))
    own, demo = torch.softmax(keys @ q, 0) @ values, torch.softmax(demo_keys @ q, 0) @ demo_values
    whole = torch.softmax(torch.cat([demo_keys, keys]) @ q, 0) @ torch.cat([demo_values, values])
    w = torch.zeros(1, 6)
    b = torch.logsumexp(demo_keys @ q, 0)[None].float()
    mask = torch.ones(1, 1, 1, 5).bool()
    mu = demonstration_share(q[None, None, None].float(), keys[None, None].float(), mask, 1.0, w, b)[0, 0, 0]
    torch.testing.assert_close(own + mu.double() * (demo - own), whole, atol=1e-6, rtol=1e-5)


def test_reft_basis_is_orthonormal_after_training_steps():
    model, batch = steered("llama", "reft", random=False).train(), text_batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        basis = decoder_of(model.get_base_model()).layers[0].steering._basis("default")
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), atol=1e-5, rtol=0)
    before = model(**batch).logits
    with torch.no_grad():  # a new value of the parameter must not meet the basis kept from the old one
        for name, parameter in model.named_parameters():
            if "dive_basis" in name:
                parameter.add_(torch.randn_like(parameter))
    assert not torch.allclose(model(**batch).logits, before)


def test_deepcopy_steers_by_its_own_parameters():
    model, batch = steered("llama", scope="all"), text_batch()
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    randomize_adapters(model, seed=11)
    assert torch.equal(twin(**batch).logits, expected)


def test_sampled_sequences_follow_the_prompt_when_returned_several_times():
    model, batch = steered("llama", scope="prompt"), text_batch()
    out = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert out.shape == (6, 12)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "loraa"}, "kind: expected one of lowrank"),
        ({"kind": ["reft"]}, r"kind: expected one of lowrank.*, got \['reft'\]"),
        ({"normalize_input": "no"}, "normalize_input: expected True, False or None, got 'no'"),
        ({"preserve_norm": 1}, "preserve_norm: expected True, False or None, got 1"),
        ({"r": 0}, "r: kind='lowrank' needs a rank"),
        ({"r": 2.5}, "r: expected a whole number"),
        ({"kind": "reft", "r": -1}, "r: kind='reft'"),
        ({"site": "mlp"}, "site: expected one of block, attention"),
        ({"scope": "answer"}, "scope: expected one of"),
        ({"activation": "swish"}, "activation: expected one of"),
        ({"kind": "reft", "activation": "silu"}, "activation: kind='reft' has none"),
        ({"kind": "heads", "site": "attention"}, "site: kind='heads'"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"layers_to_transform": []}, "layers_to_transform"),
        ({"layers_to_transform": [1, 1]}, "twice"),
    ],
)
def test_bad_configurations_name_the_argument(options, message):
    with pytest.raises(InputError, match=message):
        DiveConfig(**options)


def test_layers_out_of_range_and_foreign_adapters_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"layers_to_transform: 3 is out of range, the model has layers 0\.\.2"):
        peft.get_peft_model(tiny_model("llama"), DiveConfig(layers_to_transform=[0, 3]))
    steered("llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="base_model_type=llama, this one has qwen2"):
        peft.PeftModel.from_pretrained(tiny_model("qwen2"), tmp_path)
    with pytest.raises(InputError, match="cannot be merged"):
        steered("llama").merge_and_unload()


def test_a_language_model_alone_and_inside_a_vision_model_take_the_same_kinds():
    model = steered("llava", layers_to_transform=2)
    layers = decoder_of(model.get_base_model()).layers
    assert [hasattr(layer, "steering") for layer in layers] == [False, False, True]
    assert model(**text_batch()).logits.shape[-1] == VOCAB
