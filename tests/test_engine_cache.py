"""The engine's cache in blocks: it grows with the sequence, is shared until written, and its memory comes back."""

import pytest
import torch

from dive_fast import native
from dive_fast.decode.native import NativeDecoder, Sampling
from tests.engine_checks import REQUEST, close, decode, step_logits, whole_logits
from tests.tiny_models import text_batch, tiny_model

BLOCK = native.load().cpu.decode.CACHE_BLOCK


def long_batch(rows=2, length=3 * BLOCK + 9):
    return text_batch(rows, length, left_padding=(0, BLOCK + 3))


def run(session):
    session.run(on_token=None, cancelled=None, until_free=0)


def test_blocks_are_taken_as_the_sequence_grows_and_given_back():
    decoder = NativeDecoder(tiny_model("llama"))
    session = decoder.session(1)
    held = []
    decoder.submit(session, text_batch(1), None, [REQUEST | {"max_new_tokens": 3 * BLOCK}])
    session.run(on_token=lambda i, t: held.append(session.cache_blocks["held"]), cancelled=None, until_free=0)
    before = text_batch()["input_ids"].shape[1] - 1
    # The last token is told when its row is gone.
    assert held == [*((before + step) // BLOCK + 1 for step in range(3 * BLOCK - 1)), 0]
    assert session.cache_blocks["held"] == 0
    run_again = [REQUEST | {"max_new_tokens": 2 * BLOCK}]
    decoder.submit(session, text_batch(1), None, run_again)
    run(session)
    assert session.cache_blocks["made"] == max(held)


def test_a_block_holds_all_layers_of_its_positions_and_no_more():
    decoder = NativeDecoder(tiny_model("llama"))
    values = decoder.plan.values
    positions = len(values["layers"]) * 2 * values["kv_heads"] * values["head_size"] * 4
    assert decoder.session(1).cache_blocks == {"bytes": BLOCK * positions, "held": 0, "made": 0}


def test_samples_share_the_prompt_until_they_write():
    decoder, batch = NativeDecoder(tiny_model("llama")), long_batch(1)
    session = decoder.session(5)
    decoder.submit(session, batch, None, [REQUEST | {"max_new_tokens": 3, "streams": list(range(5))}])
    whole, partial = divmod(batch["input_ids"].shape[1] - 1, BLOCK)
    assert partial and session.cache_blocks["held"] == whole + 1
    run(session)
    assert session.cache_blocks["made"] == whole + 5


@pytest.mark.parametrize("length", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2, 2 * BLOCK + 1])
def test_prompts_that_end_on_and_beside_the_border_of_a_block(length):
    model = tiny_model("llama")
    batch = text_batch(1, length)
    forced = torch.randint(3, 60, (1, 2 * BLOCK), generator=torch.Generator().manual_seed(3))
    model.config.max_position_embeddings = 512
    close(step_logits(model, batch, forced), whole_logits(model, batch, forced))


def test_a_sliding_window_crosses_blocks():
    model = tiny_model("mistral")
    forced = torch.randint(3, 60, (2, BLOCK), generator=torch.Generator().manual_seed(4))
    for window in (6, BLOCK - 1, BLOCK, BLOCK + 7):
        model.config.sliding_window = window
        close(step_logits(model, long_batch(), forced), whole_logits(model, long_batch(), forced))


def test_samples_from_one_prefill_equal_those_of_requests_of_their_own():
    model, batch = tiny_model("llama"), long_batch(1)
    options = {"sampling": Sampling(temperature=1.0, seed=4), "max_rows": 3}
    together = NativeDecoder(model).run(
        [(batch, [0], None)], eos=[5], min_new_tokens=0, max_new_tokens=40, samples=6, **options
    )
    alone = decode(model, {k: v.expand(6, -1) for k, v in batch.items()}, 40, eos=[5], **options)
    assert [together[i].tokens for i in range(6)] == alone
    assert len({tuple(tokens) for tokens in alone}) == 6
