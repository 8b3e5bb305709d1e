"""Whether processes of this cluster still do anything."""

from moeray.health.steps import StepLimit
from moeray.health.watchdog import Guard, guard

__all__ = ["Guard", "StepLimit", "guard"]
