"""Training with prompts that carry no gradient equals training on whole rows, in every family."""

import gc

import peft
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dive_fast import DiveConfig
from dive_fast.data.collator import _split
from dive_fast.data.encoding import append_responses
from dive_fast.data.record import Record
from dive_fast.likelihood import batch_states
from dive_fast.models.recomputation import checkpoint_selectively
from dive_fast.prompt_store import PromptStore
from tests.tiny_models import (
    FAMILIES,
    IMAGE_LENGTH,
    IMAGE_TOKEN,
    VISION_FAMILIES,
    image_inputs,
    randomize_adapters,
    tiny_model,
)

RECORDS = [Record(f"r{i}", "prompt", "report") for i in range(3)]


def left_padded_prompts(family, images, lengths=(9, 14, 11), seed=1):
    """Prompts of `lengths` tokens, with an image behind the second token if asked for."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        text = torch.randint(3, 60, (length,), generator=generator)
        if images:
            text[1] = 61  # where Qwen marks the start of an image
            text[2 : 2 + IMAGE_LENGTH] = IMAGE_TOKEN
        ids[row, -length:], mask[row, -length:] = text, 1
    prompts = {"input_ids": ids, "attention_mask": mask}
    return prompts | (image_inputs(family, ids) if images else {})


def batches(prompts, dtype):
    """The whole and the split form of one batch."""
    prompts = {k: v.to(dtype) if v.is_floating_point() else v for k, v in prompts.items()}
    responses = [[5, 9, 2], [7, 2], [11, 12, 13, 14, 15, 2]]
    whole = append_responses(prompts, responses, 0)
    whole["targets"] = torch.nn.functional.pad(whole["labels"][:, 1:], (0, 1), value=-100)
    split = _split(prompts, responses, 0)
    for batch in (whole, split):
        batch["predictors"] = (batch["targets"] != -100).flatten().nonzero().squeeze(1)
        batch["records"] = RECORDS
    assert torch.equal(*(b["targets"].flatten()[b["predictors"]] for b in (whole, split)))
    return whole, split


def states_and_gradients(model, batch, layers=False, **options):
    """What predicts the targets, and the adapter's gradients of a fixed function of it."""
    model.zero_grad()
    states = batch_states(model, batch, layers=layers, **options)
    picked = [x.flatten(0, 1)[batch["predictors"]] for x in (states.final, *states.layers)]
    weights = torch.linspace(-1, 1, picked[0].numel(), dtype=picked[0].dtype).view_as(picked[0])
    sum((x * weights).sum() for x in picked).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in picked], gradients


def steered(family, dtype=torch.float64, **config):
    model = peft.get_peft_model(tiny_model(family, dtype), DiveConfig(r=4, **config))
    return randomize_adapters(model.to(dtype))


def assert_equal(ours, theirs, rtol=1e-8, atol=1e-9):
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    for name in theirs[1]:
        torch.testing.assert_close(ours[1][name], theirs[1][name], rtol=rtol, atol=atol, msg=name)


CASES = [(family, images) for family in FAMILIES for images in (False, True) if not images or family in VISION_FAMILIES]


@pytest.mark.parametrize(("family", "images"), CASES)
def test_split_rows_have_the_states_and_gradients_of_whole_rows(family, images):
    model = steered(family)
    whole, split = batches(left_padded_prompts(family, images), torch.float64)
    expected = states_and_gradients(model, whole, layers=True)
    store = PromptStore(2**20)
    for _ in range(2):  # the second time from the store
        assert_equal(states_and_gradients(model, split, layers=True, store=store), expected)
    assert store.passes == 1 and len(store.kept) == 3


@pytest.mark.parametrize(
    "config", [{"kind": "heads"}, {"site": "attention"}, {"kind": "fixed"}, {"kind": "reft"}], ids=str
)
def test_every_kind_and_site(config):
    model = steered("llama", **config)
    whole, split = batches(left_padded_prompts("llama", False), torch.float64)
    # The share of attention that `heads` scales by is a float32 softmax whatever the model's dtype.
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if config.get("kind") == "heads" else {}
    assert_equal(states_and_gradients(model, split), states_and_gradients(model, whole), **tolerance)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2_5_vl"])
def test_under_activation_checkpointing(family):
    model = steered(family)
    whole, split = batches(left_padded_prompts(family, family in VISION_FAMILIES), torch.float64)
    expected = states_and_gradients(model, whole)
    model.train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(states_and_gradients(model, split), expected)
    assert_equal(states_and_gradients(model, whole), expected)


def test_what_checkpointing_keeps():
    """Less from none to selective to full, in bfloat16, where norms keep float32 copies; and the same gradients."""
    kept, results = {}, {}
    switches = {
        "none": lambda model: None,
        "selective": checkpoint_selectively,
        "full": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    }
    for how, switch in switches.items():
        model = steered("llama", torch.bfloat16).train()
        switch(model.get_base_model())
        prompts = left_padded_prompts("llama", False)
        gc.collect()
        with LiveBytes() as live:
            states = batch_states(model, batches(prompts, torch.bfloat16)[0])
            kept[how] = live.now()
        del states
        model = steered("llama").train()
        switch(model.get_base_model())
        results[how] = states_and_gradients(model, batches(prompts, torch.float64)[1])
    assert kept["full"] < 0.6 * kept["selective"] < 0.6 * 0.95 * kept["none"], kept
    assert_equal(results["selective"], results["none"])
    assert_equal(results["full"], results["none"])


def test_another_prompt_in_between_changes_nothing():
    """Qwen-VL keeps the last prompt's image offsets in the model; another pass must not leak into this one."""
    model = steered("qwen2_5_vl")
    _, split = batches(left_padded_prompts("qwen2_5_vl", True), torch.float64)
    _, other = batches(left_padded_prompts("qwen2_5_vl", True, lengths=(17, 8, 9), seed=7), torch.float64)
    store = PromptStore(2**20)
    expected = states_and_gradients(model, split, store=store)
    states_and_gradients(model, other)
    assert_equal(states_and_gradients(model, split, store=store), expected)


def test_the_store_keeps_within_its_budget_and_other_mixtures_of_prompts():
    model = steered("llama")
    prompts = left_padded_prompts("llama", False)
    whole, split = batches(prompts, torch.float64)
    expected = states_and_gradients(model, whole)
    token = 2 * 3 * 2 * 8 * 8  # keys and values, layers, heads, head size, bytes
    store = PromptStore(token * (8 + 13))  # the first two prompts, without their last tokens
    for _ in range(2):
        assert_equal(states_and_gradients(model, split, store=store), expected)
    assert set(store.kept) == {"r0", "r1"} and store.memory_left == 0 and store.passes == 2
    # Two kept prompts of a later batch, in another order and with other padding.
    pair = {k: v[:2].flip(0) for k, v in split.items() if k not in ("prompts", "predictors", "records")}
    pair |= {"prompts": {k: v[:2].flip(0) for k, v in split["prompts"].items()}, "records": RECORDS[1::-1]}
    pair["predictors"] = (pair["targets"] != -100).flatten().nonzero().squeeze(1)
    kept = states_and_gradients(model, pair, store=store)
    assert store.passes == 2
    assert_equal(kept, states_and_gradients(model, pair))


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made under it that are still alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return out

    def now(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


class SavedBytes:
    """Bytes that autograd keeps for the backward pass."""

    def __enter__(self):
        self.total = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda x: x)
        self.hooks.__enter__()
        return self

    def pack(self, tensor):
        self.total += tensor.numel() * tensor.element_size()
        return tensor

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


def test_what_the_backward_pass_keeps_does_not_grow_with_the_prompt():
    """But for attention itself, which needs the keys and values it looked at."""
    model = steered("llama")
    kept = {}
    for length in (20, 80):
        whole, split = batches(left_padded_prompts("llama", False, lengths=(length,) * 3), torch.float64)
        for name, batch in (("whole", whole), ("split", split)):
            with SavedBytes() as saved:
                batch_states(model, batch)
            kept[name, length] = saved.total
    config = model.get_base_model().config
    layers, head_dim = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    # Per layer: keys and values of all query heads, and the mask.
    attention = 60 * 3 * layers * (2 * config.num_attention_heads * head_dim * 8 + 7 * 8)
    assert kept["split", 80] - kept["split", 20] <= 2 * attention
    assert kept["whole", 80] - kept["whole", 20] > 5 * attention
