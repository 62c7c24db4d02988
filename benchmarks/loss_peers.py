"""The implementations of the loss that are measured side by side: one table, ours and our peers'.

Where a peer's op has no per-token weights or no KL term, the work is done the way its user has to: per-token losses
times weights, and a KL term from logits of the rows that count, computed again where the op keeps its own to itself.
"""

import importlib.util
import shutil
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.loss_problems import IGNORE_INDEX, Inputs
from dive_fast.errors import InputError
from dive_fast.ops import linear_cross_entropy
from dive_fast.ops.backend import BACKENDS, select_backend

# Large chunks suit F.linear_cross_entropy on a CPU: its automatic choice for 1024 rows of SmolLM2's head is 8 rows a
# chunk, each of which reads the whole head.
CHUNK_ROWS = 512
# Cut Cross-Entropy leaves tokens of small probability out of the gradient; here they are many, in a trained model few.
FILTERED_TOLERANCE = 0.25


class Implementation(NamedTuple):
    """One way to compute the loss.

    Attributes:
        name: shown in results.
        make: () -> function of `Inputs` giving the loss; called once per problem, so that nothing compiled for another
            shape is reused.
        missing: device -> why it cannot run there at all, or None.
        unfit: `Inputs` -> why it cannot take these, or None.
        own_weights, own_kl: its op takes per-token weights, takes a teacher.
        slow_start: it compiles for a while; at smoke scale it is measured on one problem.
        tolerance: of loss and gradient in place of the dtype's, for one that is approximate by design.
    """

    name: str
    make: Callable[[], Callable[[Inputs], torch.Tensor]]
    missing: Callable[[str], str | None]
    unfit: Callable[[Inputs], str | None] = lambda inputs: None
    own_weights: bool = False
    own_kl: bool = False
    slow_start: bool = False
    tolerance: float | None = None

    def label(self, inputs: Inputs) -> str:
        """The name, with what its user has to do around it."""
        around = []
        if inputs.token_weights is not None and not self.own_weights:
            around.append("weights times per-token losses")
        if inputs.kl_weight and not self.own_kl:
            around.append("KL from logits")
        return " + ".join([self.name, *around])


def implementations(device: str) -> list[Implementation]:
    """Ours by backend, then the peers."""
    ours = [_ours(backend) for backend in BACKENDS["linear_cross_entropy", device]]
    return [*ours, *PEERS]


def best_of_ours(device: str) -> Implementation:
    """The backend that `backend=None` takes."""
    return _ours(select_backend("linear_cross_entropy", None, torch.device(device)))


def peer(name: str) -> Implementation:
    """The peer of that name."""
    return next(implementation for implementation in PEERS if implementation.name == name)


def _ours(backend: str) -> Implementation:
    def loss(inputs: Inputs) -> torch.Tensor:
        return linear_cross_entropy(
            inputs.hidden,
            inputs.weight,
            inputs.targets,
            inputs.token_weights,
            rows=inputs.rows,
            teacher=inputs.taught if inputs.statistics is None else inputs.statistics,
            kl_weight=inputs.kl_weight,
            reduction=inputs.reduction,
            backend=backend,
        )

    def missing(device: str) -> str | None:
        try:
            select_backend("linear_cross_entropy", backend, torch.device(device))
        except InputError as error:
            return str(error)
        return None

    return Implementation(f"dive_fast {backend}", lambda: loss, missing, own_weights=True, own_kl=True)


def weighted(inputs: Inputs, cross_entropy: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """The loss without KL of an op that knows only its reduction."""
    if inputs.token_weights is None:
        return cross_entropy(inputs.reduction)
    losses = cross_entropy("none") * inputs.token_weights
    if inputs.reduction == "none":
        return losses
    counted = inputs.targets != IGNORE_INDEX
    return losses.sum() / (inputs.token_weights * counted).sum()


def with_kl(inputs: Inputs, loss: torch.Tensor, logits: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Adds the KL term; `logits` gives those of the rows that count, [N, V]."""
    if not inputs.kl_weight:
        return loss
    with torch.no_grad():
        log_q = F.linear(inputs.taught, inputs.weight).float().log_softmax(-1)
    kl = F.kl_div(logits().float().log_softmax(-1), log_q, reduction="none", log_target=True).sum(-1)
    if inputs.reduction == "none":
        return loss.index_add(0, inputs.rows, inputs.kl_weight * kl.to(loss.dtype))
    return loss + inputs.kl_weight * kl.mean()


def eager(inputs: Inputs) -> torch.Tensor:
    """All rows' logits at once, in float32."""
    return from_logits(inputs, F.linear(inputs.hidden, inputs.weight).float())


def eager_in_dtype(inputs: Inputs) -> torch.Tensor:
    """All rows' logits at once, in the dtype of the inputs."""
    return from_logits(inputs, F.linear(inputs.hidden, inputs.weight))


def eager_unfit(inputs: Inputs) -> str | None:
    return "the same as float32 logits" if inputs.hidden.dtype == torch.float32 else None


def from_logits(inputs: Inputs, logits: torch.Tensor) -> torch.Tensor:
    """The loss of all rows' logits [T, V]."""

    def cross_entropy(reduction: str) -> torch.Tensor:
        return F.cross_entropy(logits, inputs.targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    return with_kl(inputs, weighted(inputs, cross_entropy), lambda: logits[inputs.rows])


def compacted(inputs: Inputs) -> torch.Tensor:
    """`eager` on the rows that count: what a careful user writes in three lines."""
    rows, weights = inputs.rows, inputs.token_weights
    kept = inputs._replace(
        hidden=inputs.hidden[rows],
        targets=inputs.targets[rows],
        token_weights=None if weights is None else weights[rows],
        rows=torch.arange(len(rows), device=rows.device),
    )
    loss = eager(kept)
    return loss.new_zeros(len(inputs.targets)).index_copy(0, rows, loss) if loss.dim() else loss


def fused(inputs: Inputs, cross_entropy: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """A fused op's cross-entropy; its logits are its own, so that a KL term has to compute them again."""
    loss = weighted(inputs, cross_entropy)
    return with_kl(inputs, loss, lambda: F.linear(inputs.hidden[inputs.rows], inputs.weight))


def make_compiled() -> Callable[[Inputs], torch.Tensor]:
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def make_torch_chunked(**options) -> Callable[[], Callable[[Inputs], torch.Tensor]]:
    def make():
        chunks = torch.nn.LinearCrossEntropyOptions(**options) if options else None

        def loss(inputs: Inputs) -> torch.Tensor:
            def cross_entropy(reduction: str) -> torch.Tensor:
                return F.linear_cross_entropy(
                    inputs.hidden, inputs.weight, inputs.targets, reduction=reduction, options=chunks
                )

            return fused(inputs, cross_entropy)

        return loss

    return make


def make_liger() -> Callable[[Inputs], torch.Tensor]:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(inputs: Inputs) -> torch.Tensor:
        def cross_entropy(reduction: str) -> torch.Tensor:
            return liger_fused_linear_cross_entropy(
                inputs.hidden, inputs.weight, inputs.targets, ignore_index=IGNORE_INDEX, reduction=reduction
            )

        return fused(inputs, cross_entropy)

    return loss


def make_cut(**options) -> Callable[[], Callable[[Inputs], torch.Tensor]]:
    def make():
        import cut_cross_entropy

        torch.compiler.reset()

        def loss(inputs: Inputs) -> torch.Tensor:
            def cross_entropy(reduction: str) -> torch.Tensor:
                return cut_cross_entropy.linear_cross_entropy(
                    inputs.hidden, inputs.weight, inputs.targets, IGNORE_INDEX, reduction=reduction, **options
                )

            return fused(inputs, cross_entropy)

        return loss

    return make


def make_quack() -> Callable[[Inputs], torch.Tensor]:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    def loss(inputs: Inputs) -> torch.Tensor:
        def cross_entropy(reduction: str) -> torch.Tensor:
            arguments = {"ignore_index": IGNORE_INDEX, "reduction": reduction}
            if reduction == "none":  # not offered by its chunked op
                return linear_cross_entropy_func(inputs.hidden, inputs.weight, None, inputs.targets, **arguments)
            return chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.targets, **arguments)

        return fused(inputs, cross_entropy)

    return loss


def anywhere(device: str) -> None:
    """Plain PyTorch: never missing."""


def package(module: str, install: str, cuda: str | None = None) -> Callable[[str], str | None]:
    """A `missing` for a peer from a package; `cuda`: why it needs a CUDA device."""

    def missing(device: str) -> str | None:
        if device != "cuda" and cuda is not None:
            return f"{cuda}, and the problem lies on the {device}"
        return None if importlib.util.find_spec(module) else f"{module} is not installed ({install})"

    return missing


def no_compiler(device: str) -> str | None:
    """torch.compile compiles C++ for a CPU, Triton for a GPU."""
    if device == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "torch.compile needs a C++ compiler (g++ or clang++)"
    return package("triton", "pip install triton")(device) if device == "cuda" else None


def torch_missing(device: str) -> str | None:
    """F.linear_cross_entropy and its options came after torch 2.11."""
    found = hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")
    return None if found else f"torch {torch.__version__} has no F.linear_cross_entropy with options (2.13 has)"


def cut_missing(device: str) -> str | None:
    return cut_package(device) or no_compiler(device)


def quack_missing(device: str) -> str | None:
    reason = quack_package(device)
    if reason is None and torch.cuda.get_device_capability()[0] < 9:
        reason = "quack needs compute capability 9.0 or newer"
    return reason


def automatic_unfit(inputs: Inputs) -> str | None:
    plain = inputs.reduction == "mean" and inputs.token_weights is None
    if plain or inputs.hidden.device.type == "cuda":
        return None
    return "on a CPU its chunks of a few rows take ten times as long as all others; plain means show it"


def quack_unfit(inputs: Inputs) -> str | None:
    sizes = (len(inputs.targets), *inputs.weight.shape)
    if inputs.hidden.dtype == torch.float32 or any(size % 8 for size in sizes):
        return "quack takes half precision and multiples of 8"
    return None


BENCH = "pip install 'dive_fast[bench]'"
TRITON_KERNELS = "its kernels are Triton's"
cut_package = package("cut_cross_entropy", BENCH)
quack_package = package("quack", "pip install quack-kernels", cuda="its kernels are CUTLASS's")

PEERS = (
    Implementation("eager float32 logits", lambda: eager, anywhere),
    Implementation("eager", lambda: eager_in_dtype, anywhere, unfit=eager_unfit),
    Implementation("eager valid rows", lambda: compacted, anywhere),
    Implementation("torch.compile", make_compiled, no_compiler, slow_start=True),
    Implementation("F.linear_cross_entropy", make_torch_chunked(), torch_missing),
    Implementation(
        "F.linear_cross_entropy auto chunks",
        make_torch_chunked(chunking_method="auto"),
        torch_missing,
        unfit=automatic_unfit,
    ),
    Implementation(
        f"F.linear_cross_entropy chunks of {CHUNK_ROWS}",
        make_torch_chunked(chunking_method=None, batch_chunk_size=CHUNK_ROWS),
        torch_missing,
    ),
    Implementation("Liger", make_liger, package("liger_kernel", BENCH, cuda=TRITON_KERNELS)),
    Implementation("Cut Cross-Entropy torch_compile", make_cut(impl="torch_compile"), cut_missing, slow_start=True),
    Implementation(
        "Cut Cross-Entropy exact",
        make_cut(impl="cce", filter_eps=None),
        package("cut_cross_entropy", BENCH, cuda=TRITON_KERNELS),
        slow_start=True,
    ),
    Implementation(
        "Cut Cross-Entropy filtered",
        make_cut(impl="cce", filter_eps="high"),
        package("cut_cross_entropy", BENCH, cuda=TRITON_KERNELS),
        slow_start=True,
        tolerance=FILTERED_TOLERANCE,
    ),
    Implementation("quack", make_quack, quack_missing, unfit=quack_unfit, slow_start=True),
)
