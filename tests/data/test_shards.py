from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koinon.data.shards import Index, ShardWriter, TokenStore
from koinon.errors import DataError, ShardDamaged, TokenOutOfRange

documents = st.lists(st.lists(st.integers(0, 999), max_size=20), max_size=20)


def write(directory: Path, texts: list[list[int]], vocab: int = 1000, shard_tokens: int = 16) -> TokenStore:
    writer = ShardWriter(directory, vocab, shard_tokens)
    for ids in texts[writer.documents :]:
        writer.append(np.array(ids, np.int64))
    writer.finish()
    return TokenStore(directory)


@settings(max_examples=60)
@given(texts=documents, data=st.data(), shard_tokens=st.integers(1, 60))
def test_a_store_reads_as_one_row_however_it_is_cut(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], data: st.DataObject, shard_tokens: int
) -> None:
    store = write(tmp_path_factory.mktemp("store"), texts, shard_tokens=shard_tokens)
    row = [token for ids in texts for token in ids]
    assert store.tokens == len(row)
    start = data.draw(st.integers(0, len(row)))
    length = data.draw(st.integers(0, len(row) - start))
    assert store.read(start, length).tolist() == row[start : start + length]


def test_targets_are_the_ids_one_later(tmp_path: Path) -> None:
    ids, targets = write(tmp_path, [list(range(100))]).sample(40, 10)
    assert ids.tolist() == list(range(40, 50))
    assert targets.tolist() == list(range(41, 51))
    assert ids.dtype == targets.dtype == np.int32


@pytest.mark.parametrize(("vocab", "dtype"), [(256, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_are_stored_as_narrow_as_the_vocabulary_allows(tmp_path: Path, vocab: int, dtype: str) -> None:
    store = write(tmp_path, [[0, vocab - 1]], vocab)
    assert store.index.dtype == dtype
    assert store.read(0, 2).tolist() == [0, vocab - 1]


@pytest.mark.parametrize("token", [1000, -1, 70_000])
def test_an_id_outside_the_vocabulary_is_never_stored(tmp_path: Path, token: int) -> None:
    with pytest.raises(TokenOutOfRange):
        ShardWriter(tmp_path, 1000).append(np.array([5, token]))


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (95, 6), (101, 0)])
def test_a_window_outside_the_store_is_refused(tmp_path: Path, start: int, length: int) -> None:
    with pytest.raises(DataError, match="which holds 100"):
        write(tmp_path, [list(range(100))]).read(start, length)


@pytest.mark.parametrize("damage", ["flip", "shorten", "lengthen", "remove"])
def test_damage_is_found_before_an_id_is_used(tmp_path: Path, damage: str) -> None:
    write(tmp_path, [[i] * 16 for i in range(4)])
    path = tmp_path / "00002.bin"
    raw = bytearray(path.read_bytes())
    raw[7] ^= 4
    changed = {"flip": raw, "shorten": raw[:-2], "lengthen": raw + b"\0\0", "remove": bytearray()}[damage]
    path.unlink() if damage == "remove" else path.write_bytes(changed)
    store = TokenStore(tmp_path)
    assert store.read(0, 32).tolist() == [0] * 16 + [1] * 16  # the others are good
    with pytest.raises(ShardDamaged, match=r"00002\.bin is not what was written"):
        store.read(30, 10)


@pytest.mark.parametrize("saved", ["", "{}", '{"vocab": 3, "dtype": "float16"}'])
def test_a_damaged_index_is_said_to_be_one(tmp_path: Path, saved: str) -> None:
    (tmp_path / "index.json").write_text(saved)
    with pytest.raises(ShardDamaged, match=r"index\.json is missing or damaged"):
        TokenStore(tmp_path)


@settings(max_examples=30)
@given(texts=documents, stop=st.integers(0, 20), shard_tokens=st.integers(1, 60))
def test_writing_goes_on_after_a_stop_as_if_there_had_been_none(
    tmp_path_factory: pytest.TempPathFactory, texts: list[list[int]], stop: int, shard_tokens: int
) -> None:
    stopped, straight = tmp_path_factory.mktemp("stopped"), tmp_path_factory.mktemp("straight")
    first = ShardWriter(stopped, 1000, shard_tokens)
    for ids in texts[:stop]:
        first.append(np.array(ids, np.int64))
    del first  # killed: nothing says goodbye
    assert (
        write(stopped, texts, shard_tokens=shard_tokens).index
        == write(straight, texts, shard_tokens=shard_tokens).index
    )


def test_the_digest_follows_the_ids_and_not_the_place(tmp_path: Path) -> None:
    texts = [[1, 2, 3], [4]]
    one, same, other = (write(tmp_path / name, t) for name, t in (("a", texts), ("b", texts), ("c", [[1, 2, 3], [5]])))
    assert one.digest == same.digest != other.digest


def test_a_store_without_documents_is_a_store(tmp_path: Path) -> None:
    assert write(tmp_path, []).tokens == 0
    assert Index.load(tmp_path).shards == ()


FILL = """
import resource, sys
from pathlib import Path
import numpy as np
from koinon.data.shards import ShardWriter
from koinon.errors import DiskFull
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
writer = ShardWriter(Path(sys.argv[1]), 1000, shard_tokens=400)
writer.append(np.arange(400))
try:
    writer.append(np.arange(600))
except DiskFull as error:
    print(error)
"""


def test_a_full_disk_is_said_and_leaves_what_is_whole(tmp_path: Path) -> None:
    assert resource.RLIMIT_FSIZE  # the stand-in for a full disk: no file of the child may pass 1000 bytes
    done = subprocess.run([sys.executable, "-c", FILL, tmp_path], capture_output=True, text=True, check=True)
    assert "No room to write" in done.stdout
    assert TokenStore(tmp_path).read(0, 400).tolist() == list(range(400))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.bin", "index.json"]
