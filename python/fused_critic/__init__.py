"""The critic side of PPO as PyTorch operators: masked clipped value loss and generalised advantage estimation, on CPU and CUDA."""

from ._load import load_extension

__version__: str = load_extension().build_info()["version"]

from . import _dtensor_hook, _fake, _fallback, _jagged, _vmap  # noqa: E402, F401  (each registers with the operators that were just loaded)
from .functional import GAEOutput, ValueLossOutput, gae, value_loss  # noqa: E402
from .modules import ClippedValueLoss  # noqa: E402
from .recurrence import VTraceOutput, reverse_scan, vtrace  # noqa: E402
from .stats import ValueLossStats  # noqa: E402
from .whiten import masked_whiten  # noqa: E402

_dtensor_hook.install()

__all__ = [
    "ClippedValueLoss",
    "GAEOutput",
    "VTraceOutput",
    "ValueLossOutput",
    "ValueLossStats",
    "__version__",
    "gae",
    "masked_whiten",
    "reverse_scan",
    "value_loss",
    "vtrace",
]
