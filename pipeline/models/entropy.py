"""CompressAI's entropy models and range coder: the one file that imports them, without CompressAI's own `__init__`.

That would import every model and data set of the library, with torch_geometric, pandas and sympy: 2 seconds of processor
time in every process that opens a file. Whoever imports CompressAI beside us, before or after, gets all of it.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any


def _executed_on_demand(name: str, **given: Any) -> ModuleType:
    """A module that has these attributes, and is executed when another one is wanted."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader

    def whole(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        vars(module).pop("__getattr__", None)
        loader.exec_module(module)
        return getattr(module, attribute)

    vars(module).update(given, __getattr__=whole)
    return module


if "compressai" not in sys.modules:
    sys.modules["compressai"] = _executed_on_demand(
        "compressai", get_entropy_coder=lambda: "ans", available_entropy_coders=lambda: ["ans"]
    )
# One function of it is used, when tables are built; importing it takes nearly as long as torch
if "scipy.stats" not in sys.modules:
    sys.modules["scipy.stats"] = _executed_on_demand("scipy.stats")

import compressai.ans as ans  # noqa: E402
from compressai.entropy_models import EntropyBottleneck, EntropyModel, GaussianConditional  # noqa: E402

__all__ = ["EntropyBottleneck", "EntropyModel", "GaussianConditional", "ans"]
