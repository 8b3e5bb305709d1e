"""Compiled functions are kept where there is room for them, and work where there is none."""

from __future__ import annotations

import errno
import logging
import subprocess
import sys

import pytest
from numba import types
from numba.core import caching

from moeray.transport import compiled as compiled_module
from moeray.transport.compiled import compiled


def _add_products(a: float, b: float, c: float) -> float:
    return a * b + c


SIGNATURE = (types.float32, types.float32, types.float32)


def test_a_function_works_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", [])
    monkeypatch.setattr(compiled_module, "SLOW_S", 0.0)
    with caplog.at_level(logging.INFO):
        function = compiled(_add_products, SIGNATURE)
    assert function(2.0, 3.0, 4.0) == 10.0
    first, last = (record.message for record in caplog.records)
    assert first.startswith("_add_products is compiled without a copy on disk")
    assert last.startswith("compiled _add_products in")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), EOFError("cut short")])
@pytest.mark.parametrize("step", ["load_overload", "save_overload"])
def test_a_full_disk_or_a_damaged_copy_costs_a_compilation_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, step: str, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(caching.FunctionCache, step, fail)
    assert compiled(_add_products, SIGNATURE)(2.0, 3.0, 4.0) == 10.0


def test_nothing_is_compiled_or_imported_for_it_by_importing_the_transport() -> None:
    code = "import sys, moeray.transport, moeray.deepseek_v4; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_code_that_looks_through_all_modules_is_not_tripped_up() -> None:
    """As vLLM's CPU worker does when it starts."""
    compiled(_add_products, SIGNATURE)
    compiled(_add_products, SIGNATURE)
    for name, module in list(sys.modules.items()):
        if name.startswith(("llvmlite", "numba", "moeray")):
            for value in list(vars(module).values()):
                if hasattr(value, "__dict__"):
                    vars(value).get("kernel")


def test_other_arguments_are_an_error_and_nothing_is_compiled_for_them() -> None:
    function = compiled(_add_products, SIGNATURE)
    with pytest.raises(TypeError):
        function("a", "b", "c")
