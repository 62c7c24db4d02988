"""The `dive-fast` command. Only the parser lives here, so that --help answers at once; the work is in `cli_commands`.

Exit codes: 0 success (also where the reader of the output has left), 1 a bug (with its traceback), a failed `doctor`,
or a `bench` that failed or found something slower, 2 wrong input (the message alone; also a path that may not be used
and a full disk), 130 Ctrl-C.
"""

import argparse
import errno
import importlib
import sys
import warnings
from collections.abc import Sequence

from dive_fast.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `dive-fast` with `argv` (default: the process's arguments) and return its exit code."""
    # A pipe's encoding follows the locale, and reports hold characters that ASCII cannot write.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # Libraries warn each other of what they will remove; whoever runs a command can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|torch")
    args = None
    try:
        try:
            args = parse(argv)
            code = args.run(args)
        except SystemExit as stop:
            # argparse has shown the help or what is wrong; rich leaves with 1 where the reader of its output has gone.
            code = 0 if isinstance(stop.__context__, BrokenPipeError) else stop.code or 0
        if sys.stdout is not None:
            sys.stdout.flush()  # what cannot be written is to be said here, not by the interpreter as it exits
        return code
    except InputError as error:
        print(f"dive-fast: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(f"dive-fast: {why}; mend its permissions or name another path", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(_interrupted(stop, getattr(args, "goes_on", None)), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader (head, less) has gone; what is left in the buffer must not raise again at exit.
        sys.stdout = None
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        sys.stdout = None
        where = error.filename or "the output"
        print(f"dive-fast: {where}: {error.strerror}; free disk space or write to another place", file=sys.stderr)
        return 2


def _interrupted(stop: KeyboardInterrupt, goes_on: str | None) -> str:
    saved = getattr(stop, "saved_to", None)
    message = "\ndive-fast: interrupted"
    if saved is None:
        return message
    return f"{message}; saved to {saved}" + (f", {goes_on} goes on from there" if goes_on else "")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments of the command; key=value items may stand anywhere among the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        if not hasattr(args, "items") or any(item.startswith("-") for item in rest):
            args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.items = [*args.items, *rest]
    return args


def _command(name: str, module: str = "dive_fast.cli_commands"):
    """The function that runs a command; its module is imported when it is called."""

    def run(args: argparse.Namespace) -> int:
        return getattr(importlib.import_module(module), name)(args)

    return run


class _Version(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        from dive_fast import __version__

        print(f"dive-fast {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="dive-fast",
        description="Steering adapters for frozen vision-language models: train them, write reports, score them.",
        epilog=(
            "First steps:\n"
            "  dive-fast doctor                 what is installed and usable on this machine\n"
            "  dive-fast demo --quick           train and compare adapters on real reports, writes a page to look at\n"
            '  dive-fast tag "No effusion."     which words of a report carry the diagnosis\n'
            "\n`dive-fast COMMAND --help` explains a command with examples."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", nargs=0, action=_Version, help="show the version and leave")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_data, _train, _generate, _evaluate, _experiment, _tag, _demo, _report, _bench, _doctor):
        add(commands)
    return parser


def _add(commands, name: str, summary: str, description: str, examples: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"Examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_command(name), parser=parser)
    return parser


def _data(commands) -> None:
    about = "look at a data set before anything is trained on it"
    examples = "  dive-fast data inspect open_i\n  dive-fast data inspect --help"
    actions = _add(commands, "data", about, about.capitalize() + ".", examples).add_subparsers(
        title="actions", metavar="ACTION", required=True
    )
    parser = _add(
        actions,
        "inspect",
        "show a data set's counts, lengths, decisive words, samples and leaks",
        "Show what a data set holds: records and what was left out and why, lengths, how often each class of\n"
        "decisive words occurs, some samples, and what leaks between its parts: the same patient, report or image.",
        "  dive-fast data inspect open_i --tokenizer smollm2\n"
        "  dive-fast data inspect mimic_cxr --root /data/mimic-cxr-jpg reports_root=/data/mimic-cxr target=impression\n"
        "  dive-fast data inspect chexpert_plus --root /data/chexpert_plus skip_missing_images=true --json\n"
        "  dive-fast data inspect train.jsonl --against test.jsonl",
    )
    parser.set_defaults(run=_command("inspect_command", "dive_fast.cli_data"))
    parser.add_argument("data", metavar="NAME | FILE", help="a data set's name, or a .jsonl, .json or .csv file")
    parser.add_argument("items", nargs="*", metavar="key=value", help="further options of the data set")
    parser.add_argument("--root", metavar="DIR", help="the data set's folder")
    parser.add_argument("--split", metavar="PART", help="only this part; default: all, to see leaks between them")
    parser.add_argument("--against", metavar="NAME | FILE", help="held-out data whose parts to compare with, for leaks")
    parser.add_argument("--tokenizer", "--model", metavar="M", help="count tokens: smollm2, a folder or a hub id")
    parser.add_argument("--lexicon", metavar="YAML", help="another lexicon; default: chest findings")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument(
        "--sample", type=int, default=2000, metavar="N", help="records per part to measure (default 2000)"
    )
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="records per part to show (default 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the drawing (default 0)")
    parser.add_argument("--json", action="store_true", help="machine-readable")


def _train(commands) -> None:
    parser = _add(
        commands,
        "train",
        "train a steering adapter",
        "Train a steering adapter for a frozen model. A run is described by a YAML file, by key=value\n"
        "options, or by both (options win). Sections: model, dtype, data, eval_data, steering (DiveConfig),\n"
        "supervision (Supervision), teacher (Teacher), training (DiveTrainingArguments, which has every\n"
        "option of transformers.TrainingArguments), output. Relative paths start from the current directory.",
        "  dive-fast train configs/open_i_smollm2.yaml\n"
        "  dive-fast train configs/open_i_smollm2.yaml steering.r=32 supervision.eos_weight=2 --output runs/r32\n"
        "  dive-fast train model=smollm2 data=open_i training.max_steps=100 --output runs/first\n"
        "  dive-fast train data=my_reports.jsonl teacher.shots=8 training.learning_rate=1e-3 --output runs/mine\n"
        "  dive-fast train configs/open_i_smollm2.yaml --output runs/first --resume",
    )
    parser.add_argument("items", nargs="*", metavar="CONFIG.yaml | key=value", help="a YAML file and options")
    parser.add_argument("--output", metavar="DIR", help="new folder for adapter, checkpoints and settings")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--list-options", action="store_true", help="show every option with its type and default")
    parser.set_defaults(goes_on="the same command with --resume")


def _generate(commands) -> None:
    parser = _add(
        commands,
        "generate",
        "write reports with a model and an adapter",
        "Write reports: for every record of a data set into a JSON-lines file (id, prompt, prediction,\n"
        "reference, finish_reason, engine), or for one prompt onto the terminal as it is written.",
        "  dive-fast generate --adapter runs/first --data open_i split=test --limit 100 --output predictions.jsonl\n"
        "  dive-fast generate --model smollm2 --data my_reports.jsonl --output zero_shot.jsonl\n"
        "  dive-fast generate --adapter runs/first --data mimic_cxr split=test --workers 8 --worker-gpus 1 \\\n"
        "      --output predictions.jsonl\n"
        '  dive-fast generate --adapter runs/first --prompt "Indication: cough. Describe the findings."\n'
        '  dive-fast generate --model my/vlm --prompt "Describe the findings." --image film.png',
    )
    parser.add_argument("items", nargs="*", metavar="key=value", help="options of the data set, such as split=test")
    parser.add_argument("--model", metavar="M", help="short name, hub id or folder; default: the adapter's own")
    parser.add_argument("--adapter", metavar="DIR", help="a trained adapter; without it the model itself writes")
    parser.add_argument("--dtype", help="of the weights: float32, bfloat16 or float16; default: as in a training file")
    about = "such as cpu or cuda:1; auto: as many GPUs as the model takes (default: a GPU where there is one)"
    parser.add_argument("--device", help=about)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", metavar="NAME | FILE", help="a data set's name, or a .jsonl, .json or .csv file")
    what.add_argument("--prompt", metavar="TEXT", help="one prompt; its report is printed as it is written")
    parser.add_argument("--image", metavar="FILE", nargs="+", default=[], help="images that --prompt speaks of")
    parser.add_argument("--output", metavar="FILE", help="where --data's predictions go (.jsonl)")
    parser.add_argument("--overwrite", action="store_true", help="replace --output where it exists")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N records")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="reports written at a time (default 8)")
    workers = parser.add_argument_group("many GPUs or machines (needs the extra `ray`: pip install 'dive_fast[ray]')")
    workers.add_argument("--workers", type=int, metavar="N", help="workers that write --data's reports, shard by shard")
    workers.add_argument("--worker-cpus", type=float, metavar="C", help="of each worker (default: an equal share)")
    workers.add_argument("--worker-gpus", type=float, default=0, metavar="G", help="of each; 0.5: two on a GPU")
    workers.add_argument("--shard-size", type=int, metavar="N", help="records kept at a time (default 8 batches)")
    workers.add_argument(
        "--ray-address", default="local", metavar="A", help="a running cluster: auto or HOST:PORT (default: local)"
    )
    sampling = parser.add_argument_group("how tokens are chosen (default: the most likely one)")
    sampling.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest report (default 256)")
    sampling.add_argument("--min-new-tokens", type=int, default=0, metavar="N", help="no end before N tokens")
    sampling.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    sampling.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K likeliest; 0 is all")
    sampling.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that sum to P")
    sampling.add_argument(
        "--min-p", type=float, default=0.0, metavar="P", help="draw from those P times as likely as the top"
    )
    sampling.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is none (default)")
    sampling.add_argument("--seed", type=int, metavar="S", help="of the draw")
    sampling.add_argument(
        "--num-beams", type=int, default=1, metavar="N", help="search with N beams, 2 to 8, instead of drawing"
    )
    sampling.add_argument(
        "--length-penalty", type=float, default=1.0, metavar="L", help="beams rank by log-probability / length^L"
    )
    sampling.add_argument(
        "--num-return-sequences", type=int, default=1, metavar="N", help="reports per prompt: samples or best beams"
    )
    sampling.add_argument(
        "--stop", nargs="+", default=[], metavar="TEXT", help="a report ends in front of any of these"
    )
    sampling.add_argument("--weights", choices=("int8",), help="8-bit weights: faster, a little less precise")
    sampling.add_argument("--engine", choices=("native", "transformers"), help="default: native where it applies")


def _evaluate(commands) -> None:
    parser = _add(
        commands,
        "evaluate",
        "score predictions against references",
        "Score predicted reports with 95 % bootstrap intervals, or compare two systems on the same reports.\n"
        "PREDICTIONS is a JSON-lines file with `prediction`, and `reference` unless --references is given.\n"
        "Where every line has a `finish_reason`, eos_rate is the share that ended by itself (eos or stop).",
        "  dive-fast evaluate predictions.jsonl\n"
        "  dive-fast evaluate predictions.jsonl --metrics bleu rouge_l --bootstrap 5000 --output scores.json\n"
        "  dive-fast evaluate predictions.jsonl --references reports.jsonl\n"
        "  dive-fast evaluate predictions.jsonl --metrics radgraph chexbert \\\n"
        "      --metric-options radgraph.weights=weights/ chexbert.weights=weights/chexbert.pth\n"
        "  dive-fast evaluate steered.jsonl --against zero_shot.jsonl\n"
        "  dive-fast evaluate samples.jsonl --sample 0",
    )
    parser.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="as `dive-fast generate` writes them")
    parser.add_argument("--references", metavar="FILE", help=".jsonl with id and reference (or report), joined by id")
    parser.add_argument("--against", metavar="B.jsonl", help="a second system: differences with paired intervals")
    parser.add_argument(
        "--sample", type=int, metavar="N", help="score this one of each report's `sample`s (0 is the first or best)"
    )
    names = "bleu rouge_l cider meteor decisive radgraph chexbert length termination"
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=names)
    parser.add_argument(
        "--metric-options",
        nargs="+",
        default=[],
        metavar="FILE.yaml | METRIC.OPTION=VALUE",
        help="radgraph: weights, model_type, cache, device, batch_size; "
        "chexbert: weights, tokenizer, uncertain, device, batch_size",
    )
    parser.add_argument("--protocol", default="r2gen", help="raw, lower, ptb, r2gen (default) or r2gen_mimic")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="N", help="resamples (default 1000; 0: none)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the resampling (default 0)")
    parser.add_argument("--lexicon", metavar="YAML", help="lexicon of the decisive metric; default: chest findings")
    parser.add_argument("--output", metavar="FILE", help="write all scores as JSON")


def _experiment(commands) -> None:
    parser = _add(
        commands,
        "experiment",
        "compare systems on one model, data, seeds and steps",
        "Run a comparison that a YAML file describes: the model alone, with demonstrations, and with adapters trained\n"
        "by different recipes, on the same frozen model, data, seeds and steps. Every piece (a training, a set of\n"
        "written reports) is a process and a file of its own; the same command goes on where it was stopped. Writes\n"
        "results.json, table.md, table.tex and report.html: means over seeds, intervals over documents and seeds,\n"
        "paired differences, costs. Sections: title, model, dtype, data (trained on), validation, test, licence,\n"
        "seeds, training, supervision and teacher (shared), generation, evaluation, systems, compare_with, output;\n"
        "those of a system: kind (zero_shot, few_shot, steering, lora) or like, label, description, and its own\n"
        "steering, lora, supervision, teacher, training.",
        "  dive-fast experiment configs/experiments/open_i_smollm2.yaml --dry-run\n"
        "  dive-fast experiment configs/experiments/open_i_smollm2.yaml\n"
        "  dive-fast experiment configs/experiments/open_i_smollm2.yaml --only dive,lora --output runs/two\n"
        "  dive-fast experiment configs/experiments/open_i_smollm2.yaml training.max_steps=3 test.limit=6 \\\n"
        "      'seeds=[0, 1]' systems.dive.steering.r=32 --output runs/quick\n"
        "  dive-fast experiment configs/experiments/mimic_cxr_llava_med.yaml data.root=/data/mimic-cxr-jpg \\\n"
        "      test.root=/data/mimic-cxr-jpg --output runs/mimic",
    )
    parser.set_defaults(run=_command("experiment", "dive_fast.cli_experiment"), goes_on="the same command")
    parser.add_argument("config", metavar="CONFIG.yaml", help="the experiment")
    parser.add_argument("items", nargs="*", metavar="key=value", help="values in place of the file's")
    parser.add_argument("--output", metavar="DIR", help="folder of the experiment; one that holds it is gone on with")
    parser.add_argument("--only", metavar="NAME[,NAME]", help="run these systems alone")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the plan, write nothing")


def _tag(commands) -> None:
    parser = _add(
        commands,
        "tag",
        "show a report's decisive tokens",
        "Show which words of a report carry the diagnosis, coloured by what is said of the finding\n"
        "(present, absent, uncertain), and with --model the tokens and the weights that training gives them.",
        '  dive-fast tag "Small left effusion. No pneumothorax."\n'
        "  dive-fast tag --file report.txt --model smollm2\n"
        "  cat report.txt | dive-fast tag --lexicon my_lexicon.yaml",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("text", nargs="?", metavar="TEXT", help="the report; without it standard input is read")
    source.add_argument("--file", metavar="FILE", help="a text file with the report")
    parser.add_argument("--lexicon", metavar="YAML", help="another lexicon; default: chest findings")
    parser.add_argument("--model", metavar="M", help="show this model's tokens and their training weights")
    parser.add_argument("--pathology-weight", type=float, metavar="W", help="weight added on decisive tokens")
    parser.add_argument("--eos-weight", type=float, metavar="W", help="weight added on the end of the report")


def _demo(commands) -> None:
    parser = _add(
        commands,
        "demo",
        "train and compare adapters on real reports, and write a page",
        "Train steering adapters on the Open-i reports with a small frozen model, compare them with the\n"
        "model alone and with demonstrations in its context, and write the result as a page.",
        "  dive-fast demo --quick\n  dive-fast demo --output demo-200 --steps 200 --eval-reports 100 --seed 1",
    )
    parser.add_argument("--output", default="demo-output", metavar="DIR", help="folder (default demo-output)")
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of the full comparison")
    parser.add_argument("--steps", type=int, metavar="N", help="training steps of each adapter")
    parser.add_argument("--eval-reports", type=int, metavar="N", help="held-out reports to score")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of data order and weights (default 0)")
    parser.add_argument(
        "--dtype", help="of the weights: float32, bfloat16 or float16; default: bfloat16 where the hardware has it"
    )


def _report(commands) -> None:
    parser = _add(
        commands,
        "report",
        "render a result as an HTML page",
        "Render a result file, such as the demo's result.json, as one self-contained HTML page.",
        "  dive-fast report demo-output/result.json --output report.html",
    )
    parser.add_argument("result", metavar="RESULT.json")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the page (default report.html)")


def _bench(commands) -> None:
    parser = _add(
        commands,
        "bench",
        "measure, compare and picture this project's speed beside its peers",
        "Run the benchmark suite of a checkout, or use what it wrote: results as a page with plots and tables, two\n"
        "results compared (exit status 1 if something became slower), or a README's tables filled from results.",
        "  dive-fast bench --scale smoke --output smoke.json\n"
        "  dive-fast bench --scale laptop -k decode --output decode.json\n"
        "  dive-fast bench --report decode.json loss.json --output bench-report\n"
        "  dive-fast bench --compare before.json after.json\n"
        "  dive-fast bench --readme README.md benchmarks/RESULTS.md --check",
    )
    parser.set_defaults(run=_command("bench", "dive_fast.cli_bench"))
    scales = ("smoke", "laptop", "gpu")
    parser.add_argument("--scale", choices=scales, help="default: gpu where there is CUDA, else laptop")
    parser.add_argument("-k", dest="chosen", metavar="EXPR", help="only these benchmarks, as pytest's -k")
    use = parser.add_mutually_exclusive_group()
    use.add_argument("--report", nargs="+", metavar="FILE", help="make a page of results files")
    use.add_argument("--compare", nargs=2, metavar=("A", "B"), help="what changed from A to B")
    use.add_argument(
        "--readme", nargs="+", metavar="FILE", help="fill Markdown files' tables from the results they name"
    )
    parser.add_argument("--check", action="store_true", help="with --readme: change nothing, exit 1 if it differs")
    parser.add_argument(
        "--output", metavar="PATH", help="results file (bench-results.json), or folder of --report (bench-report)"
    )


def _doctor(commands) -> None:
    parser = _add(
        commands,
        "doctor",
        "show what is built and usable here",
        "Show the compiled extension, CUDA, instruction sets, Triton, Java, optional packages and versions.",
        "  dive-fast doctor\n  dive-fast doctor --json",
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    parser.add_argument("--probe", action="store_true", help="also run a small computation on each device")


if __name__ == "__main__":
    sys.exit(main())
