from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from koinon.data.config import DataConfig
from koinon.data.corpus import Corpus, Document, open_corpus
from koinon.data.manifest import CorpusManifest, Entry, held_out, scan
from koinon.data.progress import silent
from koinon.errors import CorpusChanged, DataError, EmptyCorpus


def entry(text: str, name: str = "") -> Entry:
    raw = text.encode()
    return Entry(name or text, len(raw), sha256(raw).hexdigest())


texts = st.lists(st.text("ab", min_size=1, max_size=30), min_size=2, max_size=60).filter(lambda t: len(set(t)) > 1)


@given(texts, st.floats(0.01, 0.5))
def test_both_sides_get_a_document_and_copies_stay_together(corpus: list[str], share: float) -> None:
    taken = held_out([entry(text, f"{number}") for number, text in enumerate(corpus)], share)
    train = {text for text in corpus if entry(text).sha256 not in taken}
    held = {text for text in corpus if entry(text).sha256 in taken}
    assert train
    assert held
    assert not train & held


@given(texts, st.floats(0.01, 0.5))
def test_no_more_is_held_out_than_allowed_unless_one_document_is_more(corpus: list[str], share: float) -> None:
    entries = [entry(text) for text in corpus]
    taken = held_out(entries, share)
    held = sum(e.nbytes for e in entries if e.sha256 in taken)
    assert held <= share * sum(e.nbytes for e in entries) or len(taken) == 1


@given(texts)
def test_the_split_does_not_depend_on_names_or_order(corpus: list[str]) -> None:
    turned = [entry(text, "renamed") for text in reversed(corpus)]
    assert held_out([entry(text) for text in corpus], 0.3) == held_out(turned, 0.3)


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(EmptyCorpus, match="heldout = 0"):
        held_out([entry("only"), entry("only", "its copy")], 0.1)
    assert held_out([entry("only")], 0) == frozenset()


def manifest_of(folder: Path) -> CorpusManifest:
    config = DataConfig(source=str(folder))
    return scan(open_corpus(config), config, silent)


def test_a_manifest_survives_its_file(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(folder)
    manifest.save(tmp_path / "corpus.json")
    assert CorpusManifest.load(tmp_path / "corpus.json") == manifest


def test_a_damaged_manifest_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text('{"what": "x"')
    with pytest.raises(DataError, match="is not a corpus manifest"):
        CorpusManifest.load(tmp_path / "corpus.json")


@pytest.mark.parametrize("change", ["edit", "add", "remove"])
def test_a_changed_text_is_named(folder: Path, change: str) -> None:
    before = manifest_of(folder)
    if change == "remove":
        (folder / "07.txt").unlink()
    else:
        (folder / ("07.txt" if change == "edit" else "new.txt")).write_text("other words")
    name = "new.txt" if change == "add" else "07.txt"
    with pytest.raises(CorpusChanged, match=rf"1 of 40 documents differ \(the first is {name}\)"):
        before.require_same(manifest_of(folder))


def test_another_python_is_told_so() -> None:
    """What a machine with another Python sees: the same names, some other texts."""

    def library(version: str) -> CorpusManifest:
        documents = [Document(f"{n}.py", f"# of {version if n == 3 else 'any'} version, {n}") for n in range(9)]
        return scan(Corpus(f"the standard library of Python {version}", lambda: iter(documents)), DataConfig(), silent)

    with pytest.raises(CorpusChanged, match=r"it was the standard library of Python 3\.11\.7, it is now .*3\.12\.1"):
        library("3.11.7").require_same(library("3.12.1"))


def test_a_file_edited_between_the_two_readings_stops_the_build(folder: Path) -> None:
    manifest = manifest_of(folder)
    (folder / "11.txt").write_text("edited")
    with pytest.raises(CorpusChanged, match=r"11\.txt changed while"):
        list(manifest.parts(open_corpus(manifest.config)))


def test_replaced_documents_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(b"fine")
    assert manifest_of(tmp_path).replaced == 1


def test_no_text_at_all_is_an_empty_corpus(tmp_path: Path) -> None:
    with pytest.raises(EmptyCorpus, match="no text in"):
        manifest_of(tmp_path)
