"""ctvae: from a folder of CT scans to a model that generates synthetic 3D CT scans.

    import ctvae

    ctvae.prepare("scans", "dataset")
    run = ctvae.train("dataset", "run", minutes=60)
    ctvae.load(run).generate(seed=0).save("x.nii.gz")

Names are looked up when they are first used, so that `import ctvae` loads neither torch nor anything heavy.
Some functions are called like the module they live in (`prepare`, `generate`, `compare` ...): on the package, such
names always mean the function, whoever imported the module before; `from ctvae.prepare import ...` reaches the rest.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ctvae.version import __version__ as __version__

if TYPE_CHECKING:
    from ctvae.compare import compare
    from ctvae.dataset import Dataset
    from ctvae.demo import demo
    from ctvae.evaluation.evaluate import evaluate
    from ctvae.export import export
    from ctvae.generate import generate, interpolate, load, reconstruct, vary
    from ctvae.prepare import prepare
    from ctvae.training.train import train
    from ctvae.volume import Volume

__all__ = [
    "Dataset",
    "Volume",
    "compare",
    "demo",
    "evaluate",
    "export",
    "generate",
    "interpolate",
    "load",
    "prepare",
    "reconstruct",
    "train",
    "vary",
]
_HOME = {
    "Dataset": "ctvae.dataset",
    "Volume": "ctvae.volume",
    "compare": "ctvae.compare",
    "demo": "ctvae.demo",
    "evaluate": "ctvae.evaluation.evaluate",
    "export": "ctvae.export",
    "generate": "ctvae.generate",
    "interpolate": "ctvae.generate",
    "load": "ctvae.generate",
    "prepare": "ctvae.prepare",
    "reconstruct": "ctvae.generate",
    "train": "ctvae.training.train",
    "vary": "ctvae.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ctvae' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Python binds a submodule to its package when it is first imported; where a function has that name, it stays."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
