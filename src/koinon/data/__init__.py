"""Text in, token ids out: the same ids for the same (seed, step) on every machine.

    corpus  ->  manifest  ->  tokenizer  ->  shards  ->  sampling
    documents   hashes,       text to ids    ids on      which windows
                the split                    disk        a step reads

`prepare` does all of it once and `Dataset` answers afterwards. Knows nothing of models, peers or money, and loads
no torch: trainers draw batches in a process that never imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["DataConfig", "Dataset", "Microbatch", "prepare"]

if TYPE_CHECKING:
    from koinon.data.building import prepare
    from koinon.data.config import DataConfig
    from koinon.data.dataset import Dataset, Microbatch


def __getattr__(name: str) -> Any:
    """Resolve the public names when first used, so that reading a `DataConfig` does not load numpy."""
    if name == "DataConfig":
        from koinon.data.config import DataConfig

        return DataConfig
    if name == "prepare":
        from koinon.data.building import prepare

        return prepare
    if name in ("Dataset", "Microbatch"):
        from koinon.data import dataset

        return getattr(dataset, name)
    raise AttributeError(f"module 'koinon.data' has no attribute {name!r}")
