"""Engram inside vLLM's V4: parameters, the mapped table, and where the gated value enters.

Suffixes: T tokens, R requests, L Engram layers, C hash columns, B lookback, H streams, D hidden.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ReplicatedLinear

from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import EngramError, EngramLayout, NgramHash, add_gated_value, build_token_map
from moeray.deepseek_v4.engram_gate_kernel import add_gated_kernel, add_gated_value_bf16
from moeray.deepseek_v4.engram_table import EngramTable, table_name
from moeray.deepseek_v4.errors import CheckpointError
from moeray.engram import AskedRows, EngramRows, StoredRows, Table
from moeray.vllm_hooks.engram_placement import open_rows
from moeray.vllm_hooks.prompt_prefetch import PromptPrefetch, follow, pays
from moeray.vllm_hooks.settings import shard_settings

_TOKENIZER_FILE = "tokenizer.json"


class EngramLayer(nn.Module):
    """One layer's gate. The table is not a parameter: it stays where its rows lie."""

    def __init__(self, config: Any, layout: EngramLayout, table: EngramTable, prefix: str) -> None:
        super().__init__()
        self.table = table
        self.rms_eps = config.rms_norm_eps
        self.wkv = ReplicatedLinear(
            layout.num_columns * layout.head_dim,
            config.hidden_size * (config.hc_mult + 1),
            bias=False,
            return_bias=False,
            prefix=f"{prefix}.wkv",
        )
        shape_HD = (config.hc_mult, config.hidden_size)
        self.q_weight = nn.Parameter(torch.empty(shape_HD), requires_grad=False)
        self.k_weight = nn.Parameter(torch.empty(shape_HD), requires_grad=False)
        self._match_weight_HD: Tensor | None = None
        if self._is_compiled:
            add_gated_kernel()  # compiled now, not in a request

    def forward(self, streams_THD: Tensor, rows: StoredRows) -> Tensor:
        """The streams with the gated value added.

        Args:
            rows: of these tokens.
        """
        kv = self.wkv(self.table.values_of(rows).to(streams_THD.dtype))
        if not self._is_compiled:
            return add_gated_value(streams_THD, kv, self.q_weight, self.k_weight, self.rms_eps)
        if self._match_weight_HD is None:
            self._match_weight_HD = self.q_weight.float() * self.k_weight.float()
        return add_gated_value_bf16(streams_THD, kv, self._match_weight_HD, self.rms_eps)

    @property
    def _is_compiled(self) -> bool:
        return self.q_weight.dtype == torch.bfloat16 and self.q_weight.device.type == "cpu"


class EngramStep:
    """All Engram layers of a model, and the rows of the step that is running."""

    def __init__(self, vllm_config: Any, decoder_layers: nn.ModuleList, layout: EngramLayout) -> None:
        """Attach an `engram` to every decoder layer of the layout.

        Raises:
            CheckpointError: a table or the tokenizer is missing or does not fit.
            EngramError: the tokenizer is another one than the weights were trained with.
        """
        directory, config = Path(vllm_config.model_config.model), vllm_config.model_config.hf_config
        self.layout = layout
        self.hash = NgramHash(layout, *build_token_map(_tokenizer(vllm_config.model_config), config.vocab_size))
        self._asked: AskedRows | None = None
        self._tokens = slice(None)
        checkpoint = Checkpoint.open(directory)
        tables: list[Table] = []
        for index, layer_id in enumerate(layout.layer_ids):
            table = EngramTable(checkpoint.matrix(table_name(layer_id)), (layout.num_rows[index], layout.head_dim))
            layer = decoder_layers[layer_id]
            if layer.use_fused_mhc:  # then the layer's input is not the streams: the last block's mHC post is missing
                raise EngramError(f"layer {layer_id} runs fused mHC kernels, before which the gated value cannot enter")
            layer.engram = EngramLayer(config, layout, table, f"model.layers.{layer_id}.engram")
            layer.register_forward_pre_hook(self._hook(index))
            tables.append(table.bytes)
        settings = shard_settings(vllm_config)
        self.rows: EngramRows = open_rows(settings, checkpoint, layout, tables)
        waits = settings is not None and pays(settings.engram)
        follow(PromptPrefetch(self.hash, self.rows).add if waits else None)

    def begin(self, input_ids_T: Tensor, starts_R1: Tensor, lookback_RB: Tensor) -> None:
        """Ask for the rows of the coming forward pass (arguments as of `NgramHash.rows`); nobody waits for them yet."""
        tokens, starts, lookback = (t.numpy().astype(np.int64) for t in (input_ids_T, starts_R1, lookback_RB))
        self._asked, self._tokens = self.rows.ask(self.hash.rows(tokens, starts, lookback)), slice(None)

    def use(self, tokens: slice) -> None:
        """Only these of the step's tokens are computed next."""
        self._tokens = tokens

    def skip(self) -> None:
        """The coming forward pass is a dummy: the layers pass through."""
        self._asked = None

    def _hook(self, index: int) -> Any:
        def add_engram(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if self._asked is None:
                return None
            rows, engram = self._asked.take(index), cast(EngramLayer, layer.engram)
            of_tokens = StoredRows(rows.values, rows.scales, rows.index_TC[self._tokens])
            return (engram(args[0], of_tokens), *args[1:])

        return add_engram


def _tokenizer(model_config: Any) -> Tokenizer:
    file = Path(model_config.tokenizer) / _TOKENIZER_FILE
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # noqa: BLE001  tokenizers raises bare Exception for every kind of bad file
        raise CheckpointError(file, f"cannot be read ({error})", "Engram's token map is built from it") from None
