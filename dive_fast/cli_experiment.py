"""`dive-fast experiment`: what the command line adds to `dive_fast.experiment.run`."""

import shlex
from argparse import Namespace
from pathlib import Path

from dive_fast import cli_files as files
from dive_fast.errors import InputError


def experiment(args: Namespace) -> int:
    """Check, run what is left, and write the results."""
    from dive_fast.experiment.run import run
    from dive_fast.experiment.settings import load_experiment

    wrong = next((item for item in args.items if "=" not in item), None)
    if wrong is not None:
        raise InputError(f"experiment: expected one YAML file and key=value options, got {wrong!r} as well")
    config = load_experiment(args.config, args.items)
    output = args.output or config.output
    if not output:
        raise InputError("output: expected the folder to write to; give --output DIR, or `output:` in the YAML file")
    place = Path(output)
    if place.exists() and not place.is_dir():
        raise InputError(f"output: expected a folder, {place} is a file; give another --output")
    files.check_place("output", place, place)
    only = [] if args.only is None else ["--only", args.only]
    command = shlex.join(["dive-fast", "experiment", args.config, *args.items, "--output", output, *only])
    return run(config, place, only=args.only, dry_run=args.dry_run, command=command)
