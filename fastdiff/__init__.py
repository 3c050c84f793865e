"""fastdiff: hand-written C++ and CUDA kernels for diffusion models under a thin PyTorch API.

Every kernel has a plain PyTorch reference that it is tested against and falls back to. See `fastdiff.ops`.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("fastdiff")
except PackageNotFoundError:  # imported from a checkout that was never installed
    __version__ = "0.0.0+uninstalled"

from fastdiff import ops
from fastdiff._native import build_info, cpu_isa, use_backend
from fastdiff.integrations import accelerate, acceleration_report, restore
from fastdiff.ops import explain

__all__ = [
    "__version__",
    "accelerate",
    "acceleration_report",
    "build_info",
    "cpu_isa",
    "explain",
    "ops",
    "restore",
    "use_backend",
]
