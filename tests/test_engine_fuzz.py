"""Mutated plans and requests: a clean error, or a run that ends with tokens of the vocabulary; never a crash.

A crash would take pytest with it, so every property runs in a process of its own, which writes each example down before
it tries it. Mutations never leave a plan consistent while it points beyond its tensors: addresses only become null or
misaligned, strides smaller, prompts shorter.
"""

import copy
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dive_fast
from dive_fast.decode.native import _REQUEST, NativeDecoder
from dive_fast.errors import InputError
from tests.tiny_models import randomize_adapters, tiny_model

CLEAN = (TypeError, ValueError, KeyError, OverflowError, MemoryError, InputError)
EXAMPLES = {"plans": 400, "requests": 400}
PROMPT = 3

_HUGE = [2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), -(2**70)]
_ODD = [None, "text", b"", [], {}, (), True, 1.5, float("nan"), float("inf"), -float("inf"), 1e300, -1e-300]


class Fixture:
    """A steered model's plan, and a prompt's cache beside it."""

    def __init__(self):
        model = peft.get_peft_model(tiny_model("llama"), dive_fast.DiveConfig(r=4, kind="gated", site="attention"))
        model.add_adapter("second", dive_fast.DiveConfig(r=1, site="block"))
        model.base_model.set_adapter(["default", "second"])
        self.decoder = NativeDecoder(randomize_adapters(model.eval()))
        self.engine, self.values = self.decoder.extension.engine, self.decoder.plan.values
        self.states = torch.randn(2, self.values["kv_heads"], PROMPT, self.values["head_size"])
        self.logits = torch.zeros(8, self.values["vocabulary"])
        keys, values = self.states
        strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
        self.request = _REQUEST | {
            "prompt": [5, 6, 7, 8],
            "prefilled": PROMPT,
            "rope_offset": 0,
            "adapters": [0, 1],
            "temperature": 0.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": 0,
            "eos": [2],
            "min_new_tokens": 0,
            "max_new_tokens": 4,
            "log_probs": True,
            "layers": [(keys.data_ptr(), values.data_ptr(), *strides)] * len(self.values["layers"]),
        }

    def run(self, values: dict, request: dict) -> None:
        plan = self.engine.Plan(values, self.decoder.plan.kept)
        session = self.engine.Session(plan=plan, max_rows=4, threads=2, isa="portable", device=None)
        session.submit(**request)
        # Whatever length was asked for, it is not waited for.
        session.run(on_token=None, cancelled=lambda: True, until_free=0)
        for number in range(len(request["streams"])):
            tokens, _, finish = session.take(number)
            assert finish in ("eos", "length", "cancelled", "stop"), finish
            assert all(0 <= token < self.values["vocabulary"] for token in tokens), tokens


def _numbers_near(value) -> list:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [0, 1, -1, value - 1, value + 1, 2 * value]
    return [0.0, -1.0, value * 1e30] if isinstance(value, float) else []


def _paths(value, path=()) -> list[tuple]:
    """Where the values of a plan are, leaves and what holds them."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [path] + [p for key, item in items for p in _paths(item, (*path, key))]


def _at(value, path):
    for key in path:
        value = value[key]
    return value


def _with(value, path, new):
    """`value` with what lies at `path` replaced, or taken out where `new` is `...`."""
    if not path:
        return new
    changed = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is ...:
        del changed[path[0]]
    else:
        changed[path[0]] = _with(value[path[0]], path[1:], new)
    return tuple(changed) if isinstance(value, tuple) else changed


def _replacements(values: dict, path: tuple) -> list:
    value, holder = _at(values, path), _at(values, path[:-1]) if path else None
    if isinstance(value, int) and not isinstance(value, bool):
        # (address, dtype, rows, columns, row stride, bias, scales) of matrices, (address, eps) of norms
        if isinstance(holder, tuple) and (path[-1] in (0, 5, 6) if len(holder) == 7 else path[-1] == 0):
            return [0, value + 1 if value else 0, *_ODD]
        if isinstance(holder, tuple) and len(holder) == 7 and path[-1] == 4:
            return [0, -1, value - 1, 2**62, *_ODD]
        if path[-1] in ("static", "gate_direction"):
            return [0, value + 1 if value else 0, *_ODD]
    return [..., *_numbers_near(value), *_HUGE, *_ODD]


def _mutated_plans(values: dict):
    paths = _paths(values)[1:]
    matrices = [p for p in paths if isinstance(_at(values, p), tuple) and len(_at(values, p)) == 7]

    @st.composite
    def mutate(draw):
        changes, mutated = [], values
        for _ in range(draw(st.integers(1, 2))):
            if draw(st.integers(0, 4)) == 0:
                a, b = draw(st.sampled_from(matrices)), draw(st.sampled_from(matrices))
                made = [(a, _at(values, b)), (b, _at(values, a))]
            else:
                path = draw(st.sampled_from(paths))
                made = [(path, draw(st.sampled_from(_replacements(values, path))))]
            changes += made
            for path, new in made:
                try:
                    mutated = _with(mutated, path, new)
                except (KeyError, IndexError, TypeError):  # an earlier change took its place away
                    pass
        return changes, mutated

    return mutate()


def _mutated_requests(fixture: Fixture):
    base = fixture.request
    address = fixture.logits.data_ptr()
    layer = base["layers"][0]
    tokens = st.lists(st.sampled_from([0, 1, 5, 63, 64, -1, 2**31, 2**63]), max_size=8)
    ours = {
        "prompt": tokens | st.sampled_from(_ODD),
        "prefilled": st.sampled_from([0, 1, 2, PROMPT, -1, 2**40, 2**62, 2**63, *_ODD]),
        "streams": st.lists(st.sampled_from([0, 1, 2**64 - 1, 2**64, -1]), max_size=6) | st.sampled_from(_ODD),
        "beams": st.sampled_from([0, 1, 2, 4, 5, -1, 2**31 - 1, 2**31, *_ODD]),
        "stop": st.sampled_from([None, "text", [], 0, b"x"]),
        "eos": tokens | st.sampled_from(_ODD),
        "forced": tokens | st.sampled_from(_ODD),
        "forced_logits": st.sampled_from([0, address, address + 1, -1, 2**64, None, "text"]),
        "adapters": st.lists(st.sampled_from([0, 1, 2, -1, 2**31, 2**63]), max_size=4) | st.sampled_from(_ODD),
        "layers": st.sampled_from(
            [[], None, [layer], [layer] * 4, [layer[:5]] * 3, [(0, *layer[1:])] * 3, [(layer[0] + 1, *layer[1:])] * 3]
            + [
                [(*layer[:i], stride, *layer[i + 1 :])] * 3
                for i in range(2, 6)
                for stride in (0, -1, 2**62, 2**64, 1.5)
            ]
        ),
    }
    numbers = st.floats(width=64) | st.sampled_from([0, 1, -1, 2, *_HUGE, *_ODD])
    strategies = {name: ours.get(name, numbers) for name in base}
    return st.lists(st.sampled_from(sorted(base)), min_size=1, max_size=3, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: strategies[name] for name in names})
    )


def fuzz(what: str, log: Path) -> None:
    """One property, in this process."""
    fixture = Fixture()
    fixture.run(fixture.values, fixture.request)
    ran = 0

    def attempt(example, values, request):
        nonlocal ran
        log.write_text(repr(example))
        try:
            fixture.run(values, request)
            ran += 1
        except CLEAN:
            pass

    if what == "plans":
        given_examples = given(_mutated_plans(copy.deepcopy(fixture.values)))

        def body(example):
            attempt(example[0], example[1], fixture.request)
    else:
        given_examples = given(_mutated_requests(fixture))

        def body(example):
            attempt(example, fixture.values, fixture.request | example)

    settings(
        max_examples=EXAMPLES[what], derandomize=True, database=None, deadline=None, suppress_health_check=HealthCheck
    )(given_examples(body))()
    print(f"{ran} ran")


@pytest.mark.parametrize("what", EXAMPLES)
def test_mutations_are_refused_or_run(what, tmp_path):
    log = tmp_path / "example"
    code = f"from pathlib import Path; from tests.test_engine_fuzz import fuzz; fuzz({what!r}, Path({str(log)!r}))"
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=200,
    )
    last = log.read_text() if log.exists() else "none"
    assert done.returncode == 0, f"ended with {done.returncode} at {last}\n{done.stdout}\n{done.stderr[-6000:]}"
    # Mutations that are all refused, or that are all harmless, would show nothing.
    ran = int(done.stdout.split()[-2])
    assert 0.02 < ran / EXAMPLES[what] < 0.9, done.stdout
