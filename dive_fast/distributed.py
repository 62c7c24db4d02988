"""Predictions for a whole data set by several workers, on one machine or many, through Ray (the extra `ray`).

Each worker is a Ray actor that loads model and adapter once and then writes shard after shard; the calling process
alone touches the output. A shard is a few records and what comes back is text, so neither blocks nor streaming are of
use: with Ray Data (2.60) the same loop also needs pandas and pyarrow and, unless told otherwise, tries a shard that
kills its worker for ever. Ray's own restarts have no bound that fits either: counted per actor they end a long run on
machines that come and go, uncounted they repeat a model that does not fit into memory without end. So a dead worker is
replaced here, and what it was doing is tried DEATHS times.
"""

import dataclasses
import hashlib
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dive_fast.data.record import Record
from dive_fast.errors import InputError
from dive_fast.shards import Shards, records_fingerprint

INSTALL = "pip install 'dive_fast[ray]'"
DEATHS = 3
"""A shard that kills so many workers, or so many deaths at start-up with nothing done in between, end the run."""


@dataclasses.dataclass(frozen=True)
class Workers:
    """How many workers there are and what each of them holds.

    Attributes:
        count: workers; with fewer shards only as many as there are shards.
        cpus: of each worker, also its threads (at least one); None shares what there is equally.
        gpus: of each worker; 0 runs the model on the CPU. 0.5 puts two workers on one GPU.
        address: "local" starts Ray on this machine for this call alone; "auto" or "host:port" joins a running cluster,
            whose machines need this package and the same paths to model, adapter and images.
    """

    count: int
    cpus: float | None = None
    gpus: float = 0
    address: str = "local"

    def __post_init__(self):
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise InputError(f"--workers: expected a whole number >= 1, got {self.count!r}")
        if self.cpus is not None and not 0 < self.cpus < float("inf"):
            raise InputError(f"--worker-cpus: expected a number > 0, got {self.cpus!r}")
        if not 0 <= self.gpus < float("inf") or (self.gpus > 1 and self.gpus != int(self.gpus)):
            raise InputError(
                f"--worker-gpus: expected 0, a part of a GPU such as 0.5, or a whole number, got {self.gpus!r}"
            )


@dataclasses.dataclass(frozen=True)
class Job:
    """What a worker does with records, beside the records themselves; `options` are those of `dive_fast.generate`."""

    model: str
    adapter: str | None
    dtype: str | None
    batch_size: int
    options: Mapping
    device: str


class Writer:
    """A worker: model and adapter, loaded once, and the records it is handed. It reads their images itself."""

    def __init__(self, job: Job, threads: int | None):
        self.job, self.threads, self.loaded = job, threads, None

    def load(self) -> int:
        """Load model and adapter where that has not been done; returns the worker's process id."""
        if self.loaded is None:
            import torch

            from dive_fast.models.backbone import load_backbone
            from dive_fast.train import load

            if self.threads is not None:
                torch.set_num_threads(self.threads)
            model, processor = load_backbone(self.job.model, dtype=self.job.dtype)
            if self.job.adapter is not None:
                model = load(model, self.job.adapter)
            self.loaded = model.to(self.job.device), processor
        return os.getpid()

    def write(self, records: Sequence[Record]) -> list[dict]:
        """The rows of `dive_fast.predictions.predictions` for these records."""
        from dive_fast.predictions import predictions

        self.load()
        return list(predictions(*self.loaded, records, batch_size=self.job.batch_size, options=self.job.options))


def write_predictions(
    records: Sequence[Record],
    output: str | Path,
    workers: Workers,
    *,
    model: str,
    adapter: str | Path | None = None,
    dtype: str | None = None,
    batch_size: int = 8,
    shard_size: int | None = None,
    options: Mapping | None = None,
    on_shard=None,
) -> int:
    """Predictions for `records` in the file `output`, the same as one process writes; returns the number of rows.

    Finished shards are kept in `<output>.shards` until all are there. Called again after any interruption, it computes
    only what is missing. An `output` that exists is replaced at the end.

    Args:
        model: a short name, a folder or a hub id; every worker loads it.
        adapter: a trained adapter's folder.
        shard_size: records that a worker is handed at a time; a multiple of `batch_size`, so that the same records are
            run together as in one process. Default 8 batches.
        options: of `dive_fast.generate`; sampling needs a `seed`.
        on_shard: called with (finished shards, all shards) after each.

    Raises:
        InputError: Ray is missing (says the pip command) or has too few CPUs or GPUs; shards of another configuration
            (says what differs); a shard that kills every worker; what loading and generating refuse.
    """
    options = dict(options or {})
    shard_size = 8 * batch_size if shard_size is None else shard_size
    if shard_size < 1 or shard_size % batch_size:
        raise InputError(f"--shard-size: expected a multiple of the batch size ({batch_size}), got {shard_size}")
    if options.get("temperature", 0) > 0 and options.get("seed") is None:
        raise InputError("--seed: with workers, sampling needs one, so that a shard draws the same wherever it is run")
    if not len(records):
        raise InputError("--data: expected at least one record to write about, got none")
    from dive_fast.models.smollm2 import is_builtin

    ray = _ray()
    job = Job(
        model=model if is_builtin(model) else _absolute(model),
        adapter=None if adapter is None else _absolute(adapter),
        dtype=dtype,
        batch_size=batch_size,
        options=options,
        device="cuda" if workers.gpus > 0 else "cpu",
    )
    setup = {
        "model": model,
        "adapter": None if adapter is None else _adapter_fingerprint(Path(adapter)),
        "dtype": dtype,
        "device": job.device,
        "data": {"records": len(records), "sha256": records_fingerprint(records)},
        "batch_size": batch_size,
        "shard_size": shard_size,
        "options": options,
    }
    records = [dataclasses.replace(record, images=tuple(map(_absolute, record.images))) for record in records]
    shards = Shards(Path(output), records, shard_size, setup)
    left = {index: shards.shards[index] for index in shards.unfinished()}
    if left:
        with _connected(ray, workers), _kept(shards):
            for done, (index, rows) in enumerate(_results(ray, job, workers, left), start=1):
                shards.save(index, rows)
                if on_shard is not None:
                    on_shard(len(shards) - len(left) + done, len(shards))
    return shards.join()


@contextmanager
def _kept(shards: Shards) -> Iterator[None]:
    """What ends the run says what is there."""
    try:
        yield
    except (InputError, KeyboardInterrupt) as stop:
        done = len(shards) - len(shards.unfinished())
        if done and isinstance(stop, KeyboardInterrupt):
            stop.saved_to = f"{shards.folder} ({done} of {len(shards)} shards), the same command goes on from there"
        elif done:
            raise InputError(
                f"{stop}. {done} of {len(shards)} shards are kept in {shards.folder}; the same command goes on from "
                "there"
            ) from stop
        raise


def _results(ray, job: Job, workers: Workers, shards: Mapping[int, Sequence[Record]]) -> Iterator[tuple[int, list]]:
    """(index, rows) of every shard, as they are finished; a worker that dies is replaced.

    A worker is handed a shard once it has loaded its model, so none waits for a worker that finds no place to run.
    """
    cpus = _cpus_each(ray, workers, len(shards))
    remote = ray.remote(Writer).options(num_cpus=cpus, num_gpus=workers.gpus, max_restarts=0)
    waiting, deaths = deque(shards), Counter()
    running = {}  # what a worker is doing -> (the worker, the shard; None while it loads)

    def employ() -> None:
        worker = remote.remote(job, max(1, int(cpus)))
        running[worker.load.remote()] = worker, None

    for _ in range(min(workers.count, len(shards))):
        employ()
    done = 0
    while done < len(shards):
        [task], _ = ray.wait(list(running), num_returns=1)
        worker, index = running.pop(task)
        try:
            rows = ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:  # the worker is gone, or its machine
            with suppress(ray.exceptions.RayError):
                ray.kill(worker)
            deaths[index] += 1
            if deaths[index] >= DEATHS:
                raise InputError(_why_it_ended(index, shards, str(error).splitlines()[0])) from error
            if index is not None:
                waiting.appendleft(index)
            employ()
            continue
        if index is not None:
            done += 1
            deaths[None] = 0
            yield index, rows
        if waiting:
            index = waiting.popleft()
            running[worker.write.remote(shards[index])] = worker, index


def _why_it_ended(index: int | None, shards: Mapping[int, Sequence[Record]], error: str) -> str:
    what = "loading the model"
    if index is not None:
        what = f"shard {index} (records {shards[index][0].id} to {shards[index][-1].id})"
    return (
        f"--workers: {what} ended {DEATHS} workers ({error}); most often memory ran out: use fewer workers, or a "
        "smaller --batch-size"
    )


def _ray():
    try:
        import ray
    except ImportError as error:
        raise InputError(f"--workers: needs Ray, which cannot be imported ({error}); install it: {INSTALL}") from error
    return ray


@contextmanager
def _connected(ray, workers: Workers) -> Iterator[None]:
    """A connection to Ray: the caller's own where there is one, else one that ends with this call."""
    if ray.is_initialized():
        yield
        return
    # Only texts travel, so the shared memory that Ray takes by default (30 %) is left to the models.
    local = {"include_dashboard": False, "object_store_memory": 2**27} if workers.address == "local" else {}
    try:
        ray.init(address=workers.address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:300]
        raise InputError(
            f"--ray-address: no Ray cluster at {workers.address!r} ({why}); start one with `ray start --head`, or "
            "leave it out to use this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _cpus_each(ray, workers: Workers, shards: int) -> float:
    """CPUs of a worker; InputError where the workers need more than there is."""
    there, count = ray.cluster_resources(), min(workers.count, shards)
    cpus = workers.cpus
    if cpus is None:
        cpus = max(1, int(there.get("CPU", 0) // count))
    for option, name, each in (("--worker-cpus", "CPU", cpus), ("--worker-gpus", "GPU", workers.gpus)):
        if each * count > there.get(name, 0):
            raise InputError(
                f"--workers: {count} workers need {each * count:g} {name}s ({each:g} each), and Ray has "
                f"{there.get(name, 0):g}; lower --workers or {option}"
            )
    return cpus


def _absolute(path):
    """A worker's folder is not the caller's; names and images that are no paths stay as they are."""
    is_path = isinstance(path, str | os.PathLike) and os.path.exists(path)
    return os.path.abspath(path) if is_path else path


def _adapter_fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        try:
            digest.update((folder / name).read_bytes())
        except OSError as error:
            raise InputError(f"--adapter: {folder / name} cannot be read ({error.strerror})") from error
    return digest.hexdigest()
