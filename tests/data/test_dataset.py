from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from koinon.data import DataConfig, Dataset, prepare
from koinon.data.tokenizer import END
from koinon.errors import CorpusChanged, DataError, EmptyCorpus, ShardDamaged

SEED = b"a secret of the trainers"


def files(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("tokenizer", [{}, {"tokenizer": "bpe", "vocab": 300}])
def test_the_same_text_gives_the_same_files(folder: Path, tmp_path: Path, tokenizer: dict[str, object]) -> None:
    config = DataConfig(source=str(folder), **tokenizer)  # type: ignore[arg-type]
    one, other = prepare(config, tmp_path / "one"), prepare(config, tmp_path / "other")
    assert files(tmp_path / "one") == files(tmp_path / "other")
    assert one.digest == other.digest


def test_training_never_sees_a_held_out_document(folder: Path, tmp_path: Path) -> None:
    """Every document is one letter of its own, so a held-out token in training would show."""
    data = prepare(DataConfig(source=str(folder), heldout=0.2), tmp_path / "data")
    groups = [m for step in range(60) for m in data.batch(SEED, step, 16, 4, 32)]
    seen = {int(token) for m in groups for token in np.unique([m.ids, m.targets])}
    held = {int(token) for token in np.unique(data.heldout.read(0, data.tokens_heldout))}
    assert len(held) > 3
    assert seen & held == {END}
    assert seen | held == {END, *range(0x30, 0x30 + 40)}


def test_a_tokenizer_does_not_learn_from_held_out_text(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"word{chr(97 + number) * 8} " * 20)
    data = prepare(DataConfig(source=str(texts), heldout=0.3, tokenizer="bpe", vocab=600), tmp_path / "data")
    for number in range(20):
        text = (texts / f"{number}.txt").read_text()
        is_held = len(data.tokenizer.encode(text)) > 60  # its eight letters were never merged
        assert is_held == (chr(97 + number) * 8 in data.tokenizer.decode(data.heldout.read(0, data.tokens_heldout)))


def test_batches_are_a_pure_function_of_seed_and_step(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(folder))
    data = prepare(config, tmp_path / "data")
    again = Dataset.open(tmp_path / "data")
    again.batch(SEED, 0, 8, 2, 16)  # what was asked before does not matter
    for one, other in zip(data.batch(SEED, 7, 8, 2, 16), again.batch(SEED, 7, 8, 2, 16), strict=True):
        assert one.samples == other.samples
        assert np.array_equal(one.ids, other.ids)
        assert np.array_equal(one.targets, other.targets)
    other_seed = data.batch(b"another", 7, 8, 2, 16)
    assert [m.samples for m in other_seed] != [m.samples for m in data.batch(SEED, 7, 8, 2, 16)]


def test_a_microbatch_is_what_its_samples_say(folder: Path, tmp_path: Path) -> None:
    data = prepare(DataConfig(source=str(folder)), tmp_path / "data")
    groups = data.batch(SEED, 3, 10, 4, 16)
    assert [m.index for m in groups] == [0, 1, 2]
    assert [m.ids.shape for m in groups] == [(4, 16), (4, 16), (2, 16)]
    for m in groups:
        assert m.ids.dtype == m.targets.dtype == np.int32
        assert m.ids.flags.c_contiguous
        assert m.targets.flags.c_contiguous
        for row, sample in enumerate(m.samples):
            ids, targets = data.train.sample(sample, 16)
            assert np.array_equal(m.ids[row], ids)
            assert np.array_equal(m.targets[row], targets)


def test_held_out_batches_are_always_the_same(folder: Path, tmp_path: Path) -> None:
    data = prepare(DataConfig(source=str(folder), heldout=0.2), tmp_path / "data")
    one, other = data.heldout_batches(9, 4, 16), data.heldout_batches(9, 4, 16)
    assert [m.ids.shape[0] for m in one] == [4, 4, 1]
    assert all(np.array_equal(a.ids, b.ids) for a, b in zip(one, other, strict=True))
    everything = data.heldout_batches(10**6, 4, 16)
    assert sum(m.ids.shape[0] for m in everything) == (data.tokens_heldout - 1) // 16


def test_nothing_held_out_cannot_be_evaluated(folder: Path, tmp_path: Path) -> None:
    data = prepare(DataConfig(source=str(folder), heldout=0), tmp_path / "data")
    assert data.tokens_heldout == 0
    with pytest.raises(EmptyCorpus, match="Raise `heldout`"):
        data.heldout_batches(4, 2, 16)


def test_prepared_data_outlives_its_text(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(folder))
    before = prepare(config, tmp_path / "data").batch(SEED, 1, 4, 4, 16)[0]
    for file in folder.iterdir():
        file.unlink()
    after = prepare(config, tmp_path / "data").batch(SEED, 1, 4, 4, 16)[0]
    assert np.array_equal(before.ids, after.ids)


def test_other_settings_in_the_same_folder_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    prepare(DataConfig(source=str(folder)), tmp_path / "data")
    with pytest.raises(CorpusChanged, match=r"`heldout` was 0\.05, is now 0\.1"):
        prepare(DataConfig(source=str(folder), heldout=0.1), tmp_path / "data")


def test_a_joiner_with_other_text_is_told_so(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(folder))
    started_with = prepare(config, tmp_path / "run").digest
    assert prepare(config, tmp_path / "joiner", expect=started_with).digest == started_with
    (folder / "03.txt").write_text("this machine has another text")
    with pytest.raises(CorpusChanged, match="The run reads other text"):
        prepare(config, tmp_path / "another", expect=started_with)


KILLED = """
import os, sys
from pathlib import Path
from koinon.data import DataConfig, prepare

left, whole = int(sys.argv[3]), os.replace
def replace(source, target, **rest):
    global left
    if left == 0:
        os._exit(9)  # what is written beside its place stays there
    left -= 1
    whole(source, target, **rest)
Path.replace = lambda source, target: replace(source, target)
config = DataConfig(source=sys.argv[1], tokenizer="bpe", vocab=300, heldout=0.2)
prepare(config, Path(sys.argv[2]), shard_tokens=500)
"""


@pytest.mark.parametrize("renames", [0, 1, 2, 3, 4, 7, 10])
def test_a_build_killed_at_any_rename_goes_on_to_the_same_files(folder: Path, tmp_path: Path, renames: int) -> None:
    config = DataConfig(source=str(folder), tokenizer="bpe", vocab=300, heldout=0.2)
    whole = prepare(config, tmp_path / "whole", shard_tokens=500)
    arguments = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), str(renames)]
    assert subprocess.run(arguments, check=False).returncode == 9
    assert not (tmp_path / "killed" / "dataset.json").exists()
    assert prepare(config, tmp_path / "killed", shard_tokens=500).digest == whole.digest
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_a_build_does_not_go_on_over_a_changed_text(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(folder), tokenizer="bpe", vocab=300, heldout=0.2)
    arguments = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "data"), "4"]
    assert subprocess.run(arguments, check=False).returncode == 9
    (folder / "05.txt").write_text("edited since")
    with pytest.raises(CorpusChanged, match=r"the first is 05\.txt"):
        prepare(config, tmp_path / "data")


@pytest.mark.parametrize("file", ["tokenizer.json", "corpus.json", "train/index.json", "dataset.json"])
def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path, file: str) -> None:
    one = DataConfig(source=str(folder), tokenizer="bpe", vocab=300, heldout=0.2)
    prepare(one, tmp_path / "one")
    (folder / "05.txt").write_text("edited since, " * 50)
    prepare(one, tmp_path / "other")
    (tmp_path / "one" / file).write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(CorpusChanged, match="do not belong together"):
        prepare(one, tmp_path / "one")


def test_a_damaged_shard_stops_the_batch_that_needs_it(folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(folder))
    prepare(config, tmp_path / "data")
    shard = tmp_path / "data" / "train" / "00000.bin"
    raw = bytearray(shard.read_bytes())
    raw[1000] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ShardDamaged):
        prepare(config, tmp_path / "data").batch(SEED, 0, 1, 1, 16)


def test_a_folder_that_is_not_ready_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared data"):
        Dataset.open(tmp_path)


def test_progress_reaches_its_total_in_every_phase(folder: Path, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    prepare(
        DataConfig(source=str(folder), tokenizer="bpe", vocab=300),
        tmp_path / "data",
        lambda phase, done, total: seen.setdefault(phase, []).append((done, total)),
    )
    assert list(seen) == ["reading", "learning the tokenizer", "tokenizing"]
    for calls in seen.values():
        assert calls == sorted(calls)
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert seen["reading"][-1] == (size, 0)
    assert seen["tokenizing"][-1] == (size, size)


def test_the_standard_library_is_ready_with_both_tokenizers(tmp_path: Path) -> None:
    texts = prepare(DataConfig(max_bytes=400_000), tmp_path / "bytes")
    pairs = prepare(DataConfig(max_bytes=400_000, tokenizer="bpe", vocab=512), tmp_path / "bpe")
    assert texts.vocab == 256
    assert pairs.vocab == 512
    assert pairs.tokens_train < texts.tokens_train / 1.5
    heldout = [data.tokenizer.decode(data.heldout.read(0, data.tokens_heldout)) for data in (texts, pairs)]
    assert heldout[0] == heldout[1]
    assert json.loads((tmp_path / "bytes" / "tokenizer.json").read_text()) == {"kind": "bytes"}


def test_no_torch_is_loaded_to_draw_a_batch(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from koinon.data import DataConfig, prepare; "
        "prepare(DataConfig(source=sys.argv[1]), Path(sys.argv[2])).batch(b'', 0, 2, 1, 8); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(folder), str(tmp_path / "data")], check=True)
