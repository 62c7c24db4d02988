"""The most memory that a stretch of this process's work needs at a time.

On a GPU that is what torch's allocator had handed out. On a CPU it is the resident set: interpreter, libraries and
weights included, since what a machine must have is the sum. Memory that was freed may stay resident, so a measurement
means something only in a process that did nothing large before; every stage of an experiment has one of its own.
"""

import re
import resource
import sys
from pathlib import Path

import torch

_PROC = Path("/proc/self")


class PeakMemory:
    """Watches from its making on.

    Attributes:
        kind: what `bytes` counts, in words.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.kind = "CUDA allocator"
        else:
            self.kind = "resident set" if _forget_peak() else "resident set since the start, loading included"

    def bytes(self) -> int:
        """The peak so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = _resident_peak()
        if peak is not None:
            return peak
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def _forget_peak() -> bool:
    """Set the kernel's high-water mark back to what is resident now (Linux); False where that cannot be done."""
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return _resident_peak() is not None


def _resident_peak() -> int | None:
    try:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", (_PROC / "status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
