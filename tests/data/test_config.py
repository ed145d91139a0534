from __future__ import annotations

from typing import Any

import msgspec
import pytest

from koinon.data import DataConfig
from koinon.errors import Contradiction


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"vocab": 300}, "vocab"),
        ({"tokenizer": "bpe"}, "vocab"),
        ({"tokenizer": "bpe", "vocab": 256}, "vocab"),
        ({"tokenizer": "words", "vocab": 4096}, "tokenizer"),
        ({"heldout": -0.1}, "heldout"),
        ({"heldout": 0.9}, "heldout"),
        ({"heldout": float("nan")}, "heldout"),
        ({"max_bytes": 0}, "max_bytes"),
        ({"source": ""}, "source"),
    ],
)
def test_settings_that_cannot_hold_are_refused_by_name(settings: dict[str, Any], names: str) -> None:
    with pytest.raises(Contradiction, match=f"`{names}`"):
        DataConfig(**settings)


def test_settings_survive_json() -> None:
    config = DataConfig(source="texts", tokenizer="bpe", vocab=1024, heldout=0.1, max_bytes=10**9)
    assert msgspec.json.decode(msgspec.json.encode(config), type=DataConfig) == config
