"""Training by several processes, and what is left of one that was killed, interrupted or ran out of disk."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

import dive_fast
from dive_fast import checkpoints
from dive_fast.errors import InputError
from dive_fast.models.tiny import tiny_llama
from tests.training_runs import adapter_bytes, run

WORKER = textwrap.dedent(
    """
    import sys; sys.path.insert(0, {tests!r})
    import dive_fast
    import torch.distributed as dist
    from pathlib import Path
    from training_runs import RECORDS, REPORTS, run
    args = {{"per_device_train_batch_size": int(sys.argv[2])}} | REPORTS
    run(Path(sys.argv[1]), args=args, teacher=dive_fast.Teacher(shots=2), eval_dataset=RECORDS[:5])
    if dist.is_initialized():
        dist.destroy_process_group()
    """
)


def worker_script(tmp_path) -> Path:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(tests=str(Path(__file__).parent)))
    return script


def losses_stored(folder: Path):
    history = json.loads((folder / "run" / "dive_result.json").read_text())["history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def scores_stored(folder: Path):
    metrics = json.loads((folder / "run" / "dive_result.json").read_text())["metrics"]
    return [metrics[f"eval_{name}"] for name in ("rouge_l", "decisive_f1", "terminated")]


def test_two_processes_give_the_loss_trace_of_one(tmp_path):
    script = worker_script(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = subprocess.run([sys.executable, script, tmp_path / "one", "4"], capture_output=True, text=True)
    assert one.returncode == 0, one.stderr[-2000:]
    two = subprocess.run([*torchrun, script, tmp_path / "two", "2"], capture_output=True, text=True)
    assert two.returncode == 0, two.stderr[-2000:]
    torch.testing.assert_close(losses_stored(tmp_path / "two"), losses_stored(tmp_path / "one"), atol=2e-5, rtol=1e-5)
    assert scores_stored(tmp_path / "two") == scores_stored(tmp_path / "one")


KILLED = textwrap.dedent(
    """
    import sys; sys.path.insert(0, {tests!r})
    import dive_fast
    from pathlib import Path
    from training_runs import run
    args = {{"max_steps": 40, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}}
    run(Path(sys.argv[1]), args=args, resume=True, teacher=dive_fast.Teacher(shots=2))
    """
)


def test_kill_and_resume_gives_the_uninterrupted_adapter_to_the_bit(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent)))
    kills = 0
    for step in (7, 22):
        process = subprocess.Popen(
            [sys.executable, script, tmp_path / "cut"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            reached = [int(p.name.split("-")[1]) for p in checkpoints.checkpoints(tmp_path / "cut" / "run")]
            if max(reached, default=0) >= step:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.01)
        process.wait()
    assert kills == 2
    assert not (tmp_path / "cut" / "run" / "adapter_model.safetensors").exists()
    for folder in ("cut", "whole"):
        subprocess.run([sys.executable, script, tmp_path / folder], check=True, capture_output=True)
    assert adapter_bytes(tmp_path / "cut" / "run") == adapter_bytes(tmp_path / "whole" / "run")


def test_a_run_cut_off_after_its_last_step_takes_no_step_more(tmp_path):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    result = run(tmp_path, args=args)
    before = adapter_bytes(result.adapter_dir)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (result.adapter_dir / name).unlink()
    again = run(tmp_path, args=args, resume=True)
    assert adapter_bytes(again.adapter_dir) == before


def test_ctrl_c_saves_and_says_where(tmp_path):
    script = tmp_path / "interrupted.py"
    script.write_text(
        KILLED.format(tests=str(Path(__file__).parent))
        .replace('"save_steps": 3', '"save_steps": 1000')
        .replace('"max_steps": 40', '"max_steps": 4000')
        .replace("run(Path", "print('READY', flush=True); run(Path")
    )
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "cut"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    saved = checkpoints.newest_complete(tmp_path / "cut" / "run")
    assert process.returncode != 0 and saved is not None
    assert f"interrupted; saved to {saved}" in errors


def test_a_second_ctrl_c_names_the_last_checkpoint_and_leaves_no_half(tmp_path, monkeypatch):
    real = checkpoints.write_manifest

    def interrupted(folder):
        if folder.name == "checkpoint-4":
            raise KeyboardInterrupt
        real(folder)

    monkeypatch.setattr(checkpoints, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt, match="saved to .*checkpoint-2") as stop:
        run(tmp_path, args={"save_strategy": "steps", "save_steps": 2})
    assert stop.value.saved_to == tmp_path / "run" / "checkpoint-2"
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_a_checkpoint_cut_short_is_passed_over(tmp_path):
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
    run(tmp_path, args=args)
    folder = tmp_path / "run"
    assert checkpoints.newest_complete(folder).name == "checkpoint-6"
    file = folder / "checkpoint-6" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert checkpoints.newest_complete(folder).name == "checkpoint-4"
    (folder / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    assert checkpoints.newest_complete(folder).name == "checkpoint-2"
    with pytest.raises(InputError, match="cut short"):
        dive_fast.load(tiny_llama(), folder / "checkpoint-6")


def test_resume_says_which_checkpoint_it_passes_over(tmp_path, caplog):
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = adapter_bytes(run(tmp_path, args=args).adapter_dir)
    (tmp_path / "run" / "checkpoint-4" / checkpoints.MANIFEST).unlink()
    assert adapter_bytes(run(tmp_path, args=args, resume=True).adapter_dir) == whole
    assert "checkpoint-4 is cut short" in caplog.text and "checkpoint-2" not in caplog.text


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    from dive_fast import trainer

    real = trainer.checkpoints.write_manifest

    def full(folder):
        if folder.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(folder)

    monkeypatch.setattr(trainer.checkpoints, "write_manifest", full)
    with pytest.raises(InputError, match=r"No space left.*last whole checkpoint is .*checkpoint-2"):
        run(tmp_path, args={"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1})
    assert [p.name for p in checkpoints.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert checkpoints.is_complete(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize("step", ["save_adapter", "write_json"])
def test_a_full_disk_at_the_end_names_the_checkpoint(tmp_path, monkeypatch, step):
    def full(target, *rest):
        raise OSError(28, "No space left on device")

    args = {"save_strategy": "steps", "save_steps": 2}
    run(tmp_path / "a", args=args)
    monkeypatch.setattr(checkpoints, step, full)
    kept = "" if step == "write_json" else r".*checkpoint-4 is whole"
    with pytest.raises(InputError, match=rf"output_dir: .*No space left{kept}.*free disk space"):
        run(tmp_path / "b", args=args)
    assert (tmp_path / "b" / "run").exists() == (step == "save_adapter")
    assert not list((tmp_path / "b").rglob("run/adapter_model*"))
