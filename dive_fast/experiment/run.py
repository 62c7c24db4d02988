"""The loop of an experiment: check everything, then one process after another until every piece is there."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dive_fast.errors import InputError
from dive_fast.experiment import worker
from dive_fast.experiment.inputs import load_experiment_data
from dive_fast.experiment.pieces import Folder
from dive_fast.experiment.plan import show_plan, words
from dive_fast.experiment.results import finished, write_results
from dive_fast.experiment.scoring import Scorer
from dive_fast.experiment.settings import Evaluation, ExperimentConfig, chosen
from dive_fast.experiment.systems import resolve
from dive_fast.report_assets.numbers import seconds


class ExperimentInterrupted(KeyboardInterrupt):
    """Ctrl-C; `saved_to` is the folder, in which the same command goes on."""

    def __init__(self, saved_to: Path):
        super().__init__(f"interrupted; {saved_to} holds what is finished")
        self.saved_to = saved_to


def run(config: ExperimentConfig, output: Path, *, only: str | None = None, dry_run: bool = False, command="") -> int:
    """Run what is not finished yet, and write the results of what is.

    Args:
        output: the experiment's folder; one that holds the same experiment is gone on with.
        only: "NAME,NAME": these systems alone; the results show every system that is finished.
        dry_run: check everything and say what there is to do; nothing is written.
        command: as the user gave it, for the results.

    Raises:
        InputError: a bad setting, missing data, packages or weights, an adapter that cannot be trained, a folder that
            holds another experiment: before the first step; a loss that is not finite, a full disk: when it happens.
        ExperimentInterrupted: after Ctrl-C, once the running step is finished and saved.
    """
    from rich.console import Console

    console = Console(highlight=False)
    systems, folder = resolve(config), Folder(output)
    names = chosen(only, systems)
    scorer = Scorer(Evaluation(**config.evaluation))
    data = load_experiment_data(config)
    folder.check(config, systems, data)
    tasks = list(folder.tasks([systems[name] for name in names], config))
    left = [task for task in tasks if not folder.done(task, systems)]
    if left or dry_run:
        with console.status("Checking model, adapters, prompts and metrics"):
            plan = _process(config, folder, {"systems": names})
        show_plan(console, config, [systems[name] for name in names], folder, data, plan)
    if dry_run:
        console.print(f"{len(left)} of {len(tasks)} pieces are still to be made. Nothing was run, nothing was written.")
        return 0
    folder.begin(config, systems, data)
    for number, task in enumerate(left, start=1):
        what, start = words(task, systems[task.system]), time.perf_counter()
        console.print(f"{number} of {len(left)}: {what}", markup=False)
        try:
            _process(config, folder, {"task": list(task)})
        except InputError as error:
            raise InputError(f"{what}: {error}") from error
        console.print(f"  {seconds(time.perf_counter() - start)}, loading included", style="dim", markup=False)
    write_results(console, finished(config, systems, folder, data), scorer, command)
    return 0


def _process(config: ExperimentConfig, folder: Folder, what: Mapping[str, Any]) -> dict:
    """One piece of work in a process of its own; returns its answer.

    Ctrl-C is handed on and waited for: the process finishes its step and saves. It is in a session of its own, so that
    the terminal does not send it a second one.
    """
    asked = json.dumps({"config": config.to_json(), "output": str(folder.root), **what})
    command = [sys.executable, "-m", worker.__name__]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        process.stdin.write(asked + "\n")
        process.stdin.flush()
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                process.send_signal(signal.SIGINT)
        answer = process.stdout.read().strip()
    finally:
        process.stdin.close()
        process.stdout.close()
    return _answer(code, answer, folder)


def _answer(code: int, text: str, folder: Folder) -> dict:
    answer = json.loads(text) if text else {}
    if code == 0:
        return answer
    if code == worker.EXIT_INPUT_ERROR and "error" in answer:
        raise InputError(answer["error"])
    if code in (worker.EXIT_INTERRUPTED, -signal.SIGINT):
        raise ExperimentInterrupted(folder.root)
    if code == -signal.SIGKILL:
        raise InputError(
            "a process of the experiment was killed from outside, which is how the system ends one that runs out of "
            "memory; give a smaller per_device_train_batch_size or generation.batch_size, then start the same command "
            "again, which goes on"
        )
    raise RuntimeError(f"a process of the experiment ended with exit code {code}; its traceback is above")
