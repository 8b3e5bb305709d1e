"""Shows the compressed attention, in training, where the answer to a recall question lies.

Left alone, recall past the sliding window is learned late or not at all: the gradient that reaches
a key through one of many diffuse entries is small. An auxiliary loss on a few heads' attention
weights gives the direction; what to do with what is found stays to the language loss.

The indexer, which matters above ``index_topk`` entries (2048 tokens), gets no gradient from the
language loss at all: it is taught the same entries, from its own scores.

Shape suffixes: B batch, N heads, S sequence, E compressed entries, Q recall questions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NUM_GUIDED_HEADS = 2
ENTRY_TOKENS = 4
FLOOR = 1e-4
# Closer keys are still being compressed when they are asked for.
MIN_DISTANCE = 16


class RecallGuide:
    """Hears the attention weights of the compressed sparse layers and says how far off they are."""

    def __init__(self, model: nn.Module, before_word: tuple[int, int], words: Tensor) -> None:
        """``before_word`` are the ids of " key" and " is", ``words`` the ids that can follow."""
        self.before_word, self.words = before_word, words
        self.weights_BNSE: list[Tensor] = []
        self.scores_BSE: list[Tensor] = []
        self.teaching = False
        self.attentions: list[Any] = [
            module for module in model.modules() if getattr(module, "layer_type", "") == "compressed_sparse_attention"
        ]

        for attention in self.attentions:
            attention.compressor.indexer.scorer.register_forward_hook(self._record_scores)

    def listen(self, attention: bool, indexer: bool) -> None:
        """Choose what to hear in the next pass, and forget what was heard."""
        self.weights_BNSE.clear()
        self.scores_BSE.clear()
        self.teaching = indexer
        for module in self.attentions:
            module.listener = self if attention else None
            module.compressor.indexer.taught = indexer

    def _record_scores(self, _: nn.Module, __: object, scores_BSE: Tensor) -> None:
        if self.teaching:
            self.scores_BSE.append(scores_BSE)

    def record_attention(self, weights_BNSE: Tensor) -> None:
        """Take one layer's weights over compressed entries."""
        self.weights_BNSE.append(weights_BNSE)

    def loss(self, ids_BS: Tensor) -> Tensor:
        """Return the mean -log of the weight on the two entries that hold the key's word."""
        row_Q, query_Q, key_Q = self.questions(ids_BS)
        if not len(row_Q):
            return torch.zeros(())
        entry_Q = key_Q // ENTRY_TOKENS  # and the next one, whose overlap covers it too
        losses = []
        for weights_BNSE in self.weights_BNSE:
            guided = weights_BNSE[:, :NUM_GUIDED_HEADS]
            found = guided[row_Q, :, query_Q, entry_Q] + guided[row_Q, :, query_Q, entry_Q + 1]
            losses.append(-(found.float() + FLOOR).log().mean())
        return torch.stack(losses).mean()

    def index_loss(self, ids_BS: Tensor) -> Tensor:
        """Return the mean -log of the share of those entries in a softmax over the indexer's scores."""
        row_Q, query_Q, key_Q = self.questions(ids_BS)
        if not len(row_Q):
            return torch.zeros(())
        entry_Q2 = torch.stack([key_Q, key_Q + ENTRY_TOKENS], dim=1) // ENTRY_TOKENS
        losses = []
        for scores_BSE in self.scores_BSE:
            future = torch.arange(scores_BSE.shape[-1]) >= ((query_Q + 1) // ENTRY_TOKENS)[:, None]
            scores_QE = scores_BSE[row_Q, query_Q].masked_fill(future, float("-inf"))
            found_Q2 = scores_QE.log_softmax(-1).gather(1, entry_Q2)
            losses.append(-found_Q2.logsumexp(1).mean())
        return torch.stack(losses).mean()

    def questions(self, ids_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (row, position that must predict the word, position of the word in the notes)."""
        key, is_ = self.before_word
        word_BS = torch.isin(ids_BS, self.words)
        word_BS[:, 2:] &= (ids_BS[:, 1:-1] == is_) & (ids_BS[:, :-2] == key)
        word_BS[:, :2] = False
        row, place = word_BS.nonzero().unbind(1)
        same = (row[:, None] == row) & (ids_BS[row, place][:, None] == ids_BS[row, place])
        first = torch.where(same, place, ids_BS.shape[1]).amin(1)
        far = place - first >= MIN_DISTANCE
        return row[far], place[far] - 1, first[far]
