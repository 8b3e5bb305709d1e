"""Wherever Engram rows lie, an engine computes the same numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import redis_server
import torch
from engines import in_process_engine
from redis import Redis
from redis_server import RedisServer
from transport_peers import eventually
from vllm import SamplingParams

from moeray.config import EngramConfig
from moeray.deepseek_v4 import Checkpoint
from moeray.deepseek_v4.engram_files import engram_layout, engram_tables
from moeray.deepseek_v4.source import locate
from moeray.engram import Shares
from moeray.engram.held_rows import HeldRows
from moeray.engram.row_server import RowServer
from moeray.vllm_hooks.settings import ShardSettings

PROMPT = [(7 * index) % 400 + 3 for index in range(600)]  # more than one chunk


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    if redis_server.missing():
        pytest.skip(str(redis_server.missing()))
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.kill()


def test_settings_of_rows_arrive_in_the_engine() -> None:
    config = EngramConfig("redis", redis_url="redis://127.0.0.1:1/0", redis_hot_bytes=5, redis_timeout_s=2.0)
    settings = ShardSettings(backend="local", checkpoint=Path("/x"), engram=config)
    assert ShardSettings.from_json(settings.to_json()) == settings


def test_an_engine_with_its_rows_in_redis_says_the_same_also_when_redis_is_gone(server: RedisServer) -> None:
    model = locate("moeray-tiny")
    with in_process_engine(model) as engine:
        want = engine.teacher_forced(PROMPT)
    redis = EngramConfig("redis", redis_url=server.url, redis_hot_bytes=1)
    with in_process_engine(model, settings={"engram": redis}) as engine:
        client = Redis.from_url(server.url)
        for _ in range(2):  # from the file, then from what was put there
            assert torch.equal(engine.teacher_forced(PROMPT).chosen_T, want.chosen_T)
        assert client.dbsize() > 0
        assert client.info("commandstats")["cmdstat_mget"]["calls"] > 2
        server.kill()
        assert torch.equal(engine.teacher_forced(PROMPT).chosen_T, want.chosen_T)


def test_rows_of_a_prompt_that_waits_are_brought_before_a_step_needs_them(server: RedisServer) -> None:
    model = locate("moeray-tiny")
    with in_process_engine(model) as engine:
        want = engine.teacher_forced(PROMPT)
    client = Redis.from_url(server.url)
    redis = EngramConfig("redis", redis_url=server.url)
    with in_process_engine(model, settings={"engram": redis}) as engine:
        engine.teacher_forced(PROMPT)
    with in_process_engine(model, settings={"engram": redis}) as engine:
        client.config_resetstat()
        engine.engine.add_request("waits", {"prompt_token_ids": PROMPT}, SamplingParams(max_tokens=1))
        layers = engine.engine.apply_model(lambda model: len(model.engram_rows._hot))[0]
        assert eventually(lambda: client.info("commandstats").get("cmdstat_mget", {}).get("calls", 0) == layers)
        while engine.engine.has_unfinished_requests():
            engine.engine.step()
        assert client.info("commandstats")["cmdstat_mget"]["calls"] == layers
        assert torch.equal(engine.teacher_forced(PROMPT).chosen_T, want.chosen_T)


def test_an_engine_with_its_rows_at_row_servers_says_the_same_also_when_one_of_two_is_gone() -> None:
    model = locate("moeray-tiny")
    with in_process_engine(model) as engine:
        want = engine.teacher_forced(PROMPT)
    checkpoint = Checkpoint.open(model)
    layout = engram_layout(checkpoint)
    assert layout is not None
    tables = engram_tables(checkpoint, layout)
    servers = [RowServer(HeldRows(tables, Shares(2, 2, tables.num_columns), number)) for number in range(2)]
    addresses = {number: server.start() for number, server in enumerate(servers)}
    sharded = EngramConfig("sharded", num_servers=2, copies=2, timeout_s=10.0)
    with in_process_engine(model, settings={"engram": sharded}) as engine:
        engine.engine.model_executor.driver_worker.worker.model_runner.get_model().engram_rows.move(addresses)
        assert torch.equal(engine.teacher_forced(PROMPT).chosen_T, want.chosen_T)
        assert all(server.rows_sent for server in servers)
        servers[0].stop()
        assert torch.equal(engine.teacher_forced(PROMPT).chosen_T, want.chosen_T)
    servers[1].stop()
