from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from koinon.data.bpe import BpeTokenizer
from koinon.data.tokenizer import END, ByteTokenizer, Tokenizer, load
from koinon.errors import DataError, TokenOutOfRange

TEXT = "def naïve(x):\n    return '€' * x  # a comment, and a comment again 🎉\n" * 40


@functools.cache
def bpe() -> BpeTokenizer:
    return BpeTokenizer.learn([TEXT[: len(TEXT) // 2], TEXT], vocab=320)


KINDS = ["bytes", "bpe"]


def of(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "bytes" else bpe()


any_text = st.text(max_size=200) | st.lists(st.sampled_from(TEXT.split(" ")), max_size=30).map(" ".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=any_text)
def test_decoding_gives_back_any_text_that_utf8_can_write(kind: str, text: str) -> None:
    ids = of(kind).encode(text)
    assert of(kind).decode(ids) == text
    assert END not in ids
    assert all(0 <= token < of(kind).vocab for token in ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lone_surrogate_becomes_a_question_mark(kind: str) -> None:
    assert of(kind).decode(of(kind).encode("a\ud800b")) == "a?b"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_stream_shows_whole_characters_and_in_the_end_everything(kind: str, data: st.DataObject) -> None:
    tokenizer = of(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab - 1), max_size=60) | any_text.map(tokenizer.encode))
    stream = tokenizer.stream()
    pieces = [stream.feed([token]) for token in ids]
    assert "".join(pieces) + stream.rest() == tokenizer.decode(ids)
    for piece in pieces:
        piece.encode("utf-8")  # raises if a piece ends in half a character


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_waits_for_the_end_of_a_character(kind: str) -> None:
    stream = of(kind).stream()
    assert [stream.feed([byte]) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.rest() == ""
    stream.feed([0xE2])
    assert stream.rest() == "\ufffd"
    assert stream.feed([0x41]) == "A"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token", [-1, 320, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(kind: str, token: int) -> None:
    with pytest.raises(TokenOutOfRange, match=f"Token {token}"):
        of(kind).decode([65, token])
    with pytest.raises(TokenOutOfRange):
        of(kind).stream().feed([token])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_encoded_alike_one_by_one_and_closed(kind: str) -> None:
    texts = [TEXT, "", "€", TEXT[7:99]]
    found = [ids.tolist() for ids in of(kind).encode_documents(texts)]
    assert found == [[*of(kind).encode(text), END] for text in texts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_survives_its_file(kind: str, tmp_path: Path) -> None:
    of(kind).save(tmp_path / "tokenizer.json")
    again = load(tmp_path / "tokenizer.json")
    assert again.digest == of(kind).digest
    assert again.encode(TEXT + " unseen ßü") == of(kind).encode(TEXT + " unseen ßü")


def test_learning_twice_gives_the_same_merges() -> None:
    texts = [TEXT[i : i + 300] for i in range(0, 1500, 100)]
    assert BpeTokenizer.learn(texts, 300).to_json() == BpeTokenizer.learn(texts, 300).to_json()


def test_merges_make_text_shorter() -> None:
    assert len(bpe().encode(TEXT)) < len(TEXT.encode()) / 2


def test_a_short_text_leaves_ids_unused_and_they_decode_to_nothing() -> None:
    tokenizer = BpeTokenizer.learn(["abab"], vocab=1000)
    assert tokenizer.vocab == 1000
    assert tokenizer.decode([999, 97, END, 998]) == "a"


@settings(max_examples=60)
@given(st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3), max_leaves=6))
def test_merges_of_any_other_shape_are_refused(merges: object) -> None:
    saved = json.dumps({"kind": "bpe", "vocab": 300, "merges": merges})
    path = Path("in-memory.json")
    if merges == [] or _are_merges(merges):
        return
    with pytest.raises(DataError):
        _load_text(saved, path)


def _are_merges(merges: object) -> bool:
    return isinstance(merges, list) and all(isinstance(merge, str | list) and len(merge) == 2 for merge in merges)


def _load_text(saved: str, name: Path) -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_text(saved)
        return load(path)


@pytest.mark.parametrize(
    "saved",
    [
        "",
        "[]",
        "{",
        '{"kind": "words"}',
        '{"kind": "bpe", "vocab": 300}',
        '{"kind":"bpe","vocab":300,"merges":[["zz","a"]]}',
    ],
)
def test_a_file_that_is_no_tokenizer_says_so(saved: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(saved)
    with pytest.raises(DataError):
        load(tmp_path / "tokenizer.json")


def test_more_merges_than_the_vocabulary_has_room_for_are_refused() -> None:
    with pytest.raises(DataError, match="more than its `vocab`"):
        BpeTokenizer([("a", "b"), ("ab", "c")], vocab=257)


def test_two_merges_that_give_one_token_share_its_id() -> None:
    tokenizer = BpeTokenizer([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"), ("c", "d")], vocab=260)
    assert [tokenizer.bytes_of(token) for token in range(256, 260)] == [b"ab", b"bc", b"abc", b"cd"]


def test_a_missing_tokenizer_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Prepare the data"):
        load(tmp_path / "tokenizer.json")
