"""The scripts that run in pods: fetching a checkpoint, draining; and the bundled Redis' command."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import redis
from certificates import Authority
from deploy.helm.chart import CHART, one, render
from redis_server import missing, server_binary

from moeray.ingress.ports import free_ports

FETCH = CHART / "files" / "fetch.sh"
RCLONE = """#!/bin/sh
# Stands for the object store's client: a bucket is a folder beside it.
echo "$@" >> "$BUCKETS/calls"
case $2 in
    :s3,provider=AWS,env_auth=true:*|:gcs,env_auth=true,bucket_policy_only=true:*) ;;
    *) exit 3 ;;
esac
sleep "${SLOW:-0}"
cp "$BUCKETS/${2##*:}"/* "$3"
"""


@pytest.fixture
def bucket(tmp_path: Path) -> Path:
    """Folder that stands for s3://bucket/model, with two files and their sums."""
    folder = tmp_path / "buckets" / "bucket" / "model"
    folder.mkdir(parents=True)
    lines = []
    for name, content in (("config.json", b"{}"), ("model.safetensors", os.urandom(4096))):
        (folder / name).write_bytes(content)
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    (folder / "SHA256SUMS").write_text("".join(lines))
    program = tmp_path / "bin" / "rclone"
    program.parent.mkdir()
    program.write_text(RCLONE)
    program.chmod(0o755)
    return folder


@pytest.fixture
def fetch(tmp_path: Path, bucket: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts fetch.sh for this bucket."""
    environment = {
        **os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "BUCKETS": str(tmp_path / "buckets"),
    }  # fmt: skip

    def start(
        uri: str = "s3://bucket/model", sums: str = "SHA256SUMS", into: str = "checkpoint", **more: str
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", str(FETCH), uri, str(tmp_path / into), sums],
            env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def output_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def num_copies(bucket: Path) -> int:
    calls = bucket.parents[1] / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


@pytest.mark.parametrize("uri", ["s3://bucket/model", "gs://bucket/model"])
def test_a_checkpoint_is_fetched_whole_and_once(
    fetch: Callable[..., subprocess.Popen[str]], bucket: Path, uri: str
) -> None:
    assert output_of(fetch(uri))[0] == 0
    fetched = bucket.parents[2] / "checkpoint"
    for path in bucket.iterdir():
        assert (fetched / path.name).read_bytes() == path.read_bytes()
    code, said = output_of(fetch(uri))
    assert code == 0
    assert "already" in said
    assert num_copies(bucket) == 1


def test_pods_that_share_a_volume_fetch_once(fetch: Callable[..., subprocess.Popen[str]], bucket: Path) -> None:
    processes = [fetch(SLOW="1") for _ in range(3)]
    assert [output_of(process)[0] for process in processes] == [0, 0, 0]
    assert num_copies(bucket) == 1


def test_a_file_that_is_not_what_its_sum_says_stops_the_pod(
    fetch: Callable[..., subprocess.Popen[str]], bucket: Path
) -> None:
    (bucket / "model.safetensors").write_bytes(b"other")
    code, said = output_of(fetch())
    assert code == 1
    assert "model.safetensors: FAILED" in said
    assert "config.json" not in said
    assert not (bucket.parents[2] / "checkpoint" / ".fetched").exists()


def test_missing_sums_are_said_and_can_be_done_without(
    fetch: Callable[..., subprocess.Popen[str]], bucket: Path
) -> None:
    (bucket / "SHA256SUMS").unlink()
    code, said = output_of(fetch())
    assert code == 1
    assert "checkpoint.fetch.checksums" in said
    assert output_of(fetch(sums=""))[0] == 0


def test_another_model_is_fetched_over_the_one_that_is_there(
    fetch: Callable[..., subprocess.Popen[str]], bucket: Path
) -> None:
    assert output_of(fetch())[0] == 0
    shutil.copytree(bucket, bucket.with_name("other"))
    assert output_of(fetch("s3://bucket/other"))[0] == 0
    assert num_copies(bucket) == 2


def test_a_fetch_that_was_killed_is_no_checkpoint(fetch: Callable[..., subprocess.Popen[str]], bucket: Path) -> None:
    process = fetch(SLOW="30")
    while num_copies(bucket) == 0:
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (bucket.parents[2] / "checkpoint" / ".fetched").exists()


def test_kuberays_clean_up_of_redis_does_not_wait_for_a_checkpoint(
    fetch: Callable[..., subprocess.Popen[str]], bucket: Path
) -> None:
    assert output_of(fetch(NODE_TYPE="redis-cleanup"))[0] == 0
    assert num_copies(bucket) == 0


def test_what_is_no_object_store_is_refused(fetch: Callable[..., subprocess.Popen[str]]) -> None:
    code, said = output_of(fetch("https://host/model"))
    assert code == 2
    assert "neither s3:// nor gs://" in said


def test_a_hook_without_a_raylet_lets_the_pod_end_at_once() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(CHART / "files" / "drain.py"), "60"],
        env={**os.environ, "POD_IP": "192.0.2.1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "no raylet" in done.stdout
    assert time.monotonic() - started < 30


class ApiServer:
    """Kubernetes' API server, as far as one RayService goes: it is gone at the third look after its deletion."""

    def __init__(self, folder: Path, *, refuses: bool = False) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.deletion: dict[str, str] = {}
        authority = Authority(folder / "authority")
        signed = authority.sign("kubernetes")
        self.account = folder / "account"
        self.account.mkdir()
        shutil.copy(authority.file, self.account / "ca.crt")
        (self.account / "token").write_text("of-the-job")
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_DELETE(self) -> None:
                server.deletion = json.loads(self.rfile.read(int(self.headers["content-length"])))
                self._answer(403 if refuses else 200)

            def do_GET(self) -> None:
                looks = sum(method == "GET" for method, _, _ in server.asked)
                self._answer(404 if looks == 2 else 200)

            def _answer(self, status: int) -> None:
                server.asked.append((self.command, self.path, self.headers["authorization"]))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(signed.cert, signed.key)
        self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def uninstall(self, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
        """What the hook's Job runs."""
        environment = {
            **os.environ, "KUBERNETES_SERVICE_HOST": "127.0.0.1", "LOOK_S": "0.1",
            "KUBERNETES_SERVICE_PORT": str(self.http.server_port), "SERVICE_ACCOUNT": str(self.account),
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, str(CHART / "files" / "delete_rayservice.py"), "serving", "moeray", str(limit_s)],
            env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip


def test_the_uninstalling_job_deletes_the_rayservice_and_waits_until_it_is_gone(tmp_path: Path) -> None:
    server = ApiServer(tmp_path)
    done = server.uninstall()
    assert done.returncode == 0, done.stderr
    path = "/apis/ray.io/v1/namespaces/serving/rayservices/moeray"
    assert server.asked == [(method, path, "Bearer of-the-job") for method in ("DELETE", "GET", "GET", "GET")]
    assert server.deletion == {"propagationPolicy": "Foreground"}
    server.http.shutdown()


def test_the_uninstalling_job_fails_where_it_may_not_delete_or_nothing_goes(tmp_path: Path) -> None:
    server = ApiServer(tmp_path, refuses=True)
    assert server.uninstall().returncode != 0
    assert [method for method, _, _ in server.asked] == ["DELETE"]
    server.http.shutdown()
    server.http.server_close()
    done = server.uninstall(limit_s=0.5)
    assert done.returncode == 1
    assert "still there" in done.stdout


@pytest.mark.skipif(missing() is not None, reason=f"Redis: {missing()}")
def test_the_bundled_redis_asks_for_its_password_and_keeps_what_it_is_told(tmp_path: Path) -> None:
    container = one(render({}), "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    (port,) = free_ports("127.0.0.1", 1)
    (tmp_path / "data").mkdir()
    binary = server_binary()
    assert binary is not None
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "redis-server").symlink_to(binary)
    (folder / "valkey-server").symlink_to(binary)
    script = container["args"][0].replace("/run/redis", str(tmp_path)).replace("/data", str(tmp_path / "data"))
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "REDIS_PASSWORD": "with space"}

    def start() -> subprocess.Popen[bytes]:
        # A pod has its network for itself; here it is loopback.
        command = [*container["command"], script.rstrip() + f" --bind 127.0.0.1 --port {port}\n"]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    for expected in (None, b"value"):
        process = start()
        try:
            client = redis.Redis(port=port, password="with space")
            deadline = time.monotonic() + 60
            while True:
                try:
                    client.ping()
                    break
                except redis.ConnectionError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            with pytest.raises(redis.AuthenticationError):
                redis.Redis(port=port).ping()
            assert client.get("key") == expected
            client.set("key", "value")
            assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"
            assert b"with space" not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        finally:
            process.kill()
            process.wait()
