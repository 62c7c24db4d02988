"""Run one import right after another one, whenever that happens."""

import importlib
import importlib.util
import sys


def run_after_import(name: str, then: str) -> None:
    """Import module `then` as soon as the top-level package `name` has been imported, or now if it has been."""
    if name in sys.modules:
        importlib.import_module(then)
    else:
        sys.meta_path.insert(0, _Watcher(name, then))


class _Watcher:
    """A finder that finds `name` the usual way and extends the execution of its module."""

    def __init__(self, name: str, then: str):
        self.name, self.then, self.searching = name, then, False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                importlib.import_module(self.then)

        spec.loader.exec_module = exec_module
        return spec
