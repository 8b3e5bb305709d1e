"""Deliberately broken variants of the product, and the one test that must notice each.

A mutation is one textual edit of one file, made in a copy of the tree. It is dead when its text is no longer there:
then the product changed, and the mutation must be written anew (its test says so by name).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TESTS_FAILED = 1
"""pytest's exit status; a file that cannot be imported or a test that does not exist gives another one."""
ROOT = Path(__file__).parents[2]
CODE_ROOTS = ("cluster", "model_plugins", "deployments")
EXPERTS = "model_plugins/moeray/deepseek_v4/experts.py"
EXPERT_FORMULA = "model_plugins/moeray/deepseek_v4/expert_formula.py"
EXPERT_KERNEL = "model_plugins/moeray/deepseek_v4/expert_kernel.py"
EXPERT_LAYOUT = "model_plugins/moeray/deepseek_v4/expert_layout.py"
CHECKPOINT = "model_plugins/moeray/deepseek_v4/checkpoint.py"
FORMATS = "model_plugins/moeray/deepseek_v4/formats.py"
ENGRAM = "model_plugins/moeray/deepseek_v4/engram.py"
ENGRAM_GATE = "model_plugins/moeray/deepseek_v4/engram_gate_kernel.py"
ROUTING = "model_plugins/moeray/vllm_hooks/cpu_routing.py"
KERNELS = "model_plugins/moeray/vllm_hooks/cpu_kernels.py"
REDUCTION = "cluster/moeray/transport/reduction.py"
REDUCTION_KERNEL = "cluster/moeray/transport/reduction_kernel.py"
EXPERT_TESTS = "tests/unit/deepseek_v4/test_experts.py::"
PACKED_TESTS = "tests/unit/deepseek_v4/test_packed_experts.py::"
ROUTING_TESTS = "tests/unit/vllm_hooks/test_cpu_routing.py::"
REDUCTION_TESTS = "tests/unit/transport/test_reduction.py::"
READING_TESTS = "tests/correctness/test_numpy_reading.py::"
PARITY = "tests/correctness/test_parity.py::test_logprobs_are_as_near_to_fp32_as_rounding_allows"
QUANTISED = "tests/correctness/test_parity.py::test_a_quantised_checkpoint_is_as_near_to_its_own_values_in_fp32[v4]"
KNOB = "tests/correctness/test_parity.py::test_every_knob_gives_the_logprobs_of_transformers"


class MutationIsDead(ValueError):
    """The text to change does not occur exactly once."""


@dataclass(frozen=True)
class Mutation:
    """`old` becomes `new` in `file`; `test` (a pytest node) must fail then."""

    name: str
    file: str
    old: str
    new: str
    test: str


MUTATIONS = (
    # --- reduction
    Mutation(
        "rows are added in descending k", REDUCTION,
        "for k in range(1, top_k):", "for k in range(top_k - 1, 0, -1):",
        REDUCTION_TESTS + "test_it_is_the_fp32_sum_in_ascending_k",
    ),
    Mutation(
        "rows are combined with one rounding less where a row is added", REDUCTION_KERNEL,
        "                    for d in range(count):\n                        sums[d] += row[d] * weight\n",
        "                    for d in range(count):\n"
        "                        sums[d] = np.float32(np.float64(sums[d]) + np.float64(row[d]) * np.float64(weight))\n",
        REDUCTION_TESTS + "test_combining_takes_two_roundings_per_expert_and_fuses_none",
    ),
    Mutation(
        "rows are combined in descending k", REDUCTION_KERNEL,
        "                row, weight = replies_RD[source_P[t * top_k + k], begin : begin + count], weights_TK[t, k]\n"
        "                for d in range(count):\n",
        "                row = replies_RD[source_P[t * top_k + top_k - 1 - k], begin : begin + count]\n"
        "                weight = weights_TK[t, top_k - 1 - k]\n                for d in range(count):\n",
        REDUCTION_TESTS + "test_rows_combined_where_they_lie_give_the_bits_of_the_weighted_sum",
    ),
    Mutation(
        "the first expert's router weight is dropped", REDUCTION,
        "rows_TKD[:, 0].float() * weights_TK[:, :1]", "rows_TKD[:, 0].float() * 1.0",
        REDUCTION_TESTS + "test_it_is_the_fp32_sum_in_ascending_k",
    ),
    Mutation(
        "the sum is rounded to the rows' dtype at every k", REDUCTION,
        "y_TD += rows_TKD[:, k].float() * weights_TK[:, k : k + 1]",
        "y_TD = (y_TD + rows_TKD[:, k].float() * weights_TK[:, k : k + 1]).to(rows_PD.dtype).float()",
        REDUCTION_TESTS + "test_it_is_the_fp32_sum_in_ascending_k",
    ),
    # --- expert mathematics and formats
    Mutation(
        "experts are swapped in pairs", EXPERT_LAYOUT,
        "slots[active] = begin, slot_E[expert]", "slots[active] = begin, slot_E[expert ^ 1]",
        READING_TESTS + "test_every_expert_is_within_rounding_of_float64",
    ),
    Mutation(
        "gate and up are swapped", EXPERTS,
        "reader.read([w1.weight, w3.weight])", "reader.read([w3.weight, w1.weight])",
        READING_TESTS + "test_every_expert_is_within_rounding_of_float64",
    ),
    Mutation(
        "the swiglu limit is ignored", EXPERT_KERNEL,
        "        _, tile, limit, h = arguments\n",
        "        _, tile, limit, h = arguments\n        limit = ir.Constant(_F32, np.inf)\n",
        EXPERT_TESTS + "test_rows_are_those_of_the_float64_formula",
    ),
    Mutation(
        "the swiglu limit is ignored (seen in the text)", EXPERT_KERNEL,
        "        _, tile, limit, h = arguments\n",
        "        _, tile, limit, h = arguments\n        limit = ir.Constant(_F32, np.inf)\n",
        f"{PARITY}[random-short]",
    ),
    Mutation(
        "the swiglu limit is ignored by the formula", EXPERT_FORMULA,
        "    gate_nI.clamp_(max=limit)\n    up_nI.clamp_(-limit, limit)\n", "",
        EXPERT_TESTS + "test_rows_are_those_of_the_float64_formula",
    ),
    Mutation(
        "up is clamped above only", EXPERT_KERNEL,
        '        up = b.select(b.fcmp_ordered("<", up, low), low, up)\n', "",
        READING_TESTS + "test_every_expert_is_within_rounding_of_float64",
    ),
    Mutation(
        "gate and up are not rounded before the clamp", EXPERT_KERNEL,
        "gate, up = _round_to_bf16(b, gate), _round_to_bf16(b, up)", "pass",
        EXPERT_TESTS + "test_the_kernel_rounds_where_the_formula_does",
    ),
    Mutation(
        "tiles of two tokens and more add without fusing", EXPERT_KERNEL,
        "added = [_fma(b, column,",
        "fma = _fma if rows < 2 else lambda b, x, y, z: b.fadd(b.fmul(x, y), z)\n    added = [fma(b, column,",
        PACKED_TESTS + "test_bits_do_not_depend_on_batch_position_slice_or_threads",
    ),
    Mutation(
        "the last column of a width that fills no block is not written", EXPERT_KERNEL,
        'with b.if_then(b.icmp_signed(">", lanes, _index(lane))):',
        'with b.if_then(b.icmp_signed(">", lanes, _index(lane + 1))):',
        PACKED_TESTS + "test_every_number_is_within_the_bound_of_its_arithmetic",
    ),
    Mutation(
        "rows are written in the order of experts", EXPERT_LAYOUT,
        "order_R[next_E[expert]], row_R[next_E[expert]] = pair, row",
        "order_R[next_E[expert]], row_R[next_E[expert]] = pair, next_E[expert]",
        "tests/unit/deepseek_v4/test_expert_layout.py::"
        "test_every_pair_of_an_expert_stands_under_its_slot_as_they_come",
    ),
    Mutation(
        "a group lets NaN pass", EXPERTS,
        "        if result.bad_P is not None:\n", "        if False:\n",
        EXPERT_TESTS + "test_a_non_finite_row_is_an_error_that_names_its_experts",
    ),
    Mutation(
        "the kernel does not see NaN", EXPERT_KERNEL,
        "        exponent = _words(0x7F800000)\n", "        exponent = _words(0x7FC00000)\n",
        PACKED_TESTS + "test_rows_that_are_not_finite_are_marked_and_no_others",
    ),
    Mutation(
        "a shard lets a broken group's NaN pass", REDUCTION,
        "    if y_TD.sum(dtype=torch.float32).isfinite().item():\n", "    if True:\n",
        "tests/contract/test_transport.py::"
        "test_nan_that_a_group_does_not_notice_is_that_groups_error_and_the_next_call_is_clean",
    ),
    Mutation(
        "the weight scale is dropped", FORMATS,
        "by_block.mul_(scales_RC.unsqueeze(2)).view", "by_block.view",
        "tests/unit/deepseek_v4/test_formats.py::test_fp4_equals_transformers_bit_for_bit",
    ),
    Mutation(
        "the weight scale is dropped (seen in the text)", FORMATS,
        "by_block.mul_(scales_RC.unsqueeze(2)).view", "by_block.view",
        QUANTISED,
    ),
    Mutation(
        "the scales of an FP8 block are taken from the block above", FORMATS,
        "scales_RC.repeat_interleave(block[0], dim=0)", "scales_RC.roll(1, 0).repeat_interleave(block[0], dim=0)",
        "tests/unit/deepseek_v4/test_formats.py::test_fp8_equals_transformers_bit_for_bit",
    ),
    Mutation(
        "the halves of an FP4 byte are swapped", FORMATS,
        "(E2M1[byte & 15], E2M1[byte >> 4])", "(E2M1[byte >> 4], E2M1[byte & 15])",
        "tests/unit/deepseek_v4/test_formats.py::test_every_byte_unpacks_to_the_two_values_of_its_halves_low_half_first",
    ),
    # --- router
    Mutation(
        "routed scaling is dropped", ROUTING,
        "(weights_TK * routed_scaling_factor)", "(weights_TK * 1.0)",
        ROUTING_TESTS + "test_scores_plus_bias_choose_and_scores_alone_weigh",
    ),
    Mutation(
        "routed scaling is applied twice (seen in the text)", "model_plugins/moeray/vllm_hooks/remote_experts.py",
        "_dispatch(layer.model_layer, x, topk_ids, topk_weights)",
        "_dispatch(layer.model_layer, x, topk_ids, 2.5 * topk_weights)",
        f"{PARITY}[random-short]",
    ),
    Mutation(
        "the correction bias is ignored", ROUTING,
        "torch.topk(scores_TE + e_score_correction_bias, top_k", "torch.topk(scores_TE, top_k",
        ROUTING_TESTS + "test_scores_plus_bias_choose_and_scores_alone_weigh",
    ),
    Mutation(
        "the correction bias is added to the weight", ROUTING,
        "weights_TK = scores_TE.gather(1, ids_TK)",
        "weights_TK = (scores_TE + e_score_correction_bias).gather(1, ids_TK)",
        ROUTING_TESTS + "test_scores_plus_bias_choose_and_scores_alone_weigh",
    ),
    Mutation(
        "weights are not renormalised", ROUTING,
        "    if renormalize:\n", "    if False:\n",
        ROUTING_TESTS + "test_a_hash_layer_is_routed_by_the_token_and_not_by_the_scores",
    ),
    Mutation(
        "hash layers are routed by their scores", ROUTING,
        "ids_TK = hash_indices_table[input_ids].long()",
        "ids_TK = torch.topk(scores_TE, top_k, dim=-1, sorted=False).indices",
        ROUTING_TESTS + "test_a_hash_layer_is_routed_by_the_token_and_not_by_the_scores",
    ),
    Mutation(
        "every layer asks the experts of its neighbour (seen in the text)",
        "model_plugins/moeray/vllm_hooks/remote_experts.py",
        "_dispatch(layer.model_layer, x", "_dispatch(layer.model_layer ^ 1, x",
        f"{PARITY}[bundled-short]",
    ),
    Mutation(
        "the shared expert is left out (seen in the text)", "model_plugins/moeray/vllm_hooks/remote_experts.py",
        "shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)",
        "shared_experts(shared_experts_input * 0, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)",
        f"{PARITY}[random-short]",
    ),
    Mutation(
        "the shard reads the routed experts too", "model_plugins/moeray/vllm_hooks/loader.py",
        "names = tuple(name for name in checkpoint.tensors if not unused(name))", "names = tuple(checkpoint.tensors)",
        "tests/integration/test_engine_in_process.py::"
        "test_the_shard_creates_no_parameter_of_a_routed_expert_and_reads_none",
    ),
    Mutation(
        "no shared expert is taken for one without width", "model_plugins/moeray/vllm_hooks/model.py",
        "        _spell_none(vllm_config.model_config.hf_config)\n", "",
        f"{KNOB}[n_shared_experts=0 swiglu_limit=0.0 num_hash_layers=4 engram=False groups=4]",
    ),
    # --- placement, packing, generations
    Mutation(
        "every layer uses the first layer's expert map", "cluster/moeray/transport/owners.py",
        "placement.group_of_expert(layer, shard, absent)", "placement.group_of_expert(0, shard, absent)",
        "tests/contract/test_transport.py::test_every_link_gives_the_oracles_bits_for_every_placement",
    ),
    Mutation(
        "an expert is looked for in the next group", "cluster/moeray/placement/expert_map.py",
        "groups_E[expert].append(group)", "groups_E[expert].append((group + 1) % self.num_groups)",
        "tests/unit/placement/test_expert_map.py::test_the_serving_group_of_every_expert_holds_it_for_every_shard",
    ),
    Mutation(
        "answers are taken one row too early", "cluster/moeray/transport/packing_kernel.py",
        "answer_N[group] = answer + status_rows", "answer_N[group] = answer + status_rows - 1",
        "tests/unit/transport/test_packing.py::test_every_pair_reaches_its_group_once_and_its_answer_is_found[host]",
    ),
    Mutation(
        "a merged call gets the rows of the call before it", "cluster/moeray/transport/merging.py",
        "zip(batch, rows_PD.split", "zip(batch[::-1], rows_PD.split",
        "tests/unit/transport/test_merging.py::test_calls_of_one_layer_that_waited_are_one_call_and_others_are_not_starved",
    ),
    Mutation(
        "a group reads its rows at the wrong place of the arena", "cluster/moeray/transport/channel.py",
        "return self._arena.view(offset, num_bytes)", "return self._arena.view(offset + 64, num_bytes - 64)",
        "tests/contract/test_transport.py::test_every_link_gives_the_oracles_bits_for_every_placement",
    ),
    Mutation(
        "a stale generation is accepted", "cluster/moeray/transport/session.py",
        "if generation not in (served := self._generations()):", "if not (served := self._generations()):",
        "tests/contract/test_transport.py::test_a_group_of_a_newer_generation_refuses_calls_and_shards_of_the_old",
    ),
    Mutation(
        "experts of a lost group are still looked for there", "cluster/moeray/transport/owners.py",
        "absent = frozenset(range(placement.num_groups)) - set(groups)", "absent: frozenset[int] = frozenset()",
        "tests/contract/test_failover.py::test_a_killed_groups_copies_give_the_same_bits",
    ),
    Mutation(
        "a failed layer call goes to the same groups again", "model_plugins/moeray/vllm_hooks/hop.py",
        "route.absent | frozenset(self._bad), in_a_hurry=True", "route.absent, in_a_hurry=True",
        "tests/unit/vllm_hooks/test_hop.py::test_a_lost_groups_copies_are_asked_at_once",
    ),
    Mutation(
        "ends of different models agree", "cluster/moeray/transport/handshake.py",
        "            if mine != other:\n", "            if False:\n",
        "tests/unit/transport/test_handshake.py::test_a_different_model_is_named_by_field_and_both_values",
    ),
    Mutation(
        "members of different models form a generation", "cluster/moeray/membership/agreement.py",
        "and member.identity != right.identity", "and False",
        "tests/unit/membership/test_agreement.py::"
        "test_two_groups_of_different_models_form_no_generation_and_both_are_named",
    ),
    # --- Engram
    Mutation(
        "Engram's multipliers are even", ENGRAM,
        "return drawn * 2 + 1", "return drawn * 2",
        READING_TESTS + "test_row_indices_are_exact_from_the_tokenizer_on",
    ),
    Mutation(
        "Engram's hash is off by one row", ENGRAM,
        "% primes_L1N + offsets_L1N", "% primes_L1N + offsets_L1N - 1",
        READING_TESTS + "test_row_indices_are_exact_from_the_tokenizer_on",
    ),
    Mutation(
        "Engram's hash is off by one token", ENGRAM,
        "np.where(inside_T, token_T - shift, 0)", "np.where(inside_T, token_T - shift + 1, 0)",
        "tests/unit/engram/test_addresses.py::test_rows_are_those_of_the_definition",
    ),
    Mutation(
        "Engram's lookback is off by one at a chunk's border", ENGRAM,
        "shift - 1 - within_T[outside]]", "shift - 2 - within_T[outside]]",
        "tests/unit/engram/test_addresses.py::test_rows_do_not_depend_on_chunks_or_on_neighbours_in_the_batch",
    ),
    Mutation(
        "the runner hands over the wrong lookback", "model_plugins/moeray/vllm_hooks/lookback.py",
        "np.arange(1, depth + 1)", "np.arange(0, depth)",
        "tests/integration/test_engine_in_process.py::"
        "test_a_chunked_prompt_reads_the_rows_of_the_whole_one_and_gives_the_same_answer",
    ),
    Mutation(
        "Engram's key is not normalised", ENGRAM,
        "match * _inverse_rms(h, rms_eps) * _inverse_rms(key, rms_eps)", "match * _inverse_rms(h, rms_eps)",
        READING_TESTS + "test_the_gated_streams_are_those_of_the_published_mathematics",
    ),
    Mutation(
        "the compiled gate takes the key as it is", ENGRAM_GATE,
        " * math.sqrt(key_square[0] / hidden + rms_eps)", "",
        "tests/unit/engram/test_gate.py::test_the_compiled_gate_rounds_the_formula_once",
    ),
    Mutation(
        "Engram does nothing (seen in the text)", "model_plugins/moeray/vllm_hooks/model.py",
        "        if self._engram is not None:\n            self._begin", "        if False:\n            self._begin",
        f"{PARITY}[bundled-short]",
    ),
    # --- guards
    Mutation(
        "packed weights without scales pass for numbers", CHECKPOINT,
        " or self.tensors[name].dtype in NEEDS_SCALES", "",
        "tests/unit/deepseek_v4/test_checkpoint.py::test_quantised_weights_of_the_shard_need_their_scales_too",
    ),
    Mutation(
        "files that change under a load are taken for what was loaded", CHECKPOINT,
        "        _require_unchanged(weight_file)\n", "        pass\n",
        "tests/unit/deepseek_v4/test_checkpoint.py::test_the_fingerprint_is_of_what_was_opened_or_an_error",
    ),
    # --- kernels that vLLM lacks on CPU
    Mutation(
        "a compressed entry is written one token late", KERNELS,
        "((position_T + 1) % COMPRESS_RATIO == 0)", "(position_T % COMPRESS_RATIO == 0)",
        "tests/unit/vllm_hooks/test_cpu_kernels.py::"
        "test_a_compressed_entry_goes_to_the_slot_of_the_token_that_completes_it",
    ),
    Mutation(
        "a query sees the compressed entry after it", KERNELS,
        "(row_start + context_T // COMPRESS_RATIO)", "(row_start + context_T // COMPRESS_RATIO + 1)",
        "tests/unit/vllm_hooks/test_cpu_kernels.py::test_a_query_sees_the_compressed_entries_before_it",
    ),
)  # fmt: skip


def copy_tree(target: Path) -> Path:
    """A copy of what tests need, apart from the environment; returns `target`."""
    ignored = shutil.ignore_patterns("__pycache__", ".*cache*", ".hypothesis")
    for name in (*CODE_ROOTS, "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


@contextmanager
def applied(mutation: Mutation, tree: Path) -> Iterator[None]:
    """Make the edit in a copy of the tree; take it back at the end.

    Raises:
        MutationIsDead: see there.
    """
    file = tree / mutation.file
    text = file.read_text(encoding="utf-8")
    count = text.count(mutation.old)
    if count != 1:
        raise MutationIsDead(
            f"{mutation.name}: {mutation.old!r} occurs {count} times in {mutation.file}, expected once"
        )
    file.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(text, encoding="utf-8")


def run_tests(tree: Path, *nodes: str) -> subprocess.CompletedProcess[str]:
    """Run these tests of the copy, on the copy's code, in a process of their own."""
    # The copy's roots come before the installed ones in the namespace package; tests start processes of their own.
    path = os.pathsep.join(str(tree / root) for root in CODE_ROOTS)
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rf",
        "--tb=line",
        "-p",
        "no:cacheprovider",
        "-m",
        "full or not full",
    ]
    return subprocess.run(
        [*command, *nodes], cwd=tree, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def verdict(done: subprocess.CompletedProcess[str]) -> bool:
    """Whether a test failed; one that could not be collected or set up did not judge anything."""
    return done.returncode == TESTS_FAILED and re.search(r"^FAILED ", done.stdout, re.MULTILINE) is not None
