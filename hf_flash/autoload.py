"""Registers the Transformers backend as soon as Transformers is there, without importing it ourselves.

``import hf_flash`` must be enough for ``attn_implementation="hf_flash"``, and must stay cheap for those who only want
the functions. So: if Transformers' modeling code is loaded, register at once; if not, when it gets loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import logging
import sys

_LAST_NEEDED = "transformers.modeling_utils"  # every model class imports it, after everything that backend.py needs


def _register() -> None:
    try:
        from . import backend  # noqa: F401  registers itself at its end, which may lie ahead: see there
    except Exception as error:  # an old Transformers must stay usable without us
        logging.getLogger("hf_flash").warning(
            "attn_implementation='hf_flash' is not available: %s: %s", type(error).__name__, error
        )


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself; registers the backend after the module it waits for has been executed."""

    def find_spec(self, name, path, target=None):
        if name != _LAST_NEEDED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def watch() -> None:
    """Register now or later; called once by ``import hf_flash``."""
    if _LAST_NEEDED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())
