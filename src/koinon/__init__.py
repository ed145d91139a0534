"""Koinon trains, owns and serves a neural network that no single actor holds whole.

`import koinon` loads no torch: the public names are resolved when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LocalSwarm", "RunSpec", "__version__"]

if TYPE_CHECKING:
    from koinon.local import LocalSwarm
    from koinon.run.spec import RunSpec


def __getattr__(name: str) -> Any:
    match name:
        case "LocalSwarm":
            from koinon.local import LocalSwarm

            return LocalSwarm
        case "RunSpec":
            from koinon.run.spec import RunSpec

            return RunSpec
    raise AttributeError(f"module 'koinon' has no attribute {name!r}")
