"""Who reaches whom: NetworkPolicies as Kubernetes applies them, for the parts that the chart uses."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deploy.helm.chart import NAMESPACE, Manifest, matches


@dataclass(frozen=True)
class Peer:
    """A pod (labels, its namespace's name, named ports), or an address outside of the cluster."""

    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str = NAMESPACE
    ports: Mapping[str, int] = field(default_factory=dict)
    address: str = ""


def reaches(policies: list[Manifest], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection is let out by the source's policies and in by the target's."""
    return _lets(policies, source, target, "egress", target, port, protocol) and _lets(
        policies, target, source, "ingress", target, port, protocol
    )


def _lets(
    policies: list[Manifest], subject: Peer, other: Peer, way: str, target: Peer, port: int, protocol: str
) -> bool:
    """Policies allow together; a pod that none of this kind selects is free."""
    if subject.address or subject.namespace != NAMESPACE:
        return True  # the chart has no say there
    selecting = [
        each["spec"]
        for each in policies
        if way.capitalize() in each["spec"]["policyTypes"] and matches(each["spec"]["podSelector"], subject.labels)
    ]
    rules = [rule for spec in selecting for rule in spec.get(way, [])]
    return not selecting or any(
        _names_peer(rule.get("to" if way == "egress" else "from"), other)
        and _names_port(rule.get("ports"), target, port, protocol)
        for rule in rules
    )


def _names_peer(named: list[dict[str, Any]] | None, peer: Peer) -> bool:
    return named is None or any(_is_peer(each, peer) for each in named)


def _is_peer(named: dict[str, Any], peer: Peer) -> bool:
    if "ipBlock" in named:
        if not peer.address:
            return False
        address, block = ipaddress.ip_address(peer.address), named["ipBlock"]
        outside = any(address in ipaddress.ip_network(each) for each in block.get("except", []))
        return address in ipaddress.ip_network(block["cidr"]) and not outside
    if peer.address:
        return False
    if "namespaceSelector" in named:
        there = matches(named["namespaceSelector"], {"kubernetes.io/metadata.name": peer.namespace})
    else:
        there = peer.namespace == NAMESPACE
    return there and matches(named.get("podSelector"), peer.labels)


def _names_port(named: list[dict[str, Any]] | None, target: Peer, port: int, protocol: str) -> bool:
    if named is None:
        return True
    return any(each.get("protocol", "TCP") == protocol and _has_port(each, target, port) for each in named)


def _has_port(named: dict[str, Any], target: Peer, port: int) -> bool:
    first = target.ports.get(str(named["port"]), named["port"])
    return bool(first == port or ("endPort" in named and first <= port <= named["endPort"]))
