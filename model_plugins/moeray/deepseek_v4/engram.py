"""Engram's mathematics: which table rows a token reads, and how they enter the streams.

A token and its predecessors, mapped to a smaller vocabulary, are hashed as n-grams; each (n-gram order, head) has its
own prime-sized range of the layer's table. The rows give one key per hyper-connection stream and one shared value;
a stream adds the value times a gate that tells how well the stream matches its key.

Nothing here imports vLLM. Source: DeepSeek-V4.1's Engram; the constants are part of the checkpoint format.

Suffixes: T tokens of this step, R requests of this step, L Engram layers, C hash columns ((orders - 1) * heads),
B lookback (orders - 1), H hyper-connection streams, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor

IntArray = npt.NDArray[np.int64]

RNG_STRIDE = 10007
GATE_CLAMP = 1e-6
UNKNOWN_TOKEN = -1
"""A lookback before the first token of the request: it hashes as the pad token."""

# A token that is one space must survive Strip() instead of merging with the tokens that normalise to nothing.
_LONE_SPACE = "\ue000"
_UNDECODABLE = "\ufffd"


class EngramError(ValueError):
    """A configuration or checkpoint whose Engram parts contradict each other; says which and how."""


@dataclass(frozen=True, slots=True)
class EngramLayout:
    """The addresses of every layer's table, from the `engram_*` keys of config.json.

    Attributes:
        layer_ids: [L] model layers that have an Engram.
        primes: [L][C] rows of each hash column, orders first, then heads; no prime is used twice.
        pad_token_id: raw token id, mapped like any other before it is hashed.
    """

    layer_ids: tuple[int, ...]
    primes: tuple[tuple[int, ...], ...]
    max_ngram_size: int
    n_heads: int
    head_dim: int
    compressed_vocab_size: int
    pad_token_id: int

    @classmethod
    def from_config(cls, config: Any) -> EngramLayout | None:
        """Read a Hugging Face config; None where the model has no Engram.

        Raises:
            EngramError: a key is missing, or `engram_num_embeddings` is not the sum of the primes.
        """
        layer_ids = tuple(getattr(config, "engram_layer_ids", None) or ())
        if not layer_ids:
            return None
        try:
            orders, heads = int(config.engram_max_ngram_size) - 1, int(config.engram_n_heads)
            layout = cls(
                layer_ids=layer_ids,
                primes=_draw_primes(len(layer_ids), orders, heads, int(config.engram_vocab_size)),
                max_ngram_size=orders + 1,
                n_heads=heads,
                head_dim=int(config.engram_head_dim),
                compressed_vocab_size=int(config.engram_compressed_vocab_size),
                pad_token_id=int(config.engram_pad_token_id),
            )
            declared = tuple(config.engram_num_embeddings)
        except AttributeError as missing:
            raise EngramError(
                f"config.json names engram_layer_ids {list(layer_ids)} but lacks {missing.name}"
            ) from None
        if declared != layout.num_rows:
            raise EngramError(
                f"config.json: engram_num_embeddings is {list(declared)}, but {layout.num_columns} primes per layer "
                f"from engram_vocab_size {config.engram_vocab_size} on sum to {list(layout.num_rows)}"
            )
        return layout

    @property
    def lookback(self) -> int:
        """Tokens before a token that its rows depend on (B)."""
        return self.max_ngram_size - 1

    @property
    def num_columns(self) -> int:
        """Rows read per token and layer (C)."""
        return self.lookback * self.n_heads

    @property
    def num_rows(self) -> tuple[int, ...]:
        """[L] rows of each layer's table."""
        return tuple(sum(columns) for columns in self.primes)

    def index_of_layer(self, layer_id: int) -> int:
        """Position of a model layer among the Engram layers."""
        return self.layer_ids.index(layer_id)


def _draw_primes(num_layers: int, orders: int, heads: int, lower_bound: int) -> tuple[tuple[int, ...], ...]:
    """[L][C] primes: every order starts again at `lower_bound` and takes the next ones that are still free."""
    taken: set[int] = set()
    layers = []
    for _ in range(num_layers):
        columns: list[int] = []
        for _ in range(orders):
            candidate = lower_bound - 1
            for _ in range(heads):
                candidate += 1
                while candidate in taken or not _is_prime(candidate):
                    candidate += 1
                taken.add(candidate)
                columns.append(candidate)
        layers.append(tuple(columns))
    return tuple(layers)


def _is_prime(number: int) -> bool:
    if number < 4:
        return number > 1
    return number % 2 == 1 and all(number % divisor for divisor in range(3, int(number**0.5) + 1, 2))


def build_token_map(tokenizer: Tokenizer, vocab_size: int) -> tuple[IntArray, int]:
    """Give tokens that normalise alike (" The", "the", "THE") one compressed id.

    Args:
        tokenizer: the raw tokenizer of the checkpoint; decoding must not clean up spaces.
        vocab_size: rows of the model's embedding; ids the tokenizer does not know map to -1.
    Returns:
        int64 [vocab_size] compressed ids in order of first appearance, and how many there are.
    """
    normaliser = _normaliser()
    known = tokenizer.get_vocab_size(with_added_tokens=True)
    token_map = np.full(max(vocab_size, known), UNKNOWN_TOKEN, dtype=np.int64)
    seen: dict[str, int] = {}
    texts = tokenizer.decode_batch([[token_id] for token_id in range(known)], skip_special_tokens=False)
    for token_id, text in enumerate(texts):
        if _UNDECODABLE in text:  # part of a UTF-8 sequence: nothing to normalise, its raw form is the key
            key = str(tokenizer.id_to_token(token_id))
        else:
            key = normaliser.normalize_str(text) or text
        token_map[token_id] = seen.setdefault(key, len(seen))
    return token_map, len(seen)


def _normaliser() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )


class NgramHash:
    """Token ids -> table rows for every Engram layer. Immutable after construction, safe to share.

    Args:
        token_map: int64 [V] from `build_token_map`, -1 for ids without a token.
        compressed_vocab_size: how many compressed ids the map has.
    Raises:
        EngramError: the tokenizer's map has another size than the checkpoint was trained with. Every hash multiplier
            derives from it, so going on would read other rows than were trained.
    """

    def __init__(self, layout: EngramLayout, token_map: IntArray, compressed_vocab_size: int) -> None:
        if compressed_vocab_size != layout.compressed_vocab_size:
            raise EngramError(
                f"the tokenizer collapses to {compressed_vocab_size} ids, but config.json says "
                f"engram_compressed_vocab_size {layout.compressed_vocab_size}: they do not belong together"
            )
        self.layout = layout
        self._pad = token_map[layout.pad_token_id]
        self._token_map = np.where(token_map == UNKNOWN_TOKEN, self._pad, token_map)
        self._multipliers_LN = np.stack([hash_multipliers(layer, layout) for layer in layout.layer_ids])
        orders, heads = layout.lookback, layout.n_heads
        self._primes_LBN = np.array(layout.primes, dtype=np.int64).reshape(-1, orders, heads)
        offsets = [list(accumulate((0, *columns[:-1]))) for columns in layout.primes]
        self._offsets_LBN = np.array(offsets, dtype=np.int64).reshape(-1, orders, heads)

    def rows(self, token_ids_T: IntArray, starts_R1: IntArray, lookback_RB: IntArray) -> IntArray:
        """Address the rows of one step's tokens.

        Args:
            token_ids_T: the step's token ids, request after request.
            starts_R1: [R + 1] where each request's tokens begin; the last is T. A request may have no token.
            lookback_RB: [R, B] raw ids before each request's first token of this step, nearest first; -1 before the
                beginning of the request.
        Returns:
            int64 [L, T, C] row of the layer's table for every (token, hash column).
        """
        ids_TB1 = self._history(token_ids_T, starts_R1, lookback_RB)
        rolling_LT = ids_TB1[:, 0] * self._multipliers_LN[:, :1]
        columns = []
        for shift in range(1, self.layout.max_ngram_size):
            rolling_LT = rolling_LT ^ (ids_TB1[:, shift] * self._multipliers_LN[:, shift : shift + 1])
            primes_L1N, offsets_L1N = self._primes_LBN[:, None, shift - 1], self._offsets_LBN[:, None, shift - 1]
            columns.append(rolling_LT[..., None] % primes_L1N + offsets_L1N)
        return np.concatenate(columns, axis=-1)

    def _history(self, token_ids_T: IntArray, starts_R1: IntArray, lookback_RB: IntArray) -> IntArray:
        """[T, B + 1] compressed ids of each token and its predecessors, nearest first."""
        num_tokens = len(token_ids_T)
        token_T = np.arange(num_tokens)
        request_T = np.repeat(np.arange(len(starts_R1) - 1), np.diff(starts_R1))
        within_T = token_T - starts_R1[request_T]
        raw_TB1 = np.empty((num_tokens, self.layout.max_ngram_size), dtype=np.int64)
        for shift in range(self.layout.max_ngram_size):
            inside_T = within_T >= shift
            raw_TB1[:, shift] = token_ids_T[np.where(inside_T, token_T - shift, 0)] if num_tokens else 0
            outside = np.flatnonzero(~inside_T)
            raw_TB1[outside, shift] = lookback_RB[request_T[outside], shift - 1 - within_T[outside]]
        return np.where(raw_TB1 == UNKNOWN_TOKEN, self._pad, self._token_map[raw_TB1])


def hash_multipliers(layer_id: int, layout: EngramLayout) -> IntArray:
    """[B + 1] odd multipliers of a layer, small enough that (compressed id * multiplier) stays in int64."""
    bound = max(1, int(np.iinfo(np.int64).max) // layout.compressed_vocab_size // 2)
    drawn = np.random.default_rng(RNG_STRIDE * layer_id).integers(0, bound, size=layout.max_ngram_size, dtype=np.int64)
    return drawn * 2 + 1


def add_gated_value(
    streams_THD: Tensor, kv: Tensor, q_weight_HD: Tensor, k_weight_HD: Tensor, rms_eps: float
) -> Tensor:
    """Add the gated value to every stream; computed in fp32.

    Args:
        streams_THD: hyper-connection streams before the block's mHC pre.
        kv: [T, (H + 1) * D] the projection of the token's rows: H keys, then the shared value.
        q_weight_HD, k_weight_HD: norm weights of stream and key.
        rms_eps: the model's `rms_norm_eps`.
    Returns:
        [T, H, D] in the dtype of `streams_THD`; the input is not written.
    """
    num_streams, hidden = q_weight_HD.shape
    h = streams_THD.float()
    key_and_value = kv.float().view(-1, num_streams + 1, hidden)
    key, value = key_and_value[:, :num_streams], key_and_value[:, num_streams:]
    match = (h * (q_weight_HD.float() * k_weight_HD.float()) * key).sum(-1, keepdim=True)
    match = match * _inverse_rms(h, rms_eps) * _inverse_rms(key, rms_eps) * hidden**-0.5
    magnitude = match.abs().clamp_min(GATE_CLAMP).sqrt()
    gate = torch.where(match < 0, -magnitude, magnitude).sigmoid()
    return (h + gate * value).to(streams_THD.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    mean_square: Tensor = x.square().mean(-1, keepdim=True)
    return torch.rsqrt(mean_square + eps)
