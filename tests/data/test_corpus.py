from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from koinon.data.config import DataConfig
from koinon.data.corpus import PIECE, Document, open_corpus
from koinon.errors import DataError


def read(source: Path | str, **settings: object) -> list[Document]:
    return list(open_corpus(DataConfig(source=str(source), **settings)).documents())  # type: ignore[arg-type]


def test_the_standard_library_is_library_source_and_nothing_that_this_machine_made() -> None:
    names = [document.name for document in read("stdlib", max_bytes=3_000_000)]
    assert len(names) > 100
    assert all(name.endswith(".py") for name in names)
    for local in ("site-packages/", "test/", "tests/", "idlelib/", "encodings/", "_sysconfigdata", "config-"):
        assert not [name for name in names if name.startswith(local) or f"/{local}" in name]


def test_the_order_is_the_same_at_every_reading_and_not_alphabetical(folder: Path) -> None:
    first, second = ([document.name for document in read(folder)] for _ in range(2))
    assert first == second
    assert sorted(first) != first


def test_a_copy_of_the_folder_elsewhere_reads_the_same(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    files = list(folder.iterdir())
    random.Random(1).shuffle(files)
    for file in files:
        (copy / file.name).write_bytes(file.read_bytes())
    assert read(copy) == read(folder)


def test_bytes_that_are_no_utf8_are_replaced_and_reported(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café\n".encode("latin-1"))
    (tmp_path / "honest.txt").write_text("the sign \ufffd itself\n", encoding="utf-8")
    found = {document.name: document for document in read(tmp_path)}
    assert found["latin.txt"].text == "caf\ufffd\n"
    assert found["latin.txt"].replaced
    assert not found["honest.txt"].replaced


def test_binary_hidden_and_empty_files_are_not_text(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / ".secret").write_text("hidden")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden too")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "good.txt").write_text("good")
    assert [document.name for document in read(tmp_path)] == ["good.txt"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=40), max_size=30))
def test_the_pieces_of_a_long_file_join_to_the_file(tmp_path: Path, lines: list[str]) -> None:
    text = "\n".join([*lines, "x" * (PIECE + 5), *lines, "y" * 100] * 2)
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    pieces = read(tmp_path / "long.txt")
    assert len(pieces) > 2
    assert all(0 < len(piece.text) <= PIECE for piece in pieces)
    assert "".join(piece.text for piece in pieces) == text


@pytest.mark.parametrize("limit", [1, 100, 1000, 5001])
def test_max_bytes_is_kept_exactly_up_to_a_character(tmp_path: Path, limit: int) -> None:
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text("aé" * 300, encoding="utf-8")
    size = sum(len(document.text.encode()) for document in read(tmp_path, max_bytes=limit))
    assert limit - 1 <= size <= limit


def test_jsonl_rows_are_documents_and_other_files_beside_them_are_not_read(tmp_path: Path) -> None:
    rows = [{"text": "first"}, {"text": ""}, {"text": "sécond \ud800"}]
    lines = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "rows.jsonl").write_text(lines + "\n\n")
    (tmp_path / "readme.txt").write_text("not a row")
    assert [document.text for document in read(tmp_path)] == ["first", "sécond ?"]
    assert read(tmp_path / "rows.jsonl") == read(tmp_path)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": "cut', "rows.jsonl:2 is not JSON"),
        ('{"body": "x", "id": 3}', r"no text in `text` \(fields: body, id\)"),
        ('{"text": 5}', "no text in `text`"),
        ('["text"]', "no text in `text`"),
        ("[" * 100_000, "rows.jsonl:2 is not JSON"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(DataError, match=sentence):
        read(tmp_path)


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    assert [document.text for document in read(tmp_path, text_field="body")] == ["x"]


def test_a_source_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Set `source` to"):
        read(tmp_path / "nowhere")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="the extra is installed")
def test_hugging_face_without_its_package_names_the_extra() -> None:
    with pytest.raises(DataError, match=r"pip install koinon\[datasets\]"):
        read("hf:some/corpus")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="needs the `datasets` extra")
@pytest.mark.parametrize("limit", [None, 12])
def test_a_hugging_face_dataset_is_read_row_by_row(tmp_path: Path, limit: int | None) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "first row"}\n{"text": "second row"}\n')
    texts = [document.text for document in read(f"hf:{tmp_path}", max_bytes=limit)]
    assert texts == (["first row", "second row"] if limit is None else ["first row", "sec"])
