"""Functions compiled for this machine's CPU when they are first needed, and kept on disk where there is room for them.

numba is imported when the first of them is made, so that commands which compute nothing do not wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pickle import UnpicklingError
from time import perf_counter
from typing import Any

logger = logging.getLogger(__name__)

SLOW_S = 0.2
"""A function found on disk takes less; one that is compiled takes more, and the log says so."""


def compiled(function: Callable[..., Any], signature: tuple[Any, ...]) -> Callable[..., Any]:
    """Compile `function` for these argument types now; it runs without the GIL.

    Floating-point operations stay as they are written: none is reordered and no product is fused with a sum, so that
    results are the same on every machine.

    Args:
        function: in a module of its own with all that it calls: the copy on disk is renewed when that file changes.
        signature: the arguments' numba types; the result raises TypeError for others.
    """
    from numba import njit

    _answer_to_own_names_only()
    started = perf_counter()
    try:
        dispatcher = njit(nogil=True, cache=True, error_model="numpy")(function)
        dispatcher.compile(signature)
    except (RuntimeError, OSError, EOFError, UnpicklingError) as error:
        # No folder can be written (numba's RuntimeError), the disk is full, or a copy on it was cut short.
        logger.warning("%s is compiled without a copy on disk: %s", function.__qualname__, error)
        dispatcher = njit(nogil=True, error_model="numpy")(function)
        dispatcher.compile(signature)
    dispatcher.disable_compile()  # other arguments are an error, not seconds of compiling in the middle of a request
    seconds = perf_counter() - started
    if seconds > SLOW_S:
        logger.info("compiled %s in %.1f s", function.__qualname__, seconds)
    result: Callable[..., Any] = dispatcher
    return result


def _answer_to_own_names_only() -> None:
    """Keep llvmlite's handle of its library from answering to `__dict__`.

    It looks every name up in the library and wraps what it finds, for names of Python's own too. Code that goes through
    the attributes of all modules then fails on `vars(handle)`; vLLM's CPU worker is such code when it starts.
    """
    from llvmlite.binding import ffi

    handle: Any = ffi._lib_wrapper
    look_up = handle.__getattr__
    if look_up.__module__ == __name__:
        return

    def look_up_others(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return look_up(self, name)

    handle.__getattr__ = look_up_others
