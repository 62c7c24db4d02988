"""What each `dive-fast` command does. Heavy modules are imported by the command that needs them.

`dive_fast.train` and `dive_fast.evaluate` are functions of the package and modules of the same name, so the modules are
reached through importlib.
"""

import dataclasses
import importlib
import json
import sys
import typing
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from dive_fast import cli_files as files
from dive_fast.cli_data import load_counted
from dive_fast.errors import InputError

RUN_FILE, SETUP_FILE = "run.yaml", "dive_setup.json"


def train(args: Namespace) -> int:
    """Check everything, then train; the run's settings are stored beside the adapter before the first step."""
    from dive_fast import config

    if args.list_options:
        return _list_options()
    paths = [item for item in args.items if "=" not in item]
    if len(paths) > 1:
        raise InputError(f"train: expected one YAML file and key=value options, got the files {', '.join(paths)}")
    run = config.load_config(paths[0] if paths else None, [item for item in args.items if "=" in item])
    run.output = args.output or run.output
    output = _check_output(run.output)
    if run.eval_data is None and run.training.get("eval_strategy", "no") != "no":
        raise InputError("training.eval_strategy: evaluates on held-out records; give them as eval_data")
    classes = config.section_classes()
    steering = classes["steering"](**run.steering)
    supervision = classes["supervision"](**run.supervision)
    teacher = None if run.teacher is None else classes["teacher"](**run.teacher)
    training = _training_arguments(classes["training"], str(output), run.training)
    # torchrun and accelerate start one copy of this command per device.
    first = training.process_index == 0
    if first:
        _check_emptiness(output, args.resume)
    records = load_counted(run.data, quiet=not first)
    held_out = None if run.eval_data is None else load_counted(run.eval_data, quiet=not first)
    model, processor = _backbone(run.model, run.dtype)
    if first:
        print(f"Training on {len(records)} records of {run.data['name']} with {run.model}; all goes to {output}")
    with _recorded(run, output) if first else nullcontext():
        result = importlib.import_module("dive_fast.train").train(
            model,
            records,
            output,
            processor=processor,
            eval_dataset=held_out,
            steering=steering,
            supervision=supervision,
            teacher=teacher,
            args=training,
            resume=args.resume,
        )
    if first:
        for name, value in result.metrics.items():
            print(f"  {name}: {value:.6g}" if isinstance(value, float) else f"  {name}: {value}")
        print(f"The adapter is in {result.adapter_dir}. Write reports with it:")
        print(f"  dive-fast generate --adapter {result.adapter_dir} --data ... --output predictions.jsonl")
    _leave_process_group()
    return 0


def _leave_process_group() -> None:
    """Joins the threads that connect the processes of a run.

    With them alive a process was seen to abort at its exit, all work done ("terminate called without an active
    exception"): most likely one of them wanted the interpreter while that ended, and was stopped inside C++.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def _recorded(run, output: Path) -> Iterator[None]:
    """The run's settings in its folder from before the first step, and gone again if nothing else came there: who reads
    them later must not take them for those of what was there before."""
    file = output / RUN_FILE
    if file.exists():
        yield
        return
    existed = output.is_dir()
    before = set(output.iterdir()) if existed else set()
    try:
        with files.writing("output", output):
            output.mkdir(parents=True, exist_ok=True)
            file.write_text(run.resolved().to_yaml(), encoding="utf-8")
        yield
    except BaseException as stop:
        # A run that saved something needs its settings to go on; one that did not leaves nothing.
        saved = getattr(stop, "saved_to", None) is not None
        if not saved and output.is_dir() and set(output.iterdir()) <= before | {file}:
            file.unlink(missing_ok=True)
            if not existed:
                output.rmdir()
        raise


def _check_output(output: str | None) -> Path:
    if not output:
        raise InputError("output: expected the folder to write to; give --output DIR, or `output:` in the YAML file")
    path = Path(output)
    if path.exists() and not path.is_dir():
        raise InputError(f"output: expected a folder, {path} is a file; give another --output")
    files.check_place("output", path, path)
    return path


def _check_emptiness(path: Path, resume: bool) -> None:
    filled = path.is_dir() and any(path.iterdir())
    if filled and not resume:
        raise InputError(f"output: {path} is not empty; give another --output, or --resume to go on with its run")
    if resume and not any((path / name).is_file() for name in (RUN_FILE, SETUP_FILE)):
        raise InputError(f"output: nothing to resume from in {path}; leave out --resume, or name the folder of the run")


def _training_arguments(cls: type, output: str, options: Mapping):
    try:
        return cls(output_dir=output, **options)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {error}") from error


def _backbone(name: str, dtype: str | None):
    from dive_fast.models.backbone import load_backbone

    return load_backbone(name, dtype=dtype)


def _list_options() -> int:
    from dive_fast import config
    from dive_fast.config_values import expected

    for section, cls in config.section_classes().items():
        print(f"{section}: ({cls.__name__})")
        hints = typing.get_type_hints(cls)
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        for name, about in config.option_help(cls).items():
            default = "" if defaults[name] is dataclasses.MISSING else f", default {_plain(defaults[name])}"
            print(f"  {section}.{name}: {expected(hints[name])}{default}")
            if about:
                print(f"      {about}")
    return 0


def _plain(value) -> str:
    value = getattr(value, "value", value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def generate(args: Namespace) -> int:
    """Reports for a data set into a file, or for one prompt onto the terminal."""
    from dive_fast import config

    if args.data is None:
        if not args.prompt.strip():
            raise InputError("--prompt: expected what the report should be about, got only white space")
        if args.items or args.output or args.limit is not None or args.workers is not None:
            raise InputError(
                "--prompt: takes no data options, --limit, --output or --workers; use --data for a data set"
            )
        model, processor = _steered_model(args)
        return _generate_one(args, model, processor)
    if args.image:
        raise InputError("--image: belongs to --prompt; the records of --data name their own images")
    if not args.output:
        raise InputError("--output: expected a file for the predictions, such as --output predictions.jsonl")
    if args.batch_size < 1:
        raise InputError(f"--batch-size: expected a positive number, got {args.batch_size}")
    if args.seed is not None and args.seed < 0:
        raise InputError(f"--seed: expected a whole number >= 0, got {args.seed}")
    if args.workers is None and (useless := _of_workers(args)):
        raise InputError(f"{useless}: means nothing without --workers")
    output = files.new_file(args.output, args.overwrite, inputs=[args.data])
    limit = [] if args.limit is None else [f"limit={args.limit}"]
    records = load_counted(config.data_with_options(args.data, [*args.items, *limit]))
    if args.workers is not None:
        if args.device is not None:
            raise InputError("--device: workers take what --worker-gpus gives each of them; leave it out")
        count = _generate_by_workers(args, records, output)
    else:
        from dive_fast.predictions import predictions

        model, processor = _steered_model(args)
        options = _generation_options(args)
        rows = predictions(model, processor, records, batch_size=args.batch_size, options=options)
        total = len(records) * args.num_return_sequences
        count = files.write_rows(output, rows, total, overwrite=args.overwrite)
    choice = " --sample 0" if args.num_return_sequences > 1 else ""
    print(f"{count} predictions in {output}. Score them: dive-fast evaluate {output}{choice}")
    return 0


def _of_workers(args: Namespace) -> str:
    """The first option of workers that was given; "" without any."""
    given = {
        "--worker-cpus": args.worker_cpus is not None,
        "--worker-gpus": args.worker_gpus != 0,
        "--shard-size": args.shard_size is not None,
        "--ray-address": args.ray_address != "local",
    }
    return next((name for name, is_given in given.items() if is_given), "")


def _generate_by_workers(args: Namespace, records: Sequence, output: Path) -> int:
    from dive_fast.distributed import Workers, write_predictions

    def on_shard(done: int, total: int) -> None:
        end = "\r" if sys.stderr.isatty() and done < total else "\n"
        print(f"{done} of {total} shards", end=end, file=sys.stderr, flush=True)

    workers = Workers(args.workers, args.worker_cpus, args.worker_gpus, args.ray_address)
    name = args.model or _trained_on(args.adapter)
    return write_predictions(
        records,
        output,
        workers,
        model=name,
        adapter=args.adapter,
        dtype=args.dtype,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        options=_generation_options(args),
        on_shard=on_shard,
    )


def _steered_model(args: Namespace):
    from dive_fast.devices import on_device, placement

    name = args.model or _trained_on(args.adapter)
    device = placement(args.device)
    model, processor = _backbone(name, args.dtype)
    model = on_device(model, device)
    if args.adapter:
        from dive_fast import load

        model = load(model, args.adapter)
    return model, processor


def _trained_on(adapter: str | None) -> str:
    from dive_fast import config

    if adapter is None:
        raise InputError("--model: expected a model, such as --model smollm2, or --adapter DIR of a trained one")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise InputError(
            f"--adapter: no adapter in {adapter} (no adapter_config.json); name the folder of a finished run"
        )
    for folder in (Path(adapter), Path(adapter).parent):
        if (folder / RUN_FILE).is_file():
            return config.load_config(folder / RUN_FILE).model
    raise InputError(f"--model: {adapter} does not say what it was trained on (no {RUN_FILE}); add --model")


def _generation_options(args: Namespace) -> dict:
    choice = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    search = ("num_beams", "length_penalty", "num_return_sequences", "stop")
    names = ("max_new_tokens", "min_new_tokens", *choice, *search, "engine", "weights")
    return {name: getattr(args, name) for name in names}


def _generate_one(args: Namespace, model, processor) -> int:
    from transformers import TextStreamer

    from dive_fast import generate as write
    from dive_fast.data import Record

    record = Record(id="prompt", prompt=args.prompt, report="", images=tuple(args.image))
    streamer = None
    # What is not yet chosen, or may be cut off again, cannot be shown as it grows.
    if args.num_beams == args.num_return_sequences == 1 and not args.stop:
        streamer = TextStreamer(getattr(processor, "tokenizer", processor), skip_prompt=True, skip_special_tokens=True)
    output = write(model, [record], processor=processor, streamer=streamer, **_generation_options(args))
    if streamer is None:
        print("\n\n".join(output.texts))
    if output.finish_reasons[0] == "length":
        print(f"(cut off after {args.max_new_tokens} tokens; --max-new-tokens allows more)", file=sys.stderr)
    return 0


def evaluate(args: Namespace) -> int:
    """Scores of one system with intervals, or of two with their paired differences."""
    if args.output:
        options = [item for item in args.metric_options if "=" not in item]
        inputs = [args.predictions, args.references, args.against, args.lexicon, *options]
        files.check_file("--output", args.output, inputs)
    rows = files.read_predictions(args.predictions, args.references, args.sample)
    others = None
    if args.against:
        others = files.read_predictions(args.against, args.references, args.sample)
        others = files.in_order_of(rows, others, args.against)
    tagger = None
    if args.lexicon:
        from dive_fast.supervision.lexicon import LexiconTagger

        tagger = LexiconTagger(args.lexicon)
    scores = _scores(args, rows, tagger)
    if others is None:
        payload = scores.to_json()
        table = _score_table(args.predictions, scores)
    else:
        other = _scores(args, others, tagger)
        differences = _differences(args, scores, other)
        payload = {"a": scores.to_json(), "b": other.to_json(), "a_minus_b": differences}
        table = _difference_table(args, scores, other, differences)
    # The file first: whoever reads the table may leave before its end.
    if args.output:
        files.write_text(args.output, json.dumps(payload, indent=1))
    files.show_table(table)
    if args.output:
        print(f"All scores in {args.output}")
    return 0


def _scores(args: Namespace, rows: Sequence[Mapping], tagger):
    module = importlib.import_module("dive_fast.evaluate")
    reasons = [row.get("finish_reason") for row in rows]
    options = {"metrics": tuple(args.metrics)} if args.metrics else {}
    return module.evaluate(
        [row["prediction"] for row in rows],
        [row["reference"] for row in rows],
        protocol=args.protocol,
        bootstrap=args.bootstrap,
        seed=args.seed,
        tagger=tagger,
        finish_reasons=None if None in reasons else reasons,
        ids=[row["id"] for row in rows],
        metric_options=importlib.import_module("dive_fast.config").load_metric_options(args.metric_options),
        **options,
    )


def _differences(args: Namespace, a, b) -> dict:
    module = importlib.import_module("dive_fast.evaluate")
    found = {}
    for name in a:
        if name in b:
            difference, interval = module.paired_difference(a, b, name, bootstrap=args.bootstrap, seed=args.seed)
            found[name] = {"difference": difference, "interval": interval}
    return found


def _interval(interval: Sequence[float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}"


def _score_table(name: str, scores):
    title = f"{name}: {scores.n} reports, protocol {scores.protocol['name']}"
    table = files.table(title, "Score", "Value", "95 % interval")
    for key, value in scores.items():
        table.add_row(key, f"{value:.4f}", _interval(scores.intervals.get(key)))
    return table


def _difference_table(args: Namespace, a, b, differences: Mapping):
    title = f"A = {args.predictions}, B = {args.against}: the same {a.n} reports, protocol {a.protocol['name']}"
    table = files.table(title, "Score", "A", "B", "A − B", "95 % paired interval", "")
    for key, found in differences.items():
        interval = found["interval"]
        # As shown: a smoothing residue of 1e-9 is no difference.
        clear = interval is not None and (round(interval[0], 4) > 0 or round(interval[1], 4) < 0)
        cells = (f"{a[key]:.4f}", f"{b[key]:.4f}", f"{found['difference']:+.4f}", _interval(interval))
        table.add_row(key, *cells, "leaves out 0" if clear else "", style="bold" if clear else "")
    return table


def tag(args: Namespace) -> int:
    """A report with its decisive words coloured; with a model, its tokens and what they weigh in the loss."""
    from rich.console import Console

    from dive_fast.supervision.lexicon import LexiconTagger
    from dive_fast.supervision.show import render

    if not args.model and (args.pathology_weight is not None or args.eos_weight is not None):
        raise InputError("--pathology-weight, --eos-weight: they weigh a model's tokens; add --model, such as smollm2")
    text = files.report_text(args.text, args.file)
    spans = LexiconTagger(args.lexicon)(text)
    console = Console(highlight=False)
    if not args.model:
        console.print(render(text, spans))
        return 0
    from dive_fast.data.encoding import ReportEncoder

    _, processor = _backbone(args.model, None)
    response = ReportEncoder(processor).response(text)
    shares = _loss_shares(args, response.offsets, spans)
    console.print(render(text, spans, tokens=(response.ids, response.offsets)))
    print(f"\n{shares}")
    return 0


def _loss_shares(args: Namespace, offsets: Sequence[tuple[int, int]], spans: Sequence) -> str:
    from dive_fast.supervision import Supervision
    from dive_fast.supervision.weights import decisive_mask, token_weights

    given = {"pathology_weight": args.pathology_weight, "eos_weight": args.eos_weight}
    settings = Supervision(**{name: value for name, value in given.items() if value is not None})
    chosen = {name: getattr(settings, name) for name in given}
    weights, mask = token_weights(offsets, spans, **chosen), decisive_mask(offsets, spans)
    decisive = sum(weight for weight, inside in zip(weights, mask, strict=False) if inside)
    return (
        f"In the loss a decisive token weighs {1 + settings.pathology_weight:g}, the end of the report "
        f"{1 + settings.eos_weight:g}, any other token 1.\nDecisive tokens carry {decisive / sum(weights):.0%} of the "
        f"weight ({sum(mask) / len(weights):.0%} of the tokens), the end {weights[-1] / sum(weights):.0%}."
    )


def demo(args: Namespace) -> int:
    """The comparison on real reports."""
    from dive_fast.demo import main

    options = ("quick", "steps", "eval_reports", "seed", "dtype")
    return main(args.output, **{name: getattr(args, name) for name in options})


def report(args: Namespace) -> int:
    """A result file as a page."""
    from dive_fast.report import write_report

    files.check_file("--output", args.output, [args.result], devices=True)
    result = files.read_json(args.result)
    with files.writing("--output", Path(args.output)):
        page = write_report(result, args.output)
    print(f"The page is {page}")
    return 0


def doctor(args: Namespace) -> int:
    """What is built and usable."""
    from dive_fast.doctor import main

    return main(json=args.json, probe=args.probe)
