from __future__ import annotations

import json
import math
import unicodedata
from dataclasses import asdict
from pathlib import Path

import bm25s
import pytest
from hypothesis import given
from hypothesis import strategies as st

from system.tools.search_index import CorpusError, Document, SearchIndex, read_corpus, tokens

DOCUMENTS = [
    Document("1", "Paris", "Paris is the capital of France, on the Seine."),
    Document("2", "Rome", "Rome is the capital of Italy."),
    Document("3", "Seine", "The Seine is a river in France."),
    Document("4", "Twin", "identical twins look alike"),
    Document("5", "Twin", "identical twins look alike"),
    Document("6", "Twin", "identical twins look alike"),
    Document("7", "Model T", "Ford built 15 million cars."),
]


@pytest.fixture(scope="module")
def index() -> SearchIndex:
    return SearchIndex.build(DOCUMENTS)


def ids(index: SearchIndex, query: str, top_k: int = 3) -> list[str]:
    return [hit.document.id for hit in index.search(query, top_k)]


def test_the_best_match_comes_first(index: SearchIndex) -> None:
    assert ids(index, "capital of Italy")[0] == "2"
    assert ids(index, "river France")[0] == "3"
    assert ids(index, "PARIS")[0] == "1"
    assert ids(index, "15")[0] == "7"


def test_titles_count(index: SearchIndex) -> None:
    assert ids(index, "model t", 1) == ["7"]


def test_scores_are_bm25(index: SearchIndex) -> None:
    """Lucene's BM25, k1 = 1.5, b = 0.75 (arXiv 2407.03618, Table 1)."""
    lengths = {"1": 5, "2": 4, "3": 4, "4": 5, "5": 5, "6": 5, "7": 7}  # words left without the stop words
    (hit,) = index.search("italy", 3)
    mean = sum(lengths.values()) / len(lengths)
    idf = math.log(1 + (7 - 1 + 0.5) / (1 + 0.5))
    tf = 1 / (1 + 1.5 * (1 - 0.75 + 0.75 * lengths["2"] / mean))
    assert hit.score == pytest.approx(idf * tf, rel=1e-5)


def test_ties_rank_by_place_in_the_corpus(index: SearchIndex) -> None:
    assert ids(index, "identical twins", 2) == ["4", "5"]
    assert ids(index, "identical twins", 3) == ["4", "5", "6"]


def test_only_documents_that_share_a_word(index: SearchIndex) -> None:
    assert ids(index, "italy", 7) == ["2"]
    assert ids(index, "zebra") == []
    assert ids(index, "") == []
    assert ids(index, "the of is") == []
    assert ids(index, "italy", 0) == []


SCRIPTS = [
    Document("zh", "狐狸", "敏捷的棕色狐狸跳过懒狗。"),
    Document("zh2", "城市", "北京是中国的首都。"),
    Document("ja", "東京タワー", "東京タワーは日本の塔です。"),
    Document("th", "กรุงเทพ", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย"),
    Document("ko", "서울", "서울은 대한민국의 수도이다."),
    Document("hi", "दिल्ली", "दिल्ली भारत की राजधानी है।"),
    Document("ar", "القاهرة", "القاهرة عاصمة مصر"),
    Document("de", "Zürich", "Die größte Stadt der Schweiz; ein Café."),
    Document("vi", "Hà Nội", "Thủ đô của Việt Nam."),
    Document("ru", "Москва", "Столица России."),
]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("狐狸", "zh"),
        ("狐", "zh"),
        ("中国首都", "zh2"),
        ("東京", "ja"),
        ("タワー", "ja"),
        ("ﾀﾜｰ", "ja"),  # half-width
        ("เมืองหลวง", "th"),
        ("대한민국", "ko"),
        ("서울", "ko"),  # with a particle in the text
        ("राजधानी", "hi"),
        ("مصر", "ar"),
        ("zurich", "de"),
        ("ZÜRICH", "de"),
        ("Zu\u0308rich", "de"),  # the accent as a character of its own
        ("cafe", "de"),
        ("GRÖSSTE", "de"),
        ("Ｃａｆｅ", "de"),
        ("Viet Nam", "vi"),
        ("МОСКВА", "ru"),
    ],
)
def test_any_script_is_found(query: str, found: str) -> None:
    assert ids(SearchIndex.build(SCRIPTS), query, 1) == [found]


def test_words_of_a_script_without_spaces() -> None:
    assert tokens("棕色狐狸 fox") == ["棕", "色", "狐", "狸", "棕色", "色狐", "狐狸", "fox"]
    assert tokens("ฟ") == ["ฟ"]


def test_english_words_are_those_of_bm25s() -> None:
    """Its own splitter with one-letter words kept, which this corpus' figures were made with."""
    text = " ".join(f"{d.title} {d.text} It's 3.5 o'clock, e_mail A-b" for d in DOCUMENTS)
    theirs = bm25s.tokenize(
        [text], stopwords="en", token_pattern=r"(?u)\b\w+\b", return_ids=False, show_progress=False
    )
    assert tokens(text) == theirs[0]


@given(st.text(st.characters()))
def test_any_text_has_the_same_words_however_its_accents_are_encoded(text: str) -> None:
    """Any text at all, lone surrogates included."""
    words = tokens(unicodedata.normalize("NFC", text))
    assert words == tokens(unicodedata.normalize("NFD", text))
    assert all(words)


def test_saved_and_loaded(index: SearchIndex, tmp_path: Path) -> None:
    SearchIndex.cached(DOCUMENTS, tmp_path / "index")
    loaded = SearchIndex.cached(DOCUMENTS, tmp_path / "index")
    for query in ("capital", "identical twins", "zebra", "seine france"):
        assert loaded.search(query, 5) == index.search(query, 5)


def test_cached_index_is_rebuilt_for_another_corpus(tmp_path: Path) -> None:
    SearchIndex.cached(DOCUMENTS, tmp_path)
    written = (tmp_path / "manifest.json").stat().st_mtime_ns
    assert ids(SearchIndex.cached(DOCUMENTS, tmp_path), "italy") == ["2"]
    assert (tmp_path / "manifest.json").stat().st_mtime_ns == written
    other = [Document("x", "", "Italy again"), *DOCUMENTS[2:]]
    assert ids(SearchIndex.cached(other, tmp_path), "italy") == ["x"]


def test_corpus_of_any_text(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    documents = [*DOCUMENTS, Document("é", "line\nbreak", "“quoted” \u2028 text")]
    lines = [json.dumps(asdict(document), ensure_ascii=False) + "\n" for document in documents]
    path.write_text("".join(lines), encoding="utf-8")
    assert read_corpus(path) == documents


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "2: expected"),
        ('{"id": "1"}', "'text'"),
        ('{"id": 1, "text": 5}', "not a string"),
        ("[]", "2: exp"),
        ('{"id": "1", "text": "\udce9"}', r"corpus\.jsonl:2: expected .*UnicodeDecodeError"),  # latin-1
    ],
)
def test_bad_corpora_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    text = json.dumps({"id": "0", "title": "", "text": "fine"}) + "\n" + line + "\n"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorpusError, match=message):
        read_corpus(path)


def test_missing_and_empty_corpora(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no such corpus"):
        read_corpus(tmp_path / "nothing.jsonl")
    with pytest.raises(CorpusError, match="no document"):
        SearchIndex.build([])
    with pytest.raises(CorpusError, match="no document"):
        SearchIndex.build([Document("1", "", "...")])
