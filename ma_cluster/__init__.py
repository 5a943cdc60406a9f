"""ma_cluster finds microaneurysms in colour fundus photographs, one at a time or by the archive.

    from ma_cluster import Detector
    detection = Detector.load("lite").detect("eye.jpg")

Importing the package loads neither torch nor ray; they are loaded when first used.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ma_cluster.lesions.detector import Detector

__all__ = ["Detector", "__version__"]

try:
    __version__ = version("ma_cluster")
except PackageNotFoundError:  # a source tree that was never installed, e.g. a Ray working_dir
    __version__ = "0.0.0+source"


def __getattr__(name: str) -> Any:
    """Load `Detector`, and with it torch, on first use."""
    if name == "Detector":
        from ma_cluster.lesions.detector import Detector

        return Detector
    raise AttributeError(f"module 'ma_cluster' has no attribute {name!r}")
