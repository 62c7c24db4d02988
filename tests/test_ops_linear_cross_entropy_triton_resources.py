"""What the loss's Triton kernels take of an SM, compiled for three GPU generations without a GPU."""

from itertools import product

import pytest

from tests.triton_resources import SHARED_MEMORY_LIMITS, Request, measure, skip_unless_pinned

pytest.importorskip("triton", reason="kernels are compiled by triton")

from dive_fast.ops.linear_cross_entropy import triton as row_chunked  # noqa: E402
from dive_fast.ops.linear_cross_entropy import triton_gradient_rows, triton_streaming  # noqa: E402
from dive_fast.ops.linear_cross_entropy.triton_row_kernel import linear_cross_entropy_row_fwd_kernel  # noqa: E402

CAPABILITIES = (80, 90, 100)
DTYPES = ("fp32", "bf16")
FEATURES = {
    "plain": set(),
    "cached": {"HAS_CACHED_TEACHER", "HAS_KL_GRADIENT"},
    "everything_cached": {
        "HAS_BIAS",
        "HAS_CLASS_WEIGHTS",
        "HAS_SMOOTHING",
        "HAS_Z_LOSS",
        "HAS_CACHED_TEACHER",
        "HAS_KL_GRADIENT",
        "WANTS_STATS",
    },
    "everything_online": {
        "HAS_BIAS",
        "HAS_CLASS_WEIGHTS",
        "HAS_SMOOTHING",
        "HAS_Z_LOSS",
        "HAS_SOFTCAP",
        "HAS_ONLINE_TEACHER",
        "HAS_KL_GRADIENT",
        "WANTS_STATS",
    },
}
# Of the operands' dtype; every other float tensor is float32.
OPERANDS = {"hidden_ptr", "weight_ptr", "teacher_ptr", "dlogits_ptr", "gradient_ptr", "out_ptr", "bias_ptr"}
INTEGERS = {
    "rows_ptr": "*i64",
    "teacher_rows_ptr": "*i64",
    "targets_ptr": "*i64",
    "top_indices_ptr": "*i32",
    "inverse_ptr": "*i32",
    "best_ptr": "*i32",
    "correct_ptr": "*i1",
}
DOUBLES = {"label_smoothing", "z_loss", "softcap"}
# Arguments that are None without the feature.
NEEDS = {
    "bias_ptr": ("HAS_BIAS",),
    "class_weights_ptr": ("HAS_CLASS_WEIGHTS",),
    "c_sum_ptr": ("HAS_CLASS_WEIGHTS",),
    "teacher_ptr": ("HAS_ONLINE_TEACHER",),
    "teacher_logits_ptr": ("HAS_ONLINE_TEACHER",),
    "kl_share_ptr": ("HAS_KL_GRADIENT",),
    "kl_ptr": ("HAS_KL_GRADIENT",),
} | dict.fromkeys(
    (
        "tail_mean_weight_ptr",
        "tail_mass_ptr",
        "tail_negative_entropy_ptr",
        "top_indices_ptr",
        "top_log_probs_ptr",
        "top_dlogits_ptr",
        "top_tiles_ptr",
    ),
    ("HAS_CACHED_TEACHER",),
)
# Hidden sizes and padded strides are multiples of 16; numbers of rows and tokens are not.
DIVISIBLE = (
    "D",
    "K",
    "stride_ht",
    "stride_wv",
    "stride_teacher_t",
    "stride_logits_r",
    "stride_dlogits_r",
    "stride_part",
)


def request(kernel, features, dtype, capability, **constexprs) -> Request:
    """The compilation that a launch with these features asks for."""
    names = kernel.arg_names
    values = {name: name in features for name in names if name.startswith(("HAS_", "WANTS_"))} | {
        name: value for name, value in constexprs.items() if name in names
    }
    signature = {}
    for name in names:
        if name in values:
            continue
        if name.endswith("_ptr") and not set(NEEDS.get(name, ())) <= features:
            values[name] = None
        elif name in INTEGERS:
            signature[name] = INTEGERS[name]
        elif name.endswith("_ptr"):
            signature[name] = "*" + (dtype if name in OPERANDS else "fp32")
        elif name in ("stride_hd", "stride_wd", "stride_teacher_d"):
            values[name] = 1
        else:
            signature[name] = "fp64" if name in DOUBLES else "i32"
    return Request(
        kernel,
        signature,
        values,
        constexprs["num_warps"],
        constexprs.get("num_stages", 3),
        capability,
        [name for name in DIVISIBLE if name in signature],
        constexprs.get("maxnreg"),
    )


def compiled(kernel, features, dtypes=DTYPES, **constexprs):
    """{(dtype, capability): resources}"""
    keys = [(dtype, capability) for dtype in dtypes for capability in CAPABILITIES]
    requests = [request(kernel, features, dtype, capability, **constexprs) for dtype, capability in keys]
    return dict(zip(keys, measure(requests), strict=True))


@pytest.mark.parametrize("features", FEATURES)
def test_three_blocks_of_the_row_kernel_fit_an_sm(features):
    flags = FEATURES[features] | {"WANTS_GRADIENT"}
    block, registers = row_chunked.block_and_registers(2**20, dict.fromkeys(flags, True))
    resources = compiled(
        linear_cross_entropy_row_fwd_kernel,
        flags,
        BLOCK_V=block,
        BLOCK_D=row_chunked.MAX_BLOCK_D,
        BLOCK_K=64,
        num_warps=row_chunked.MAX_WARPS,
        maxnreg=registers,
    )
    skip_unless_pinned()
    for key, used in resources.items():
        # 65536 registers over three blocks of 256 threads, in the steps of 8 that they are given out in.
        assert used.registers <= registers <= 80, key
        assert used.spill_bytes == 0, key
        assert used.shared_bytes <= 8 * 1024, key


@pytest.mark.parametrize(
    ("kernel", "features"),
    [
        (triton_gradient_rows.linear_cross_entropy_sum_parts_fwd_kernel, {"HAS_TAIL"}),
        (triton_gradient_rows.linear_cross_entropy_scatter_bwd_kernel, set()),
    ],
    ids=["sum_parts", "scatter"],
)
def test_kernels_that_only_move_rows_are_small(kernel, features):
    constexprs = {"BLOCK_D": triton_gradient_rows.MAX_BLOCK_D, "num_warps": 4}
    skip_unless_pinned()
    for key, used in compiled(kernel, features | {"HAS_KL_GRADIENT", "HAS_CACHED_TEACHER"}, **constexprs).items():
        # 65536 registers over the 2048 threads of an SM.
        assert used.registers <= 32, key
        assert used.spill_bytes == 0, key


@pytest.mark.parametrize(
    ("name", "dtype", "features"),
    [
        (name, dtype, features)
        for features in ("everything_cached", "everything_online")
        for name, dtype in (*product(("parts", "gradient"), DTYPES), ("combine", "bf16"))
    ]
    + [("parts", "bf16", "plain"), ("gradient", "bf16", "plain")],
)
def test_streaming_kernels_fit_an_sm_without_spills(name, dtype, features):
    kernel = getattr(triton_streaming, f"linear_cross_entropy_streaming_{name}_fwd_kernel")
    tile = triton_streaming.FULL_TILE if dtype == "fp32" else triton_streaming.HALF_TILE
    constexprs = {"BLOCK_N": tile.n, "BLOCK_V": tile.v, "BLOCK_D": tile.d, "num_stages": tile.stages}
    if name == "combine":
        constexprs = {"BLOCK_D": triton_streaming.MAX_BLOCK_D, "BLOCK_S": 256}
    resources = compiled(
        kernel,
        FEATURES[features],
        [dtype],
        **constexprs,
        BLOCK_K=triton_streaming.MAX_BLOCK_K,
        ROUNDS_LOGITS=False,
        PRECISION="ieee",
        num_warps=4 if name == "combine" else tile.warps,
    )
    for (_, capability), used in resources.items():
        assert used.deferred_sums == 0, capability
        assert used.shared_bytes <= SHARED_MEMORY_LIMITS[capability], capability
    skip_unless_pinned()
    for (_, capability), used in resources.items():
        assert used.spill_bytes == 0, capability
