"""Who is in the cluster and which generation they agreed on (a pure state machine, no I/O)."""

from moeray.membership.members import Member, MemberState, Role
from moeray.membership.state import Membership, MembershipError, View

__all__ = ["Member", "MemberState", "Membership", "MembershipError", "Role", "View"]
