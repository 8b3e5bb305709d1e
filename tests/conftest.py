"""What every suite shares: no test fails for being slow, and tests that need a GPU are skipped where there is none."""

from __future__ import annotations

import pytest
from hypothesis import settings

# An example's time says how busy the machine is, or that something was compiled for the first time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_skipped_for_gpu: list[str] = []


def _num_cuda_devices() -> int:
    import torch  # seconds to import: only when a GPU test was selected

    return int(torch.cuda.device_count())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and _num_cuda_devices() == 0:
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, this machine has none"))
            _skipped_for_gpu.append(item.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped_for_gpu:
        terminalreporter.section("NOT TESTED: no CUDA device", yellow=True, bold=True)
        for nodeid in _skipped_for_gpu:
            terminalreporter.write_line(nodeid)
