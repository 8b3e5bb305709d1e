"""`moeray up`: start a cluster, show how it gets on, come back when it serves."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from moeray.cli import environment, state_file
from moeray.cli.connection import connect
from moeray.cli.down import remove_application
from moeray.cli.errors import CommandError
from moeray.cli.preflight import preflight
from moeray.cli.progress import wait_until_ready
from moeray.cli.tenancy_store import placed
from moeray.config import ClusterConfig, load_config, to_dict

OBJECT_STORE_BYTES = 100 * 2**20  # nothing of ours goes through Ray's object store
ALREADY_RUNNING = "a cluster is running already (supervisor pid {pid}, {http}); `moeray down` stops it"


def up(file: Path | None, *, detach: bool, timeout_s: float, supervise: bool = False) -> int:
    """See module docstring. `supervise` is the background half of `--detach`: what it prints goes to the log file."""
    config = placed(load_config(file))
    if not supervise:
        _refuse_second()
        preflight(config)
    if detach and not os.environ.get("RAY_ADDRESS"):
        return _detached(file, timeout_s)
    signal.signal(signal.SIGTERM, _interrupt)
    with running(config, timeout_s) as cluster:
        _print_endpoints(cluster)
        if detach:
            return 0
        print("running; Ctrl-C stops it", flush=True)
        _until_signal()
    return 0


@contextlib.contextmanager
def running(config: ClusterConfig, timeout_s: float) -> Iterator[state_file.RunningCluster]:
    """A ready cluster while the block runs; on foreign Ray it stays when the block ends without an error."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        connect(address)
        _refuse_deployed(address)
    else:
        _start_embedded_ray()
    import ray

    started = False
    try:
        cluster = _deploy(config, timeout_s)
        if not address:
            state_file.write(cluster)
        started = True
        yield cluster
    finally:
        if not address:
            state_file.remove()
        if not address or not started:
            remove_application()
        ray.shutdown()  # the embedded Ray ends with it, and Serve with that


def _start_embedded_ray() -> None:
    """One Ray node on loopback that lives and dies with this process."""
    environment.prepare(embedded=True)
    import ray

    from moeray.controller.settings import NAMESPACE

    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=max(8, os.cpu_count() or 1),  # replicas ask for small shares; the kernel divides the real cores
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _deploy(config: ClusterConfig, timeout_s: float) -> state_file.RunningCluster:
    import ray
    from ray import serve

    from moeray.app import APP_NAME, autoscaling_policy, build

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
    if (policy := autoscaling_policy(config)) is None:
        serve.run_many(
            [serve.RunTarget(build(config), name=APP_NAME, route_prefix=None, external_scaler_enabled=True)],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    else:
        _deploy_scaled(config, policy)
    endpoints = wait_until_ready(config, timeout_s)
    return state_file.RunningCluster(
        ray_address=ray.get_runtime_context().gcs_address,
        supervisor_pid=os.getpid(),
        supervisor_started=state_file.started_ticks(os.getpid()) or 0,
        http=endpoints["http"],
        grpc=endpoints["grpc"],
        drain_s=config.ingress.drain_s,
    )


def _deploy_scaled(config: ClusterConfig, policy: dict[str, Any]) -> None:
    """As an application of a Serve configuration: only these have a policy for all their deployments."""
    from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

    from moeray.app import APP_NAME
    from moeray.cli.serve_targets import serve_client

    application = ServeApplicationSchema(
        name=APP_NAME,
        route_prefix=None,
        import_path="moeray.app:build",
        args=to_dict(config),
        autoscaling_policy=policy,
    )
    serve_client().deploy_apps(ServeDeploySchema(applications=[application]))


def _detached(file: Path | None, timeout_s: float) -> int:
    """Start a supervisor in a session of its own and follow its log until it is ready or gone."""
    command = [sys.executable, "-m", "moeray.cli", "up", "--supervise", "--timeout", str(timeout_s)]
    if file is not None:
        command += ["-f", str(file.resolve())]
    log = state_file.log_path()
    with log.open("wb") as sink, log.open("r", encoding="utf-8", errors="replace") as source:
        supervisor = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            cluster = _follow(supervisor, source)
        except BaseException:
            supervisor.terminate()  # Ctrl-C here must not leave a cluster starting in the background
            raise
    _print_endpoints(cluster)
    print("detached; `moeray down` stops it", flush=True)
    return 0


def _interrupt(*_: object) -> None:
    """A SIGTERM during the start cleans up as Ctrl-C does."""
    raise KeyboardInterrupt


def _follow(supervisor: subprocess.Popen[bytes], log: TextIO) -> state_file.RunningCluster:
    """Show what the supervisor prints until its cluster is ready.

    Raises:
        CommandError: it ended first.
    """
    while True:
        running = state_file.read()
        sys.stdout.write(log.read())
        sys.stdout.flush()
        if running is not None and running.supervisor_pid == supervisor.pid:
            return running
        if supervisor.poll() is not None:
            sys.stdout.write(log.read())
            raise CommandError(f"the cluster did not start; the whole log: {state_file.log_path()}")
        time.sleep(0.1)


def _refuse_deployed(address: str) -> None:
    from moeray.controller.actor import controller

    try:
        controller()
    except ValueError:
        return
    raise CommandError(f"a cluster is deployed on the Ray at {address} already; `moeray down` removes it", status=2)


def _refuse_second() -> None:
    cluster = None if os.environ.get("RAY_ADDRESS") else state_file.read()
    if cluster is not None:
        raise CommandError(ALREADY_RUNNING.format(pid=cluster.supervisor_pid, http=cluster.http), status=2)


def _print_endpoints(cluster: state_file.RunningCluster) -> None:
    print(f"ready\n  HTTP  {cluster.http}/v1  (OpenAI)\n  gRPC  {cluster.grpc}  (moeray.v1.Inference)", flush=True)


def _until_signal() -> None:
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: stop.set())
    stop.wait()
    print("stopping", flush=True)
