"""What is recommended meets the goals, is the cheapest that moeray serves, and can be served as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moeray.config import parse_config
from moeray.planning import (
    Efficiency,
    EfficiencyError,
    Plan,
    PlanError,
    Task,
    efficiency_of,
    load_plan,
    parse_plan,
    plan,
    task_of,
)
from moeray.planning.plot import plot
from moeray.planning.report import as_json, shortened, text, values
from moeray.tiny import checkpoint_path

PLANS = Path(__file__).parents[3] / "docs" / "plans"

FP4 = {"routed": "fp4", "other": "fp8", "kv": "fp8", "dispatch": "fp8"}
FP8 = {"routed": "fp8", "other": "fp8", "kv": "fp8", "dispatch": "fp8"}


def planned(model: dict[str, Any], hardware: dict[str, Any], **others: Any) -> tuple[Task, Plan]:
    task = task_of(parse_plan({"model": model, "hardware": hardware, **others}), Efficiency())
    return task, plan(task)


CASES = {
    "V3 in BF16": ({"config": "deepseek-v3"}, {"attention": "H200", "most": 32}, {}),
    "V3 in FP8": ({"config": "deepseek-v3", **FP8}, {"attention": "H200", "most": 32}, {}),
    "V3 in 4 bits": ({"config": "deepseek-v3", "routed": "int4", "other": "int4"}, {"attention": "H100"}, {}),
    "V4-Flash": ({"config": "deepseek-v4-flash", **FP4}, {"attention": "H100", "most": 16}, {}),
    "V4-Pro": ({"config": "deepseek-v4-pro", **FP4}, {"attention": "B200", "most": 32}, {}),
    "1T": ({"config": "moe-1t-a32b", **FP4}, {"attention": "MI300X", "most": 32}, {}),
    "100B Engram": ({"config": "deepseek-v4-flash", **FP4, "engram_parameters": 1e11}, {"attention": "H200"}, {}),
    "128K": (
        {"config": "deepseek-v4-pro", **FP4}, {"attention": "GB200", "most": 72},
        {"workload": {"prompt": 130_000, "output": 1000}, "goals": {"ttft_s": 60}},
    ),
    "1M": (
        {"config": "deepseek-v4-flash", **FP4}, {"attention": "GB200", "most": 16},
        {"workload": {"prompt": 1_000_000, "output": 1000, "cached": 0.9}, "goals": {"ttft_s": 120}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_cases_people_ask_for_have_an_answer_that_can_be_served(case: str) -> None:
    model, hardware, others = CASES[case]
    task, found = planned(model, hardware, **others)
    best = found.best
    assert best is not None and best.cost is not None and best.topology.kind != "data"
    assert best.ttft_s <= task.goals.ttft_s and best.tpot_s <= task.goals.tpot_s
    assert all(role.weights + role.buffers + best.batch * role.kv_per_request < 1e9 * 192 for role in best.memory)
    served = [each.cost.mean for each in found.candidates if each.cost and each.topology.kind != "data"]
    assert best.cost.mean <= min(served) * 1.03
    accepted = parse_config(_cluster(values(task, found)))
    assert accepted.num_remote_groups == best.topology.groups * best.replicas
    for kind in ("split", "tensor", "data"):
        assert any(each.topology.kind == kind for each in shortened(found, 3)), "plain EP is in the same table"


@pytest.mark.parametrize("file", sorted(PLANS.glob("*.yaml")), ids=lambda each: each.stem)
def test_the_plans_that_come_with_it_have_an_answer(file: Path) -> None:
    task = task_of(load_plan(file), Efficiency(), {"moeray-tiny": checkpoint_path()})
    assert plan(task).best is not None


def _cluster(found: dict[str, Any]) -> dict[str, Any]:
    """cluster.yaml as the chart derives it from values: numbers of processes are those of pods."""
    config, groups = found["config"], found["workerGroups"]
    attention, experts = groups["attention"], groups["experts"]
    gpus = int(attention["resources"]["limits"].get("nvidia.com/gpu", 0))
    return {
        **config,
        "attention": config["attention"] | {"num_shards": attention["replicas"], "num_gpus": gpus},
        "experts": {"num_groups": experts.get("replicas", 0), "num_gpus": 1 if gpus and "replicas" in experts else 0},
    }


def test_a_price_is_paid_for_what_is_rented_not_for_what_is_used() -> None:
    model, hardware = {"config": "deepseek-v4-flash", **FP4}, {"attention": "H200", "most": 8}
    _, idle = planned(model, hardware, workload={"rate": 0.1})
    _, busy = planned(model, hardware, workload={"rate": 1000.0})
    assert idle.best and idle.best.cost and busy.best and busy.best.cost
    assert idle.best.cost.mean > 20 * busy.best.cost.mean and idle.best.replicas == 1 < busy.best.replicas
    _, dear = planned(model, hardware | {"price": 7.6}, workload={"rate": 1000.0})
    assert dear.best and dear.best.cost and dear.best.cost.mean == pytest.approx(2 * busy.best.cost.mean, rel=0.02)


def test_cached_input_is_cheaper_than_input_and_input_than_output() -> None:
    _, found = planned({"config": "deepseek-v4-pro", **FP4}, {"attention": "H200", "most": 32})
    assert found.best and found.best.cost
    cost = found.best.cost
    assert 0 < cost.cached_input < cost.input < cost.output


def test_experts_on_cheap_devices_with_much_memory_are_what_splitting_is_for() -> None:
    model = {"config": "deepseek-v4-pro", **FP4}
    hardware = {"attention": "H100", "experts": "MI300X", "price": 3.0, "experts_price": 0.5}
    _, found = planned(model, hardware, workload={"prompt": 8192, "output": 1024, "cached": 0.9})
    assert found.best is not None and found.best.topology.kind == "split" and found.verdict.startswith("Split:")


def test_in_the_dead_zone_it_is_said_that_plain_expert_parallelism_wins() -> None:
    _, found = planned({"config": "deepseek-v3", **FP8}, {"attention": "H200", "most": 16})
    assert found.verdict.startswith("Plain expert parallelism wins") and "what it serves, take" in found.verdict


def test_what_nothing_can_do_is_said_with_the_reason() -> None:
    task, found = planned({"config": "deepseek-v3"}, {"attention": "H100", "most": 4})
    assert found.best is None and "weights do not fit" in found.verdict
    with pytest.raises(ValueError, match="weights do not fit"):
        values(task, found)
    _, late = planned({"config": "deepseek-v4-flash", **FP4}, {"attention": "H200"}, goals={"tpot_s": 0.001})
    assert late.best is None and "TPOT" in late.verdict


def test_a_plan_is_told_as_text_json_and_picture() -> None:
    task, found = planned({"config": "deepseek-v4-flash", **FP4}, {"attention": "H200", "most": 8})
    assert found.best is not None
    said = text(task, found, 4)
    assert "284.3B parameters, 13.3B active" in said and found.verdict in said
    assert as_json(task, found)["best"] == found.best.topology.name
    assert plot(task, found).count("<circle") == sum(each.cost is not None for each in found.candidates)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modle": {}}, "modle: unknown key; did you mean model"),
        ({"hardware": {"attention": "H300"}}, "hardware.attention: 'H300' is not in the catalogue"),
        ({"hardware": {"most": 8}}, "hardware.attention: is missing"),
        (
            {"model": {"config": "deepseek-v5"}},
            "model.config: 'deepseek-v5' is no bundled name.*did you mean deepseek-v3",
        ),
        ({"model": {"config": "deepseek-v3", "routed": "fp3"}}, "model.routed"),
        ({"workload": {"prompt": 0}}, "workload.prompt"),
        ({"workload": {"prompt": 2_000_000}}, "the model has 163840"),
        ({"workload": {"cached": 1.5}}, "workload.cached"),
    ],
)
def test_a_wrong_plan_is_refused_by_the_field(change: dict[str, Any], said: str) -> None:
    right = {"model": {"config": "deepseek-v3"}, "hardware": {"attention": "H200"}}
    with pytest.raises(PlanError, match=said):
        task_of(parse_plan(right | change), Efficiency())


@pytest.mark.parametrize("values", [{"speed": 1.0}, {"link": 0}, {"layer_us": "1"}, {"step_us": -1.0}])
def test_wrong_measured_numbers_are_refused_by_the_key(values: dict[str, Any]) -> None:
    with pytest.raises(EfficiencyError, match=next(iter(values))):
        efficiency_of(values)
