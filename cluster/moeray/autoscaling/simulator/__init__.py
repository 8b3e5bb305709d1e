"""A cluster in numbers, for trying policies on: hours of requests in seconds, the same for the same seed.

It lies beside the policy because it is how the policy's defaults were chosen, and how others can choose theirs.
"""

from moeray.autoscaling.simulator.service import Service
from moeray.autoscaling.simulator.simulate import Outcome, Policy, simulate
from moeray.autoscaling.simulator.traces import TRACES, Trace

__all__ = ["TRACES", "Outcome", "Policy", "Service", "Trace", "simulate"]
