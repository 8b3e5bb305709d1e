"""Rows of prompts that wait: the same that their steps ask for, few prompts at a time, and no error of anybody's."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from tokenizers import Tokenizer
from transport_peers import eventually

from moeray.config import EngramConfig
from moeray.deepseek_v4.checkpoint import Checkpoint
from moeray.deepseek_v4.engram import NgramHash, build_token_map
from moeray.deepseek_v4.engram_files import engram_layout
from moeray.deepseek_v4.source import locate
from moeray.engram import IntArray
from moeray.vllm_hooks.prompt_prefetch import MAX_QUEUED, MAX_TOKENS, PromptPrefetch, pays

PROMPT = [5, 9, 9, 300, 12, 7]


class Rows:
    """Notes what it is asked to bring; waits for `go_on`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.brought: list[IntArray] = []
        self.go_on, self.error = threading.Event(), error

    def prefetch(self, rows_LTC: IntArray) -> None:
        self.go_on.wait(10)
        self.brought.append(rows_LTC)
        if self.error is not None:
            raise self.error


@pytest.fixture(scope="module")
def hashes() -> NgramHash:
    directory = locate("moeray-tiny")
    checkpoint = Checkpoint.open(directory)
    layout = engram_layout(checkpoint)
    assert layout is not None
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    return NgramHash(layout, *build_token_map(tokenizer, checkpoint.config["vocab_size"]))


def test_a_prompts_rows_are_those_that_its_steps_ask_for_whatever_its_length(hashes: NgramHash) -> None:
    rows = Rows()
    rows.go_on.set()
    prefetch = PromptPrefetch(hashes, rows)  # type: ignore[arg-type]
    prefetch.add(PROMPT)
    prefetch.add(PROMPT * 2000)
    assert eventually(lambda: len(rows.brought) == 2)
    nobody = np.full((1, hashes.layout.lookback), -1)
    first = hashes.rows(np.array(PROMPT[:4]), np.array([0, 4]), nobody)
    then = hashes.rows(np.array(PROMPT[4:]), np.array([0, 2]), np.array([PROMPT[3:0:-1]]))
    assert np.array_equal(rows.brought[0], np.concatenate([first, then], axis=1))
    assert rows.brought[1].shape[1] == MAX_TOKENS


def test_prompts_beyond_those_that_wait_are_left(hashes: NgramHash) -> None:
    rows = Rows()
    prefetch = PromptPrefetch(hashes, rows)  # type: ignore[arg-type]
    for _ in range(MAX_QUEUED + 5):
        prefetch.add(PROMPT)
    rows.go_on.set()
    assert eventually(lambda: len(rows.brought) == MAX_QUEUED)
    prefetch.add(PROMPT)
    assert eventually(lambda: len(rows.brought) == MAX_QUEUED + 1)


def test_what_cannot_be_brought_is_said_and_harms_nobody(hashes: NgramHash, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows(OSError("disk"))
    rows.go_on.set()
    prefetch = PromptPrefetch(hashes, rows)  # type: ignore[arg-type]
    for count in (1, 2):
        prefetch.add(PROMPT)
        assert eventually(lambda count=count: len(rows.brought) == count)  # type: ignore[misc]
    assert eventually(lambda: "were not brought beforehand" in caplog.text)


@pytest.mark.parametrize(
    ("engram", "expected"),
    [
        (EngramConfig(), False),
        (EngramConfig(prefault=False), True),
        (EngramConfig("device"), False),
        (EngramConfig("sharded", num_servers=1), False),
        (EngramConfig("redis", redis_url="redis://a:1/0"), True),
    ],
)
def test_it_pays_where_rows_can_be_waited_for(engram: EngramConfig, expected: bool) -> None:
    assert pays(engram) is expected
