"""DeepSeek-V4's routed experts and Engram, read from the published mathematics in numpy and Python integers.

Nothing of moeray or of torch is used: weight files are parsed here, bf16 is widened here, sums are in float64. Slow and
plain on purpose: what these functions say is what the product is held to.

Suffixes: T tokens, D hidden, I expert width, L Engram layers, C hash columns, H streams.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Array = NDArray[np.float64]
INT64_MAX = 2**63 - 1


class NumpyCheckpoint:
    """A directory's weight files; tensors as float64."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config: Mapping[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        self._places: dict[str, tuple[Path, int, Mapping[str, Any]]] = {}
        for file in sorted(directory.glob("*.safetensors")):
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length))
            self._places |= {name: (file, 8 + length, entry) for name, entry in header.items() if "dtype" in entry}

    def tensor(self, name: str) -> Array:
        """Values of a BF16 or F32 tensor."""
        file, base, entry = self._places[name]
        begin, end = entry["data_offsets"]
        with file.open("rb") as stream:
            stream.seek(base + begin)
            data = stream.read(end - begin)
        if entry["dtype"] == "BF16":  # the upper half of an fp32
            bits = np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16
            values = bits.view(np.float32)
        else:
            assert entry["dtype"] == "F32", entry["dtype"]
            values = np.frombuffer(data, dtype="<f4")
        return values.astype(np.float64).reshape(entry["shape"])

    def expert(self, layer: int, expert: int, x_D: Array) -> Array:
        """w2 (silu(min(w1 x, limit)) * clamp(w3 x, -limit, limit)) of one token."""
        prefix = f"layers.{layer}.ffn.experts.{expert}"
        w1, w2, w3 = (self.tensor(f"{prefix}.{part}.weight") for part in ("w1", "w2", "w3"))
        limit = self.config["swiglu_limit"] or np.inf
        gate_I, up_I = np.minimum(w1 @ x_D, limit), np.clip(w3 @ x_D, -limit, limit)
        result: Array = w2 @ (gate_I / (1 + np.exp(-gate_I)) * up_I)
        return result

    @cached_property
    def compressed_ids(self) -> list[int]:
        """Token id -> id of its normalised text, in order of first appearance."""
        tokenizer = Tokenizer.from_file(str(self.directory / "tokenizer.json"))
        seen: dict[str, int] = {}
        return [
            seen.setdefault(_normalised(tokenizer, token), len(seen)) for token in range(tokenizer.get_vocab_size())
        ]

    def engram_primes(self) -> list[list[int]]:
        """[L][C] moduli: every order begins at engram_vocab_size again, and no prime is taken twice."""
        config, taken, layers = self.config, set[int](), []
        for _ in config["engram_layer_ids"]:
            columns = []
            for _ in range(config["engram_max_ngram_size"] - 1):
                candidate = config["engram_vocab_size"]
                for _ in range(config["engram_n_heads"]):
                    while candidate in taken or any(candidate % i == 0 for i in range(2, int(candidate**0.5) + 1)):
                        candidate += 1
                    taken.add(candidate)
                    columns.append(candidate)
            layers.append(columns)
        return layers

    def engram_rows(self, tokens: Sequence[int]) -> list[list[list[int]]]:
        """[L][T][C] table rows of a whole sequence, in unbounded integers."""
        config, ids = self.config, self.compressed_ids
        orders, heads = config["engram_max_ngram_size"], config["engram_n_heads"]
        result = []
        for layer, primes in zip(config["engram_layer_ids"], self.engram_primes(), strict=True):
            bound = max(1, INT64_MAX // (max(ids) + 1) // 2)
            drawn = np.random.default_rng(10007 * layer).integers(0, bound, size=orders, dtype=np.int64)
            odd = [2 * int(each) + 1 for each in drawn]
            rows = []
            for t in range(len(tokens)):
                past = [tokens[t - back] if t >= back else config["engram_pad_token_id"] for back in range(orders)]
                rolling, row = ids[past[0]] * odd[0], []
                for back in range(1, orders):
                    rolling ^= ids[past[back]] * odd[back]
                    columns = range((back - 1) * heads, back * heads)
                    row += [rolling % primes[column] + sum(primes[:column]) for column in columns]
                rows.append(row)
            result.append(rows)
        return result

    def engram(self, layer: int, streams_THD: Array, rows_TC: Sequence[Sequence[int]]) -> Array:
        """The streams with the layer's gated value added: [T, H, D]."""
        prefix, eps = f"layers.{layer}.engram", self.config["rms_norm_eps"]
        table, wkv = self.tensor(f"{prefix}.embed.weight"), self.tensor(f"{prefix}.wkv.weight")
        q_HD, k_HD = self.tensor(f"{prefix}.q_weight"), self.tensor(f"{prefix}.k_weight")
        num_streams, hidden = q_HD.shape
        out = streams_THD.copy()
        for t, rows in enumerate(rows_TC):
            projected = wkv @ np.concatenate([table[row] for row in rows])
            value = projected[num_streams * hidden :]
            for h in range(num_streams):
                stream, key = streams_THD[t, h], projected[h * hidden : (h + 1) * hidden]
                normed_stream = stream / np.sqrt(np.mean(stream**2) + eps) * q_HD[h]
                normed_key = key / np.sqrt(np.mean(key**2) + eps) * k_HD[h]
                match = normed_stream @ normed_key / np.sqrt(hidden)
                root = np.sign(match) * np.sqrt(max(abs(match), 1e-6))
                out[t, h] += value / (1 + np.exp(-root))
        return out


def _normalised(tokenizer: Tokenizer, token: int) -> str:
    text = tokenizer.decode([token], skip_special_tokens=False)
    if "\ufffd" in text:  # a part of a character: its raw form is its key
        return str(tokenizer.id_to_token(token))
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(each for each in plain if unicodedata.category(each) != "Mn").lower()
    for space in "\t\r\n":
        plain = plain.replace(space, " ")
    while "  " in plain:
        plain = plain.replace("  ", " ")
    return (plain if plain == " " else plain.strip()) or text
