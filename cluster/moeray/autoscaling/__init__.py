"""How many attention shards and expert groups there should be, and why: values in, values out, no I/O.

Pools are measured in their own terms: shards by the tokens that are asked for, requests and KV; groups by the time they
compute. Which of the two is to grow when a goal is missed follows from where a step's time goes.
"""

from moeray.autoscaling.limits import Goals, Limits, PolicySettings
from moeray.autoscaling.observation import GroupLoad, Observation, Percentile, ShardLoad
from moeray.autoscaling.policy import Decision, Memory, Wanted, decide

__all__ = [
    "Decision",
    "Goals",
    "GroupLoad",
    "Limits",
    "Memory",
    "Observation",
    "Percentile",
    "PolicySettings",
    "ShardLoad",
    "Wanted",
    "decide",
]
