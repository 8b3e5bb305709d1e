"""`moeray tenant` and `moeray usage`: what is typed is done, the key alone is on standard output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from redis_server import RedisServer, missing, nobody

from moeray.cli.commands import main
from moeray.tenancy import UsageFiles, UsageRecord
from moeray.tenancy.keys import parse_key


@pytest.fixture(params=["state directory", "file", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The arguments that name where tenants are."""
    monkeypatch.setenv("MOERAY_STATE_DIR", str(tmp_path / "state"))
    if request.param == "state directory":
        yield []
        return
    cluster = tmp_path / "cluster.yaml"
    if request.param == "file":
        cluster.write_text(json.dumps({"tenants": {"file": str(tmp_path / "t.json")}}))
        yield ["-f", str(cluster)]
        return
    if (why := missing()) is not None:
        pytest.skip(f"NOT tested against a Redis server: {why}")
    server = RedisServer(tmp_path)
    server.start()
    cluster.write_text(json.dumps({"redis": {"url": server.url}}))
    yield ["-f", str(cluster)]
    server.kill()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["tenant", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_tenant_from_its_creation_to_its_end(place: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, first, said = run(
        capsys, "create", "search", "--requests-per-minute", "60", "--models", "a", "b", "--mtls", "x", *place
    )
    assert status == 0
    parts = parse_key(first.strip())
    assert parts is not None
    assert parts[0] in said
    assert parts[1] not in said
    _, second, _ = run(capsys, "rotate", "search", "--grace", "0s", "--expires", "90d", *place)
    assert second.count("\n") == 1
    run(capsys, "set", "search", "--weight", "2.5", "--priority", "-1", "--models", *place)
    shown = json.loads(run(capsys, "show", "search", "--json", *place)[1])
    assert (shown["weight"], shown["priority"], shown["limits"]) == (2.5, -1, {"requests_per_minute": 60})
    assert "models" not in shown
    assert "expires" in shown["keys"][0]
    assert parts[1] not in json.dumps(shown)
    text = run(capsys, "show", "search", *place)[1]
    assert [line.split()[2] for line in text.splitlines() if "key " in line] == ["expired", "active"]
    run(capsys, "revoke", "search", "--all", *place)
    assert "0 active keys" in run(capsys, "list", *place)[1]
    assert run(capsys, "delete", "search", *place)[0] == 0
    assert run(capsys, "list", *place)[:2] == (0, "")


def test_what_is_wrong_is_said_on_standard_error_with_status_two(
    place: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "create", "chat", "--no-key", *place)[:2] == (0, "")
    for arguments, message in (
        (["create", "chat"], "tenant chat is there already"),
        (["create", "Chat"], "should match"),
        (["set", "chat", "--tokens-per-minute", "-1"], "tokens_per_minute"),
        (["set", "nobody", "--weight", "1"], "there is no tenant nobody"),
        (["revoke", "chat", "--key", "000000000000"], "has no key 000000000000"),
        (["show", "nobody"], "there is no tenant nobody"),
    ):
        status, out, said = run(capsys, *arguments, *place)
        assert (status, out) == (2, "")
        assert message in said


def test_a_redis_that_does_not_answer_is_status_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text(f"redis: {{url: '{nobody()}'}}\n")
    status, out, said = run(capsys, "create", "search", "-f", str(cluster))
    assert (status, out) == (1, "")
    assert "redis" in said


@pytest.mark.parametrize("text", ["", "d", "-1d", "1.5h", "1y", "9999999d", "²d"])
def test_a_span_that_cannot_be_read_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["tenant", "rotate", "search", f"--grace={text}"])
    assert caught.value.code == 2
    assert "is not a span" in capsys.readouterr().err


def test_usage_is_summed_from_the_configured_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, cluster = tmp_path / "usage", tmp_path / "cluster.yaml"
    cluster.write_text(json.dumps({"tenants": {"usage_dir": str(folder)}}))
    files = UsageFiles(folder, "i", keep_days=9)
    for tenant, time in (("search", 1_780_000_000.0), ("chat", 1_780_000_000.0), ("search", 1_780_086_400.0)):
        files.write([UsageRecord(time, "r", tenant, "k", "m", "grpc", 10, 5, 4, 0.1, 0.2, 1.0, "ok").to_line()])
    files.write([b'{"torn'])
    files.close()
    assert main(["usage", "--json", "-f", str(cluster)]) == 0
    said = capsys.readouterr()
    assert {name: row["requests"] for name, row in json.loads(said.out)["rows"].items()} == {"chat": 1, "search": 2}
    assert "1 lines cannot be read" in said.err
    assert main(["usage", "--by", "day", "--since", "2026-05-29", "-f", str(cluster)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [["2026-05-29", "1"]]
    assert main(["usage", "--since", "2026-05-29", "--until", "2026-05-29", "-f", str(cluster)]) == 2
