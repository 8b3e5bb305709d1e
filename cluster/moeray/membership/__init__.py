"""Who is in the cluster and which generation they agreed on (a pure state machine, no I/O)."""

from moeray.membership.accusations import Charge
from moeray.membership.cluster_state import Delays
from moeray.membership.generation import Generation
from moeray.membership.members import Member, MemberState, Role
from moeray.membership.snapshot import SnapshotError
from moeray.membership.state import Membership, MembershipError
from moeray.membership.view import View

__all__ = [
    "Charge",
    "Delays",
    "Generation",
    "Member",
    "MemberState",
    "Membership",
    "MembershipError",
    "Role",
    "SnapshotError",
    "View",
]
