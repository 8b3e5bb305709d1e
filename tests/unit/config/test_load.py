"""A person's mistakes in cluster.yaml become one line that names the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeray.config import ClusterConfig, ConfigError, load_config, parse_config, to_dict


def test_no_file_means_the_documented_defaults() -> None:
    config = load_config(None)
    assert (config.model, config.attention.num_shards, config.experts.num_groups) == ("moeray-tiny", 2, 2)
    assert (config.transport.backend, config.transport.timeout_s) == ("gloo", 10.0)
    assert (config.ingress.http_port, config.ingress.grpc_port, config.ingress.num_replicas) == (8000, 50051, 1)
    assert (config.health.hang_s, config.health.step_s) == (10.0, 300.0)


def test_plain_data_round_trips() -> None:
    config = parse_config({"model": "x", "attention": {"engine_args": {"max_model_len": 128}}})
    assert parse_config(to_dict(config)) == config
    assert config.attention.engine_args == {"max_model_len": 128}


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "cluster.yaml").write_text("# nothing yet\n")
    assert load_config(tmp_path / "cluster.yaml") == ClusterConfig()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"modle": "x"}, "modle: unknown key; did you mean model?"),
        ({"attention": {"num_shard": 2}}, "attention.num_shard: unknown key; did you mean num_shards?"),
        ({"ingress": {"zzz": 2}}, "ingress.zzz: unknown key; known keys here: http_port, grpc_port"),
        ({"attention": {"num_shards": 0}}, r"attention.num_shards: .*greater than or equal to 1 \(got 0\)"),
        ({"attention": {"num_shards": "2"}}, "attention.num_shards: .*integer"),
        ({"ingress": {"http_port": True}}, "ingress.http_port: .*integer"),
        ({"ingress": {"grpc_port": 70000}}, "ingress.grpc_port: .*65535"),
        ({"experts": {"num_redundant": -1}}, r"experts.num_redundant: .*greater than or equal to 0 \(got -1\)"),
        ({"transport": {"backend": "tcp"}}, "transport.backend: .*'gloo', 'nccl' or 'local'"),
        ({"transport": {"timeout_s": float("nan")}}, "transport.timeout_s: .*finite"),
        ({"health": {"step_s": 0}}, r"health.step_s: .*greater than or equal to 2 \(got 0\)"),
        ({"engram": {"placement": "sharded"}}, "engram.num_servers is 0: `sharded` needs row servers"),
        ({"engram": {"num_servers": 2}}, "engram.placement is host, engram.num_servers is 2"),
        (
            {"engram": {"placement": "sharded", "num_servers": 2, "copies": 3}},
            "engram.copies: 3 copies need as many row servers, but engram.num_servers is 2",
        ),
        ({"autoscaling": {"attention": {"most": 1}}}, "attention.num_shards: 2 is where the pool begins"),
        ({"autoscaling": {"attention": {"fewest": 9, "most": 4}}}, "autoscaling.attention: fewest_at_night"),
        (
            {"autoscaling": {"experts": {"most": 4}}, "experts": {"num_groups": 0}},
            "autoscaling.experts.most: there are no",
        ),
        ({"autoscaling": {"night": [22, 25]}}, r"autoscaling.night.*24"),
        ({"model": ""}, "model: .*at least 1 character"),
        (["model"], "must be a mapping"),
    ],
)
def test_a_wrong_key_is_named_with_what_would_be_right(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(data)


@pytest.mark.parametrize(
    ("kv_cache", "message"),
    [
        ({"redis_url": "http://a:1"}, "kv_cache.redis_url: write one of redis, rediss"),
        ({"redis_url": "redis://:hush@a:1/0"}, "kv_cache.redis_url: no user or password in a URL that is logged"),
        ({"redis_url": "redis://a:1/0?password=hush"}, r"kv_cache.redis_url: no options behind \? or #"),
        ({"redis_url": "redis://a:1/0", "redis_ca_file": "ca.pem"}, "kv_cache.redis_ca_file is for rediss://"),
    ],
)
def test_a_url_of_the_kv_tier_that_cannot_be_right_is_refused_without_its_secrets(
    kv_cache: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config({"kv_cache": kv_cache})
    assert "hush" not in str(caught.value)


def test_a_step_may_take_longer_than_a_hung_group_is_waited_for() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"health": {"step_s": 50}, "transport": {"timeout_s": 30}})
    for words in ("health.step_s: 50 s", "transport.timeout_s (2 x 30 s = 60 s)", "health.step_s to 60 or more"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "others", [{"health": {"step_s": 60}}, {"transport": {"backend": "local"}}, {"experts": {"num_groups": 0}}]
)
def test_no_other_step_is_refused(others: dict[str, Any]) -> None:
    data: dict[str, Any] = {"health": {"step_s": 50}, "transport": {"timeout_s": 30}}
    parse_config({key: {**data.get(key, {}), **others.get(key, {})} for key in {*data, *others}})


def test_every_wrong_key_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"modle": "x", "attention": {"num_shards": 0}})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("text", "message"), [("model: [", "line 1, column"), ("a: b: c", "is not YAML")])
def test_bad_yaml_names_file_and_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "cluster.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"cluster.yaml.*{message}|cluster.yaml:.*{message}"):
        load_config(tmp_path / "cluster.yaml")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("data", "threads"),
    [
        ({}, 2 * (1 + 1) + 2 * 1),
        ({"attention": {"num_shards": 3, "num_threads": 4}, "experts": {"num_threads": 2}}, 3 * 5 + 2 * 2),
        ({"attention": {"num_gpus": 1}}, 2),
        ({"experts": {"num_groups": 0}, "attention": {"engine_args": {"tensor_parallel_size": 2}}}, 2 * (2 + 1)),
        ({"transport": {"backend": "local"}}, 2 * (1 + 1)),
    ],
)
def test_threads_that_need_a_core_are_counted_over_both_pools(data: dict[str, object], threads: int) -> None:
    assert parse_config(data).num_threads == threads


@pytest.mark.parametrize("text", ["off", "'off'", "OFF", "false"])
def test_a_channel_can_be_switched_off_as_one_writes_it(tmp_path: Path, text: str) -> None:
    """YAML reads a bare off as false."""
    (tmp_path / "cluster.yaml").write_text(f"transport: {{channel: {text}}}\n")
    assert load_config(tmp_path / "cluster.yaml").transport.channel == "off"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_loopback_needs_no_key_unless_it_is_asked_for(host: str) -> None:
    assert not parse_config({"ingress": {"host": host}}).tenants.needs_credential
    assert parse_config({"ingress": {"host": host}, "tenants": {"auth": "required"}}).tenants.needs_credential


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "moeray.example.org", ""])
def test_other_hosts_are_refused_until_it_is_written_who_is_served(host: str) -> None:
    with pytest.raises(ConfigError, match=r"tenants\.auth: ingress\.host .* write `required`.* or write `off`"):
        parse_config({"ingress": {"host": host}})
    for written, needed in (("off", False), (False, False), ("required", True)):
        config = parse_config({"ingress": {"host": host}, "tenants": {"auth": written}})
        assert config.tenants.needs_credential is needed
        assert parse_config(to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tenants": {"jwks_file": "/keys.json"}}, r"tenants\.jwks_file: .* missing: issuer, audience"),
        ({"tenants": {"issuer": "https://id"}}, r"tenants\.issuer: .* missing: jwks_file, audience"),
        ({"tenants": {"usage": "redis"}}, r"tenants\.usage: redis needs redis\.url"),
        ({"tenants": {"auth": "required"}, "ingress": {"num_replicas": 2}}, r"tenants\.auth: 2 ingresses .*redis\.url"),
        ({"tenants": {"auth": "on"}}, r"tenants\.auth: .*'off' or 'required'"),
        ({"tenants": {"on_store_failure": "ignore"}}, r"tenants\.on_store_failure: .*'closed' or 'open'"),
        ({"tenants": {"fiel": "x"}}, r"tenants\.fiel: unknown key; did you mean file\?"),
    ],
)
def test_keys_of_tenants_that_do_not_fit_together_are_named(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(data)
    assert len(str(caught.value).splitlines()) == 1


def test_what_tenants_need_of_redis_is_there_with_its_url() -> None:
    data = {"tenants": {"auth": "required", "usage": "redis"}, "ingress": {"num_replicas": 2}}
    assert parse_config({**data, "redis": {"url": "redis://127.0.0.1:6379/0"}}).tenants.usage == "redis"
