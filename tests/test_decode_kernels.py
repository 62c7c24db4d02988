"""The parts of a decoding step (csrc/cpu/decode.h) against float64, at every level this machine can run.

B batch rows, K columns and N rows of a weight matrix, H heads, G key/value heads, E head size, S cached positions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dive_fast import native

CPU = native.load().cpu
DECODE = CPU.decode
LEVELS = CPU.kernel_levels()
BEST = LEVELS[-1]
CACHE_BLOCK = DECODE.CACHE_BLOCK
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of csrc/cpu/dtype.h
KINDS = (*DTYPES, torch.int8)
INT8_ROWS, INT8_COLUMNS = DECODE.INT8_LINE
ACTIVATIONS = (F.silu, lambda x: F.gelu(x, approximate="tanh"), F.gelu)  # in that of GatedActivation
# The same without the cancellation of 1 + tanh(u) and 1 + erf(u) for negative u, where not even float64 is exact.
TRUE_ACTIVATIONS = (
    F.silu,
    lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)),
    lambda x: 0.5 * x * torch.erfc(-x * math.sqrt(0.5)),
)
# N and K around the widths of vectors, of tiles and of blocks of rows.
SHAPES = [(1, 1), (3, 7), (16, 16), (17, 33), (5, 576), (67, 65), (130, 96)]
# A sum of K products of float32 errs by about eps * sqrt(K) of its largest terms; this is for K <= 2048.
TOLERANCE = 3e-6

pytestmark = pytest.mark.usefixtures("poisoned_empty")
each_level = pytest.mark.parametrize("level", LEVELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda dtype: str(dtype)[6:])


class Matrix:
    """A weight [N, K] of a kind, with a row stride beyond K and NaN in the gap, and what it stands for in float64."""

    def __init__(self, rows, columns, kind=torch.float32, bias=False, gap=0):
        source = torch.randn(rows, columns)
        self.bias = torch.randn(rows) if bias else None
        self.scales = None
        if kind == torch.int8:
            self.data, self.scales = quantized(source)
            self.true = in_rows(self.data, source.shape).double() * self.scales.double()[:, None]
        else:
            held = torch.full((rows, columns + gap), math.nan, dtype=kind)
            held[:, :columns] = source
            self.data = held[:, :columns]
            self.true = self.data.double()

    @property
    def rows(self):
        return self.true.shape[0]

    @property
    def tuple(self):
        return weight_tuple(self.data, self.true.shape, self.scales, self.bias)

    def times(self, x):
        return x.double() @ self.true.T + (0 if self.bias is None else self.bias.double())


def address(tensor):
    return 0 if tensor is None else tensor.data_ptr()


def weight_tuple(data, shape, scales=None, bias=None):
    int8 = data.dtype == torch.int8
    dtype, stride = (0, data.shape[1] * INT8_COLUMNS) if int8 else (DTYPES.index(data.dtype), data.stride(0))
    return (data.data_ptr(), dtype, address(scales), *shape, stride, address(bias))


def quantized(source, level=BEST, threads=1):
    rows, columns = source.shape
    lines = (math.ceil(rows / INT8_ROWS), math.ceil(columns / INT8_COLUMNS), INT8_ROWS, INT8_COLUMNS)
    data, scales = torch.full(lines, 99, dtype=torch.int8), torch.empty(rows)
    DECODE.quantize_int8(weight_tuple(source, source.shape), data.data_ptr(), scales.data_ptr(), level, threads)
    return data, scales


def in_rows(data, shape):
    """An int8 matrix row by row, zeros beyond its shape checked and left out."""
    whole = data.transpose(1, 2).reshape(data.shape[0] * INT8_ROWS, -1)
    assert not whole[shape[0] :].any() and not whole[:, shape[1] :].any()
    return whole[: shape[0], : shape[1]]


def project(matrices, x, level=BEST, threads=2, onto=None):
    outputs = [torch.empty(x.shape[0], m.rows) for m in matrices] if onto is None else onto
    DECODE.project([m.tuple for m in matrices], x.data_ptr(), x.shape[0], [y.data_ptr() for y in outputs],
                   onto is not None, level, threads)  # fmt: skip
    return outputs


def check_close(ours, true, tolerance=TOLERANCE):
    """Written so that NaN fails."""
    assert ours.shape == true.shape
    assert (ours - true).abs().max() <= tolerance * true.abs().max().clamp(min=1)


@each_kind
@each_level
def test_projections_are_right(level, kind):
    for rows, columns in SHAPES:
        for batch in (*range(1, 10), 13, 17):
            matrices = [Matrix(rows, columns, kind, bias=True, gap=3), Matrix(rows + 2, columns, kind)]
            x = torch.randn(batch, columns)
            for ours, matrix in zip(project(matrices, x, level), matrices, strict=True):
                check_close(ours, matrix.times(x))


@each_kind
@each_level
def test_projections_of_model_sizes(level, kind):
    """Rows that fit into L1 beside each other, and rows that do not, which are multiplied part by part."""
    for columns in (576, 1536, 2083):
        matrix, x = Matrix(200, columns, kind), torch.randn(64, columns)
        found = project([matrix], x, level)[0]
        check_close(found, matrix.times(x))
        for first in (0, 5, 62):
            assert torch.equal(project([matrix], x[first : first + 1], level)[0], found[first : first + 1])


@each_level
def test_a_gated_projection_of_two_kinds(level):
    """The two may take different numbers of the batch's rows at a time."""
    gate, up, x = Matrix(21, 40, torch.int8), Matrix(21, 40, torch.bfloat16), torch.randn(9, 40)
    found = torch.empty(9, 21)
    DECODE.project_gated(0, gate.tuple, up.tuple, address(x), 9, address(found), level, 2)
    check_close(found, ACTIVATIONS[0](gate.times(x)) * up.times(x), 2 * TOLERANCE)


@each_kind
@each_level
def test_projections_of_numbers_of_very_different_sizes(level, kind):
    """A hidden state's few large numbers: what is left of the others is what float32's sums leave of them."""
    matrix, x = Matrix(67, 576, kind), torch.randn(5, 576)
    x[:, [3, 200]] *= 1000
    x[2] = 0
    x[3] *= 1e-30
    x[4] *= 1e30
    for ours, numbers in zip(project([matrix], x, level)[0], x, strict=True):
        true = matrix.times(numbers)
        assert (ours - true).abs().max() <= TOLERANCE * true.abs().max()


@each_kind
@each_level
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none_and_in_its_row(level, kind, wrong):
    matrix, x = Matrix(37, 65, kind), torch.randn(6, 65)
    for column in (0, 40, 64):
        x[4] = torch.randn(65)
        x[4, column] = wrong
        found = project([matrix], x, level)[0]
        assert not found[4].isfinite().any()
        assert found[[0, 1, 2, 3, 5]].isfinite().all()


@each_kind
@each_level
def test_a_projection_depends_neither_on_threads_nor_on_the_batch(level, kind):
    for rows, columns in SHAPES:
        matrices = [Matrix(rows, columns, kind, bias=True, gap=1), Matrix(rows + 1, columns, kind)]
        x = torch.randn(17, columns)
        rows_alone = [project(matrices, row[None], level, 1) for row in x]
        alone = [torch.cat(y) for y in zip(*rows_alone, strict=True)]
        for threads in (1, 2, 3):
            for batch in (*range(1, 10), 13, 17):
                for ours, expected in zip(project(matrices, x[:batch], level, threads), alone, strict=True):
                    assert torch.equal(ours, expected[:batch]), (threads, batch)


@each_kind
@each_level
def test_accumulation_adds_to_what_is_there(level, kind):
    for batch in (1, 6):
        matrix, x = Matrix(37, 65, kind, bias=True), torch.randn(batch, 65)
        before = torch.randn(batch, 37)
        expected = before + project([matrix], x, level)[0]
        assert torch.equal(project([matrix], x, level, onto=[before.clone()])[0], expected)


@each_kind
@each_level
def test_a_gated_projection_is_projection_and_activation(level, kind):
    for rows, columns, batch in ((37, 65, 1), (70, 96, 3), (9, 33, 6), (21, 40, 17)):
        gate, up = Matrix(rows, columns, kind, bias=True), Matrix(rows, columns, kind, gap=2)
        x = torch.randn(batch, columns)
        gates, ups = project([gate, up], x, level)
        for activation, function in enumerate(ACTIVATIONS):
            expected, found = torch.empty(batch, rows), torch.empty(batch, rows)
            DECODE.gated_activation(
                activation, address(gates), address(ups), gates.numel(), address(expected), level, 2
            )
            for threads in (1, 3):
                DECODE.project_gated(
                    activation, gate.tuple, up.tuple, address(x), batch, address(found), level, threads
                )
                assert torch.equal(found, expected)
            check_close(found, function(gate.times(x)) * up.times(x), 2 * TOLERANCE)


@each_level
def test_infinities_and_nans_reach_only_their_own_results(level):
    matrix, x = Matrix(20, 65), torch.randn(5, 65)
    x[1, 64], x[3, 2] = math.nan, math.inf
    matrix.data[7, 3] = math.nan
    found = project([matrix], x, level)[0]
    assert found[1].isnan().all() and found[:, 7].isnan().all()
    rest = found[[0, 2, 4]][:, torch.arange(20) != 7]
    assert rest.isfinite().all()


@each_dtype
@each_level
def test_quantization_is_to_the_nearest_step(level, dtype):
    for rows, columns in SHAPES:
        source = torch.randn(rows, columns + 3).to(dtype)[:, :columns]
        source[rows // 2] = 0
        lines, scales = quantized(source, level, 3)
        data = in_rows(lines, source.shape)
        assert torch.equal(scales, source.float().abs().amax(1) / 127)
        assert not data[rows // 2].any()
        error = (data.double() * scales.double()[:, None] - source.double()).abs()
        assert (error <= scales.double()[:, None] * 0.50001).all()
        assert (data.abs().amax(1)[scales > 0] == 127).all()


@each_level
def test_norms(level):
    for rows, size in ((1, 1), (3, 7), (5, 64), (2, 576), (9, 130)):
        x, weight = torch.randn(rows, size), torch.randn(size)
        true = F.rms_norm(x.double(), (size,), weight.double(), 1e-5)
        for threads in (1, 2, 3):
            found = torch.empty(rows, size)
            DECODE.rms_norm(address(x), address(weight), 1e-5, rows, size, address(found), level, threads)
            check_close(found, true)
        DECODE.rms_norm(address(x), address(weight), 1e-5, rows, size, address(x), level, 2)
        assert torch.equal(x, found)


@each_level
def test_rope(level):
    for batch, heads, size in ((1, 1, 2), (3, 5, 8), (2, 3, 64), (2, 1, 80), (1, 4, 50)):
        x, cos, sin = torch.randn(batch, heads, size), torch.randn(batch, size), torch.randn(batch, size)
        low, high = x.double().chunk(2, -1)
        true = x.double() * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]
        found = [x.clone() for _ in range(3)]
        for threads, y in enumerate(found, 1):
            DECODE.rope(address(y), address(cos), address(sin), batch, heads, size, level, threads)
            assert torch.equal(y, found[0])
        check_close(found[0], true)


@each_level
def test_activations_over_their_whole_range(level):
    x = torch.cat((torch.linspace(-120, 120, 4001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, math.inf, math.nan])))
    ones = torch.ones_like(x)
    for activation, (function, true_function) in enumerate(zip(ACTIVATIONS, TRUE_ACTIVATIONS, strict=True)):
        found = torch.empty_like(x)
        DECODE.gated_activation(activation, address(x), address(ones), len(x), address(found), level, 3)
        true, torchs = true_function(x.double()), function(x)
        # The tails' exponents are rounded to float32; 1 + erf(u) cancels there, as it does in torch.
        relative = torch.where(x > -3, 1e-6, 1e-5) * true.abs()
        allowed = (torchs - true).abs() + relative + (1e-7 * x.abs() if function is F.gelu else 0) + 1e-30
        ordinary = true.isfinite() & (x.abs() < 80)
        assert ((found - true).abs() <= allowed)[ordinary].all()
        assert (found - true).abs()[x.abs().isfinite()].max() < 1e-4
        assert found[-1].isnan() and found[-2] == math.inf


@each_level
def test_softcap_has_a_small_relative_error_everywhere(level):
    x = torch.cat((torch.linspace(-300, 300, 5001), torch.linspace(-1, 1, 501), torch.tensor([1e-20, math.inf])))
    true = 30 * torch.tanh(x.double() / 30)
    DECODE.softcap(address(x), len(x), 30.0, level, 2)
    assert ((x - true).abs() <= 5e-7 * true.abs()).all()


@each_level
def test_addition(level):
    for count in (1, 15, 100):
        a, b, found = torch.randn(count), torch.randn(count), torch.empty(count)
        DECODE.add(address(a), address(b), count, address(found), level, 3)
        assert torch.equal(found, a + b)


@each_dtype
@each_level
def test_embedding(level, dtype):
    for columns in (1, 65, 576):
        matrix, tokens = Matrix(11, columns, dtype, gap=2), torch.tensor([10, 0, 3, 3, 7])
        found = torch.empty(5, columns)
        DECODE.embed(matrix.tuple, address(tokens), 5, 1.5, address(found), level, 2)
        check_close(found, matrix.true[tokens] * 1.5, 2e-7)


@each_level
def test_argmax_takes_the_first_of_the_largest(level):
    for size in (1, 3, 16, 31, 1000):
        logits = torch.randint(-3, 4, (6, size)).float()
        logits[1] = -math.inf
        logits[2, size // 2] = math.nan
        logits[3, size // 3 :] = math.nan
        logits[4, -1] = 9
        found = torch.empty(6, dtype=torch.int64)
        DECODE.argmax(address(logits), 6, size, address(found), level, 2)
        assert found.tolist() == [first_of_the_largest(row) for row in logits.tolist()]


def first_of_the_largest(row):
    nans = [i for i, x in enumerate(row) if math.isnan(x)]
    return nans[0] if nans else row.index(max(row))


class Blocks:
    """One row's cache [2, G, S, E] in blocks of two layers, of which this is the second, in no order in memory."""

    def __init__(self, cache):
        self.dtype, (_, kv_heads, positions, size) = cache.dtype, cache.shape
        count = -(-positions // CACHE_BLOCK)
        self.memory = torch.full((count, 2, 2, kv_heads, CACHE_BLOCK, size), math.nan, dtype=cache.dtype)
        self.order = torch.randperm(count)
        padded = torch.nn.functional.pad(cache, (0, 0, 0, count * CACHE_BLOCK - positions), value=math.nan)
        self.memory[self.order, 1] = padded.unflatten(2, (count, CACHE_BLOCK)).movedim(2, 0)

    def row(self, first, length):
        slab = self.memory[0, 0, 0].nbytes
        return [address(self.memory[i]) for i in self.order], 2 * slab, 3 * slab, first, length

    def contents(self):
        """[2, G, S, E] with S a multiple of the block."""
        return self.memory[self.order, 1].movedim(0, 2).flatten(2, 3)


class Attention:
    """Queries and a cache [2, G, S, E] per row, NaN in unused positions; first position and length per row."""

    def __init__(self, heads, kv_heads, size, spans, dtype=torch.float32, softcap=0.0, spread=1.0):
        self.q = torch.randn(len(spans), heads, size) * spread
        self.caches = [torch.full((2, kv_heads, end, size), math.nan, dtype=dtype) for _, end in spans]
        for cache, (first, end) in zip(self.caches, spans, strict=True):
            cache[:, :, first:] = torch.randn(2, kv_heads, end - first, size)
        self.blocks = [Blocks(cache) for cache in self.caches]
        self.spans, self.softcap = spans, softcap
        self.shape = (heads, kv_heads, size, DTYPES.index(dtype), size**-0.5, softcap)

    def rows(self):
        return [blocks.row(*span) for blocks, span in zip(self.blocks, self.spans, strict=True)]

    def run(self, level=BEST, threads=2, only=None):
        chosen = range(len(self.spans)) if only is None else only
        q, rows = self.q[list(chosen)], self.rows()
        out = torch.empty_like(q)
        DECODE.attention(self.shape, address(q), [rows[i] for i in chosen], address(out), level, threads)
        return out

    def true(self):
        results = []
        for q, cache, (first, end) in zip(self.q.double(), self.caches, self.spans, strict=True):
            keys, values = cache.double()[:, :, first:end].repeat_interleave(q.shape[0] // cache.shape[1], dim=1)
            scores = torch.einsum("he,hse->hs", q, keys) * self.shape[4]
            if self.softcap:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            results.append(torch.einsum("hs,hse->he", scores.softmax(-1), values))
        return torch.stack(results)


SPANS = [(0, 1), (0, 5), (3, 67), (0, 64), (60, 325), (0, 130), (1, 1300)]


@each_dtype
@each_level
def test_attention(level, dtype):
    for heads, kv_heads, size in ((9, 3, 64), (4, 4, 16), (5, 1, 33), (14, 2, 80), (20, 1, 7)):
        for softcap in (0.0, 5.0):
            attention = Attention(heads, kv_heads, size, SPANS, dtype, softcap)
            check_close(attention.run(level), attention.true())


@each_level
def test_attention_with_scores_far_apart(level):
    attention = Attention(4, 2, 64, [(0, 700)], spread=60.0)
    check_close(attention.run(level), attention.true(), 3e-5)


@each_dtype
@each_level
def test_attention_depends_neither_on_threads_nor_on_the_batch(level, dtype):
    attention = Attention(9, 3, 64, SPANS, dtype)
    alone = torch.cat([attention.run(level, 1, [i]) for i in range(len(SPANS))])
    for threads in (1, 2, 3):
        assert torch.equal(attention.run(level, threads), alone)
        assert torch.equal(attention.run(level, threads, [6, 2]), alone[[6, 2]])


@each_dtype
@each_level
def test_appending_to_the_cache(level, dtype):
    for kv_heads, size in ((3, 64), (1, 7), (2, 80)):
        lengths = 4, CACHE_BLOCK + 1, 2 * CACHE_BLOCK
        rows = [Blocks(torch.full((2, kv_heads, 2 * CACHE_BLOCK, size), 9.0, dtype=dtype)) for _ in lengths]
        new = torch.randn(2, 3, kv_heads, size)
        expected = [row.contents() for row in rows]
        for i, length in enumerate(lengths):
            expected[i][:, :, length - 1] = new[:, i]
        shape = (kv_heads, kv_heads, size, DTYPES.index(dtype), 1.0, 0.0)
        tuples = [row.row(0, length) for row, length in zip(rows, lengths, strict=True)]
        DECODE.append_to_cache(shape, address(new[0]), address(new[1]), tuples, level, 3)
        assert all(torch.equal(row.contents(), e) for row, e in zip(rows, expected, strict=True))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_projection(data):
    rows, columns, batch = (data.draw(st.integers(1, most)) for most in (200, 300, 64))
    kind, level = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(LEVELS))
    matrix = Matrix(rows, columns, kind, data.draw(st.booleans()), data.draw(st.integers(0, 5)))
    x = torch.randn(batch, columns)
    check_close(project([matrix], x, level, data.draw(st.integers(1, 4)))[0], matrix.times(x))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_attention(data):
    kv_heads, shared, size = (data.draw(st.integers(1, most)) for most in (4, 18, 140))
    spans = data.draw(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 400)), min_size=1, max_size=5))
    attention = Attention(kv_heads * shared, kv_heads, size, [(first, first + n) for first, n in spans],
                          data.draw(st.sampled_from(DTYPES)))  # fmt: skip
    threads = data.draw(st.integers(1, 4))
    check_close(attention.run(data.draw(st.sampled_from(LEVELS)), threads), attention.true())


def test_memory_is_read_once_and_whole():
    words = torch.randint(-(2**31), 2**31 - 1, (16 * 1000 + 16,), dtype=torch.int32)
    words = words[(-address(words) % 64) // 4 :][: 16 * 1000]
    for level in LEVELS:
        for threads in (1, 3):
            total = DECODE.read_memory(address(words), words.nbytes, level, threads)
            assert total == int(words.sum(dtype=torch.int64)) % 2**32


def test_a_digest_of_memory_is_the_same_at_every_level_and_sees_every_word():
    words = torch.randint(-(2**31), 2**31 - 1, (600_000,), dtype=torch.int32)
    words = words[(-address(words) % 64) // 4 :][: 16 * 37_000]

    def digests():
        return {DECODE.digest_memory(address(words), words.nbytes, level, n) for level in LEVELS for n in (1, 3)}

    seen = digests()
    assert len(seen) == 1
    for place in (0, 17, 16 * 16_384 - 1, 16 * 16_384, len(words) - 1):
        words[place] ^= 1 << 30
        (digest,) = digests()
        assert digest not in seen
        seen.add(digest)


def test_more_workers_than_cores_still_progress():
    DECODE.syncs(500, BEST, 8)
