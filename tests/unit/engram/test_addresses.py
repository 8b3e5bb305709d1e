"""Which rows a token reads: held to the mathematics, read directly, one Python integer at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from moeray.deepseek_v4.engram import EngramError, EngramLayout, NgramHash, build_token_map

CONFIG = {
    "engram_layer_ids": [1, 14],
    "engram_num_embeddings": [613 + 617 + 619 + 631 + 641 + 643, 647 + 653 + 659 + 661 + 673 + 677],
    "engram_max_ngram_size": 4,
    "engram_n_heads": 2,
    "engram_head_dim": 8,
    "engram_compressed_vocab_size": 90,
    "engram_pad_token_id": 2,
    "engram_vocab_size": 612,
}
VOCAB = 100
BEFORE = -1


def layout(**changes: object) -> EngramLayout:
    found = EngramLayout.from_config(SimpleNamespace(**{**CONFIG, **changes}))
    assert found is not None
    return found


def token_map() -> np.ndarray:
    """Ids 0..89 keep their own compressed id, reversed; 90..97 share with others; 98 and 99 have no token."""
    return np.array([89 - i for i in range(90)] + [5, 5, 6, 7, 8, 9, 10, 11] + [-1, -1], dtype=np.int64)


@pytest.fixture
def ngrams() -> NgramHash:
    return NgramHash(layout(), token_map(), 90)


def direct_rows(tokens: list[int], position: int, layer_index: int) -> list[int]:
    """The definition, in unbounded integers: hash n-grams of 2, 3 and 4 tokens, each once per head."""
    layer_id = CONFIG["engram_layer_ids"][layer_index]
    bound = (2**63 - 1) // 90 // 2
    drawn = np.random.default_rng(10007 * layer_id).integers(0, bound, size=4, dtype=np.int64)
    primes = [[613, 617, 619, 631, 641, 643], [647, 653, 659, 661, 673, 677]][layer_index]
    compressed = [int(c) if c >= 0 else 89 - 2 for c in token_map()]
    rows = []
    for order in (2, 3, 4):
        rolling = 0
        for back in range(order):
            token = tokens[position - back] if position >= back else 2
            rolling ^= compressed[token] * (2 * int(drawn[back]) + 1)
        for head in range(2):
            column = (order - 2) * 2 + head
            rows.append(rolling % primes[column] + sum(primes[:column]))
    return rows


def in_steps(ngrams: NgramHash, sequences: list[list[int]], cuts: list[list[int]]) -> list[np.ndarray]:
    """Feed each sequence in the given chunks, all sequences side by side in every step; rows per sequence [L, T, C]."""
    done, parts = [0] * len(sequences), [[] for _ in sequences]
    for step in range(max(map(len, cuts))):
        sizes = [cut[step] if step < len(cut) else 0 for cut in cuts]
        tokens = [t for s, n, d in zip(sequences, sizes, done, strict=True) for t in s[d : d + n]]
        before = [
            [s[d - 1 - j] if d - 1 - j >= 0 else BEFORE for j in range(3)] for s, d in zip(sequences, done, strict=True)
        ]
        starts = np.cumsum([0, *sizes])
        rows = ngrams.rows(np.array(tokens, dtype=np.int64), starts, np.array(before))
        for index, size in enumerate(sizes):
            parts[index].append(rows[:, starts[index] : starts[index] + size])
            done[index] += size
    return [np.concatenate(part, axis=1) for part in parts]


def test_rows_are_those_of_the_definition(ngrams: NgramHash) -> None:
    tokens = np.random.default_rng(1).integers(0, VOCAB, 40).tolist()
    (rows,) = in_steps(ngrams, [tokens], [[40]])
    assert rows.tolist() == [[direct_rows(tokens, t, layer) for t in range(40)] for layer in range(2)]


@given(st.data())
def test_rows_do_not_depend_on_chunks_or_on_neighbours_in_the_batch(data: st.DataObject) -> None:
    ngrams = NgramHash(layout(), token_map(), 90)
    sequences = data.draw(
        st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12), min_size=1, max_size=4)
    )
    cuts = []
    for sequence in sequences:
        cut: list[int] = []
        while (left := len(sequence) - sum(cut)) > 0:
            cut.append(data.draw(st.integers(0, left)) if len(cut) < 8 else left)
        cuts.append(cut)
    together = in_steps(ngrams, sequences, cuts)
    for sequence, rows in zip(sequences, together, strict=True):
        (alone,) = in_steps(ngrams, [sequence], [[len(sequence)]])
        assert np.array_equal(rows, alone)


def test_a_step_without_tokens_has_no_rows(ngrams: NgramHash) -> None:
    rows = ngrams.rows(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros((0, 3), np.int64))
    assert rows.shape == (2, 0, 6)


def test_columns_of_a_layer_never_share_a_row_and_no_prime_is_used_twice() -> None:
    found = layout()
    primes = [prime for columns in found.primes for prime in columns]
    assert len(set(primes)) == len(primes) == 12
    assert found.num_rows == tuple(CONFIG["engram_num_embeddings"])


def test_a_config_without_engram_has_no_layout() -> None:
    assert EngramLayout.from_config(SimpleNamespace()) is None
    assert EngramLayout.from_config(SimpleNamespace(engram_layer_ids=[])) is None


def test_a_table_size_that_is_not_the_sum_of_the_primes_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(EngramError, match=r"engram_num_embeddings is \[1, 2\].*612.*\[3764, 3970\]"):
        layout(engram_num_embeddings=[1, 2])


def test_a_missing_key_is_named() -> None:
    config = SimpleNamespace(**{key: value for key, value in CONFIG.items() if key != "engram_head_dim"})
    with pytest.raises(EngramError, match="lacks engram_head_dim"):
        EngramLayout.from_config(config)


def test_another_tokenizer_than_the_weights_were_trained_with_is_refused() -> None:
    with pytest.raises(EngramError, match=r"collapses to 91 ids.*engram_compressed_vocab_size 90"):
        NgramHash(layout(), token_map(), 91)


def word_tokenizer(words: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def test_tokens_that_normalise_alike_share_an_id() -> None:
    words = ["<pad>", "The", "the", " THE ", "t\u0301he", "ﬁ", "fi", " ", "\n\t", "x"]
    mapped, size = build_token_map(word_tokenizer(words), 12)
    by_word = dict(zip(words, mapped.tolist(), strict=False))
    assert by_word["The"] == by_word["the"] == by_word[" THE "] == by_word["t\u0301he"]
    assert by_word["ﬁ"] == by_word["fi"]
    assert by_word[" "] == by_word["\n\t"] != by_word["x"], "a lone space is a token of its own"
    assert mapped[10:].tolist() == [-1, -1], "ids without a token"
    assert size == len({by_word[word] for word in words}) == 5
