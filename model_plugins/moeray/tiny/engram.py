"""Reference Engram in PyTorch: hashed n-gram rows, gated into the hyper-connection streams.

Written from the mathematics of DeepSeek-V4.1's Engram, independent of vLLM's kernels, so that
tests can hold any other implementation to it.

Shape suffixes: B batch, S sequence, C hash columns, H hyper-connection streams, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, normalizers
from torch import Tensor, nn
from torch.nn import functional

GATE_CLAMP = 1e-6
RNG_STRIDE = 10007
SPACE_SENTINEL = "\ue000"
REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class EngramConfig:
    """The ``engram_*`` keys of config.json that decide addresses and sizes.

    ``vocab_size`` is the lower bound of the first prime of every n-gram order (rows per head);
    ``pad_token_id`` is a raw token id, mapped like any other before it is hashed.
    """

    layer_ids: tuple[int, ...] = (1, 2)
    max_ngram_size: int = 4
    n_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 4096
    pad_token_id: int = 2

    @property
    def num_hash_columns(self) -> int:
        """Rows read per token and layer."""
        return (self.max_ngram_size - 1) * self.n_heads

    def primes(self) -> tuple[tuple[int, ...], ...]:
        """Return the modulus of each hash column, per layer; no prime is used twice."""
        taken: set[int] = set()
        layers = []
        for _ in self.layer_ids:
            columns: list[int] = []
            for _ in range(self.max_ngram_size - 1):
                candidate = self.vocab_size - 1
                for _ in range(self.n_heads):
                    candidate = next_prime(candidate, taken)
                    taken.add(candidate)
                    columns.append(candidate)
            layers.append(tuple(columns))
        return tuple(layers)

    def num_embeddings(self) -> tuple[int, ...]:
        """Return the rows of each layer's table."""
        return tuple(sum(columns) for columns in self.primes())


@dataclass(frozen=True)
class TokenMap:
    """Token id -> compressed id: tokens that normalise alike share one id."""

    compressed_ids: tuple[int, ...]
    compressed_vocab_size: int


def is_prime(number: int) -> bool:
    """Trial division; tables here have a few thousand rows per head."""
    return number > 1 and all(number % i for i in range(2, int(number**0.5) + 1))


def next_prime(start: int, taken: set[int]) -> int:
    """Return the smallest prime above ``start`` that is not in ``taken``."""
    candidate = start + 1
    while candidate in taken or not is_prime(candidate):
        candidate += 1
    return candidate


def _normaliser() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), SPACE_SENTINEL),
            normalizers.Strip(),
            normalizers.Replace(SPACE_SENTINEL, " "),
        ]
    )


def build_token_map(tokenizer: Any) -> TokenMap:
    """Collapse the ids of a fast tokenizer: " The", "the" and "THE" hash alike."""
    backend, normaliser = tokenizer.backend_tokenizer, _normaliser()
    seen: dict[str, int] = {}
    compressed = []
    for token_id in range(len(tokenizer)):
        text = backend.decode([token_id], skip_special_tokens=False)
        if REPLACEMENT in text:  # part of a UTF-8 sequence: its raw form is its key
            key = backend.id_to_token(token_id)
        else:
            key = normaliser.normalize_str(text) or text
        compressed.append(seen.setdefault(key, len(seen)))
    return TokenMap(tuple(compressed), len(seen))


def hash_multipliers(layer_id: int, max_ngram_size: int, compressed_vocab_size: int) -> list[int]:
    """Return one odd multiplier per lookback, small enough that id * multiplier fits int64."""
    bound = max(1, int(np.iinfo(np.int64).max) // compressed_vocab_size // 2)
    drawn = np.random.default_rng(RNG_STRIDE * layer_id).integers(0, bound, size=(max_ngram_size,), dtype=np.int64)
    return [int(value) * 2 + 1 for value in drawn]


class Engram(nn.Module):
    """One layer's table and gate.

    The rows of a token (one per hash column) give, through ``wkv``, a key for every stream and one
    shared value; each stream adds the value times the sigmoid of its match with its key.
    """

    compressed_ids: Tensor
    multipliers: Tensor
    primes: Tensor
    offsets: Tensor

    def __init__(
        self,
        config: EngramConfig,
        layer_id: int,
        token_map: TokenMap,
        hidden_size: int,
        hc_mult: int,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        self.config, self.hc_mult, self.eps = config, hc_mult, rms_norm_eps
        primes = config.primes()[config.layer_ids.index(layer_id)]
        multipliers = hash_multipliers(layer_id, config.max_ngram_size, token_map.compressed_vocab_size)
        offsets = [sum(primes[:i]) for i in range(len(primes))]
        for name, values in (
            ("compressed_ids", token_map.compressed_ids),
            ("multipliers", multipliers),
            ("primes", primes),
            ("offsets", offsets),
        ):
            self.register_buffer(name, torch.tensor(values, dtype=torch.int64), persistent=False)
        self.embed = nn.Embedding(sum(primes), config.head_dim)
        width = config.num_hash_columns * config.head_dim
        self.wkv = nn.Linear(width, hidden_size * (hc_mult + 1), bias=False)
        self.q_weight = nn.Parameter(torch.ones(hc_mult, hidden_size))
        self.k_weight = nn.Parameter(torch.ones(hc_mult, hidden_size))

    def rows(self, token_ids_BS: Tensor) -> Tensor:
        """Return the table row of every (token, hash column): int64 [B, S, C].

        Lookbacks before the first token read the mapped pad id.
        """
        ids_BS = self.compressed_ids[token_ids_BS]
        pad = int(self.compressed_ids[self.config.pad_token_id])
        heads, length = self.config.n_heads, ids_BS.shape[1]
        rolling_BS = torch.zeros_like(ids_BS)
        columns = []
        for shift in range(self.config.max_ngram_size):
            past_BS = functional.pad(ids_BS, (shift, 0), value=pad)[:, :length]
            rolling_BS = rolling_BS ^ (past_BS * self.multipliers[shift])
            if shift:
                span = slice((shift - 1) * heads, shift * heads)
                columns.append(rolling_BS[..., None] % self.primes[span] + self.offsets[span])
        return torch.cat(columns, dim=-1)

    def forward(self, streams_BSHD: Tensor, token_ids_BS: Tensor) -> Tensor:
        """Return the streams with the gated value added; same shape and dtype."""
        h = streams_BSHD
        batch, length, _, hidden = h.shape
        kv = self.wkv(self.embed(self.rows(token_ids_BS)).flatten(-2))
        key_BSHD = kv[..., : self.hc_mult * hidden].view(batch, length, self.hc_mult, hidden)
        value_BS1D = kv[..., None, self.hc_mult * hidden :]
        dot = (h * self.q_weight * self.k_weight * key_BSHD).sum(-1, keepdim=True)
        dot = dot * self._inverse_rms(h) * self._inverse_rms(key_BSHD) * hidden**-0.5
        magnitude = dot.abs().clamp_min(GATE_CLAMP).sqrt()
        gate = torch.sigmoid(torch.where(dot < 0, -magnitude, magnitude))
        gated: Tensor = h + gate * value_BS1D
        return gated

    def _inverse_rms(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
