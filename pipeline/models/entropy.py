"""CompressAI's entropy models and range coder: the one file that imports them, without CompressAI's own `__init__`.

That would import every model and data set of the library, with torch_geometric, pandas and sympy: 2 seconds of processor
time in every process that opens a file. Whoever imports CompressAI beside us, before or after, gets all of it.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


def _stand_in() -> ModuleType:
    """The package CompressAI, not executed except for the two functions that its entropy models use.

    The first access to anything else executes it after all.
    """
    spec = importlib.util.find_spec("compressai")
    assert spec is not None
    assert spec.loader is not None
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def whole(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        return getattr(package, name)

    vars(package).update(get_entropy_coder=lambda: "ans", available_entropy_coders=lambda: ["ans"], __getattr__=whole)
    return package


if "compressai" not in sys.modules:
    sys.modules["compressai"] = _stand_in()

import compressai.ans as ans  # noqa: E402
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional  # noqa: E402

__all__ = ["EntropyBottleneck", "EntropyModel", "GaussianConditional", "ans"]
