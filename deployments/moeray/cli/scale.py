"""`moeray scale`: other numbers of expert groups and attention shards, while the cluster serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moeray.cli.connection import cluster_state, ray_connection
from moeray.cli.errors import CommandError
from moeray.cli.pools import CALL_S, ROLES, processes, serves, watch
from moeray.cli.serve_targets import DEPLOYMENTS, Targets, deployments, serve_client

SCALED = ("experts", "attention")


def scale(counts: Sequence[str], *, timeout_s: float) -> int:
    """Set new numbers, wait until they are reached.

    Raises:
        CommandError: a number that cannot be (2), or was not reached in time (1).
    """
    wanted = parse_counts(counts)
    with ray_connection():
        state = cluster_state()
        _check(wanted, state)
        _check_resources(wanted, deployments())
        _change(wanted, int(state["target_groups"]))
        _wait(wanted, timeout_s, state)
    return 0


def parse_counts(counts: Sequence[str]) -> dict[str, int]:
    """`experts=4` -> {"experts": 4}.

    Raises:
        CommandError: not so written, or less than 1.
    """
    wanted: dict[str, int] = {}
    for text in counts:
        pool, _, number = text.partition("=")
        if pool not in SCALED or not number.isascii() or not number.isdigit():
            raise CommandError(f"{text!r} is not experts=N or attention=N", status=2)
        if int(number) < 1:
            raise CommandError(f"{text}: at least 1 (`moeray down` stops everything)", status=2)
        if pool in wanted:
            raise CommandError(f"{text}: {pool} is given twice", status=2)
        wanted[pool] = int(number)
    return wanted


def reached(wanted: Mapping[str, int], state: Mapping[str, Any]) -> bool:
    return all(serves(state, ROLES[pool], count) for pool, count in wanted.items())


def _check(wanted: Mapping[str, int], state: Mapping[str, Any]) -> None:
    if "experts" in wanted and not state["target_groups"]:
        raise CommandError(
            "experts: this cluster has no expert groups, its shards keep the experts (experts.num_groups is 0)",
            status=2,
        )


def _check_resources(wanted: Mapping[str, int], known: Mapping[str, Any]) -> None:
    """Raises CommandError if Ray cannot have room for the processes that are to come."""
    import ray

    free = ray.available_resources()
    for pool, count in wanted.items():
        deployment = known.get(DEPLOYMENTS[pool])
        if deployment is None:
            raise CommandError(f"{pool}: Ray Serve has no deployment {DEPLOYMENTS[pool]}")
        if deployment["deployment_config"].get("autoscaling_config"):
            raise CommandError(
                f"{pool}: its number follows the load; set its bounds, `autoscaling` of cluster.yaml", status=2
            )
        more = count - int(deployment["target_num_replicas"])
        options = deployment["deployment_config"]["ray_actor_options"] or {}
        for resource, key in (("CPU", "num_cpus"), ("GPU", "num_gpus")):
            needed = more * float(options.get(key) or 0)
            if more > 0 and needed > free.get(resource, 0.0) + 1e-6:
                raise CommandError(
                    f"{pool}={count}: {more} more processes ask Ray for {more} x {options[key]:g} = {needed:g} "
                    f"{resource}, but {free.get(resource, 0.0):g} are free; add nodes or lower "
                    f"{pool}.{key}",
                    status=2,
                )
            free[resource] = free.get(resource, 0.0) - max(0.0, needed)


def _change(wanted: Mapping[str, int], num_groups: int) -> None:
    """Tell the controller all of it before any process comes or goes, because it may refuse; then Ray Serve.

    Args:
        num_groups: what the controller wants now; told again if Serve does not take another number of groups.
    Raises:
        CommandError: one of the two refused; says what stays as it was and what does not.
    """
    told: list[str] = []
    taken: list[str] = []
    try:
        for pool, count in wanted.items():
            _tell_controller(ROLES[pool], count)
            told.append(pool)
        for pool, count in wanted.items():
            _tell_serve(DEPLOYMENTS[pool], count)
            taken.append(pool)
    except CommandError as error:
        said = [f"{pool}={wanted[pool]} is under way" for pool in taken]
        if "experts" in told and "experts" not in taken:
            said.append(_undo(wanted["experts"], num_groups))
        raise CommandError("; ".join((str(error), *said)), status=error.status) from error


def _undo(count: int, num_groups: int) -> str:
    """Have the controller want so many groups again (it keeps no number of shards); what is to be said of it."""
    try:
        _tell_controller(ROLES["experts"], num_groups)
    except CommandError as error:
        return f"the controller goes on waiting for experts={count} ({error}): run `moeray scale experts={num_groups}`"
    return f"experts stay at {num_groups}"


def _tell_controller(role: str, count: int) -> None:
    """First, so that it waits for all that come, and does not take leaving ones for lost."""
    import ray

    from moeray.controller.actor import controller
    from moeray.membership import MembershipError

    try:
        ray.get(controller().scale.remote(role, count), timeout=CALL_S)
    except MembershipError as error:
        reason = str(error).strip().splitlines()[-1].split("MembershipError: ")[-1]
        raise CommandError(reason, status=2) from error
    except ray.exceptions.RayError as error:
        raise CommandError(f"the controller does not answer: {type(error).__name__}") from error


def _tell_serve(deployment: str, count: int) -> None:
    """Change the number of replicas in place: those that stay are not restarted."""
    import ray
    from ray.serve._private.common import DeploymentID
    from ray.serve._private.exceptions import ExternalScalerDisabledError

    from moeray.app import APP_NAME

    serve_controller = serve_client()._controller
    try:
        ray.get(
            serve_controller.update_deployment_replicas.remote(DeploymentID(deployment, APP_NAME), count),
            timeout=CALL_S,
        )
    except ExternalScalerDisabledError as error:
        raise CommandError(
            f"the Serve application was deployed without `external_scaler_enabled: true`: set that, or "
            f"`num_replicas` of {deployment}, in its Serve configuration"
        ) from error
    except ray.exceptions.GetTimeoutError as error:
        raise CommandError(f"Ray Serve did not answer within {CALL_S:g} s") from error
    except (ray.exceptions.RayError, ValueError) as error:
        raise CommandError(f"Ray Serve refused: {str(error).strip().splitlines()[-1]}") from error


def _wait(wanted: Mapping[str, int], timeout_s: float, before: dict[str, Any]) -> None:
    """Show what happens until `reached`.

    Raises:
        CommandError: not within timeout_s, and the numbers stay wanted; or somebody wants others meanwhile.
    """
    targets = Targets()

    def others() -> list[str]:
        return [f"{pool} {targets[pool]}" for pool, count in wanted.items() if targets[pool] != count]

    last = watch(lambda state: reached(wanted, state) or bool(others()), timeout_s, before)
    if reached(wanted, last):
        print("reached: " + ", ".join(f"{count} {pool}" for pool, count in wanted.items()), flush=True)
        return
    if changed := others():
        raise CommandError(f"somebody has asked for other numbers meanwhile: {', '.join(changed)}")
    there = {pool: sum(each["state"] == "ready" for each in processes(last, ROLES[pool])) for pool in wanted}
    raise CommandError(
        f"not reached after {timeout_s:g} s: "
        + ", ".join(f"{pool} {there[pool]} of {count}" for pool, count in wanted.items())
        + "; the cluster goes on trying (see `moeray status`)"
    )
