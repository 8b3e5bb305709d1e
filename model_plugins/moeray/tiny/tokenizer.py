"""Byte-level BPE tokenizer with DeepSeek's special tokens, trained on the dialogues' own text."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm.tokenizers import deepseek_v4_encoding as encoding

VOCAB_SIZE = 2048
PAD = "<｜▁pad▁｜>"
# Parsers read these in the decoded text, so they must survive skip_special_tokens=True.
PLAIN_TOKENS = (
    encoding.thinking_start_token,
    encoding.thinking_end_token,
    encoding.dsml_token,
    "<tool_result>",
    "</tool_result>",
)
# The order gives the ids: begin 0, end 1, pad 2.
ADDED_TOKENS = (
    encoding.bos_token,
    encoding.eos_token,
    PAD,
    encoding.USER_SP_TOKEN,
    encoding.ASSISTANT_SP_TOKEN,
    *PLAIN_TOKENS,
    encoding.LATEST_REMINDER_SP_TOKEN,
    *encoding.DS_TASK_SP_TOKENS.values(),
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train on rendered dialogues; deterministic for the same texts.

    Added tokens are cut out of the texts first, so that no merge learns their inside.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in ADDED_TOKENS],
        show_progress=False,
    )
    bpe.train_from_iterator((_without_added_tokens(text) for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=_with_plain_tokens(bpe),
        bos_token=encoding.bos_token,
        eos_token=encoding.eos_token,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def _without_added_tokens(text: str) -> str:
    for token in ADDED_TOKENS:
        text = text.replace(token, "\n")
    return text


def _with_plain_tokens(bpe: Tokenizer) -> Tokenizer:
    state = json.loads(bpe.to_str())
    for token in state["added_tokens"]:
        token["special"] = token["content"] not in PLAIN_TOKENS
    return Tokenizer.from_str(json.dumps(state))
