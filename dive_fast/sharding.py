"""A frozen decoder whose layers are shared among the processes of a run: each holds a part of every layer.

FSDP2 (`torch.distributed.fsdp.fully_shard`) gathers a layer right before it runs and frees it behind. What is sharded
are the frozen weights of the decoder's layers and nothing else. Adapters are small: every process has them whole, data
parallelism averages their gradients, and so optimizer, checkpoints and saved adapters are those of an unsharded run.
The head is whole as well, because the loss reads it outside every forward pass (and where it is tied, it is the
embedding), and so are a vision tower's weights, which a pass over text alone would not gather.

accelerate's own FSDP2 does not serve: it shards adapters and head along, it wants every pass to begin at the outermost
module (a prompt that is run without adapters begins at the base model), and on CPUs it is left out without a word.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainingArguments

from dive_fast.errors import InputError
from dive_fast.models.hidden import unwrapped
from dive_fast.models.spec import decoder_of
from dive_fast.supervision.teacher import without_steering

# What transformers writes into every fsdp_config.
_UNUSED = {"min_num_params": 0, "xla": False, "xla_fsdp_v2": False, "xla_fsdp_grad_ckpt": False}


def take_over(arguments: TrainingArguments) -> None:
    """Check `fsdp` and `fsdp_config`, and keep accelerate from sharding the model its own way.

    Raises:
        InputError: a single process; a setting other than version 2 and reshard_after_forward.
    """
    config = {name: value for name, value in arguments.fsdp_config.items() if _UNUSED.get(name, ...) != value}
    if config.pop("version", 2) != 2:
        raise InputError(f"fsdp_config: expected version 2, got {arguments.fsdp_config['version']!r}")
    if not isinstance(config.pop("reshard_after_forward", True), bool):
        got = arguments.fsdp_config["reshard_after_forward"]
        raise InputError(f"fsdp_config: reshard_after_forward is true or false, got {got!r}")
    if config:
        raise InputError(
            f"fsdp_config: expected version and reshard_after_forward alone, got {', '.join(map(str, config))}; what "
            "is sharded are the frozen layers of the decoder, one by one"
        )
    if arguments.world_size < 2:
        raise InputError(
            "fsdp: it shares the frozen layers among processes, and there is only one; start several with `torchrun "
            "--nproc-per-node N`, or leave fsdp out"
        )
    arguments.fsdp_plugin_args = None


def shard_layers(model: nn.Module, arguments: TrainingArguments) -> None:
    """Replace the frozen weights of the decoder's layers by this process's part of them, on its device.

    The decoder is the root of the sharded modules: every pass goes through it, whatever wraps it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    decoder = decoder_of(unwrapped(model))
    options = {"mesh": init_device_mesh(arguments.device.type, (arguments.world_size,))}
    whole = {p for name, p in decoder.named_parameters() if f".{model.base_model.prefix}" in name}
    reshard = arguments.fsdp_config.get("reshard_after_forward", True)
    for layer in decoder.layers:
        fully_shard(layer, reshard_after_forward=reshard, ignored_params=whole, **options)
    left_alone = [name for name, p in model.named_parameters() if isinstance(p, _dtensor())]
    fully_shard(decoder, ignored_params={p for p in decoder.parameters() if not isinstance(p, _dtensor())}, **options)
    # Nothing for data parallelism to spread from the first process; buffers, which never change, in no pass either.
    left_alone += [name for name, _ in model.named_buffers()]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, left_alone)


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


@contextmanager
def lockstep(model: nn.Module, arguments: TrainingArguments):
    """Within, each process may run the model as often as it needs: those that have finished go along with the others.

    A pass over sharded layers is one of all processes. How many a process needs differs where a teacher's results or a
    prompt's cache are at hand, and where reports are written. Nothing else within may wait for other processes.
    """

    def announce(*_) -> None:
        any_process(True, arguments)

    decoder = decoder_of(unwrapped(model))
    handle = decoder.register_forward_pre_hook(announce, prepend=True)
    try:
        yield
    finally:
        handle.remove()
    while any_process(False, arguments):
        with torch.no_grad(), without_steering(model):
            decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=arguments.device), use_cache=False)


def any_process(flag: bool, arguments: TrainingArguments) -> bool:
    """Whether `flag` is set in any process of the run, each of which must ask."""
    if arguments.world_size == 1:
        return flag
    flags = torch.tensor(int(flag), device=arguments.device)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)
