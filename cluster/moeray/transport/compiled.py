"""Functions compiled for this machine's CPU when they are first needed, and kept on disk where there is room for them.

numba is imported when the first of them is made, so that commands which compute nothing do not wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
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
        signature: the arguments' numba types.
    """
    from numba import njit

    started = perf_counter()
    try:
        dispatcher = njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError as error:  # numba's way to say that neither the package's nor the user's folder can be written
        logger.info("%s is compiled at every start: %s", function.__qualname__, error)
        dispatcher = njit(nogil=True, error_model="numpy")(function)
    dispatcher.compile(signature)
    seconds = perf_counter() - started
    if seconds > SLOW_S:
        logger.info("compiled %s in %.1f s", function.__qualname__, seconds)
    result: Callable[..., Any] = dispatcher
    return result
