"""Runs the CUDA compiler and keeps what it says of each kernel's registers and stack beside the object file.

    python keep_resource_usage.py nvcc ... -o x.cu.o ...        leaves x.cu.o.resources

tests/test_cuda_resources.py holds those figures to limits.
"""

import re
import subprocess
import sys
from pathlib import Path

OF_KERNELS = re.compile(r"ptxas info|\s+\d+ bytes stack frame")


def main(command: list[str]) -> int:
    done = subprocess.run([*command, "--resource-usage"], stderr=subprocess.PIPE, text=True)
    lines = done.stderr.splitlines()
    for line in lines:
        if done.returncode or not OF_KERNELS.match(line):
            print(line, file=sys.stderr)
    if done.returncode == 0 and "-o" in command:
        kept = "".join(line + "\n" for line in lines if OF_KERNELS.match(line))
        Path(command[command.index("-o") + 1] + ".resources").write_text(kept)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
