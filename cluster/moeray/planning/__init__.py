"""What a model needs and costs on given devices, and whether attention and experts should be apart. Pure, and light."""

from moeray.planning.efficiency import Efficiency, EfficiencyError, efficiency_of, read_efficiency
from moeray.planning.plan import Candidate, Plan, plan
from moeray.planning.shape import ModelShape, ShapeError, shape_of
from moeray.planning.spec import PlanError, PlanSpec, Task, bundled_models, load_plan, parse_plan, task_of
from moeray.planning.step import Machines, StepTime, Work, step_time
from moeray.planning.topology import Topology

__all__ = [
    "Candidate",
    "Efficiency",
    "EfficiencyError",
    "Machines",
    "ModelShape",
    "Plan",
    "PlanError",
    "PlanSpec",
    "ShapeError",
    "StepTime",
    "Task",
    "Topology",
    "Work",
    "bundled_models",
    "efficiency_of",
    "load_plan",
    "parse_plan",
    "plan",
    "read_efficiency",
    "shape_of",
    "step_time",
    "task_of",
]
