"""Steering adapters for frozen vision-language models: train them, decode with them, measure both.

Names are imported on first use, so `import dive_fast` and `dive-fast --help` are quick. PEFT learns the method the
moment it is imported itself: `import dive_fast, peft` is all that `peft.PeftModel.from_pretrained` needs.
"""

import importlib
import sys
from types import ModuleType

from dive_fast.lazy import run_after_import

__version__ = "0.1.0"

_HOME = {
    "DiveConfig": "dive_fast.steering",
    "DiveTrainingArguments": "dive_fast.train",
    "GenerateOutput": "dive_fast.decode",
    "InputError": "dive_fast.errors",
    "PrefixCache": "dive_fast.decode",
    "Record": "dive_fast.data.record",
    "Scores": "dive_fast.metrics.scores",
    "Supervision": "dive_fast.supervision",
    "Teacher": "dive_fast.supervision",
    "TrainResult": "dive_fast.train",
    "evaluate": "dive_fast.evaluate",
    "generate": "dive_fast.decode",
    "load": "dive_fast.train",
    "ops": "dive_fast.ops",
    "paired_difference": "dive_fast.evaluate",
    "train": "dive_fast.train",
}
__all__ = ["__version__", *_HOME]


class _Package(ModuleType):
    """Keeps the functions `train` and `evaluate` in front of the submodules of the same name."""

    def __setattr__(self, name, value):
        if isinstance(value, ModuleType) and name in ("train", "evaluate"):
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __getattr__(self, name):
        if name not in _HOME:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        module = importlib.import_module(_HOME[name])
        value = getattr(module, name, module)
        super().__setattr__(name, value)
        return value

    def __dir__(self):
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
run_after_import("peft", "dive_fast.steering")
