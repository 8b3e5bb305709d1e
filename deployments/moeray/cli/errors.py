"""What a command says when it cannot do what was asked."""

from __future__ import annotations


class CommandError(RuntimeError):
    """Printed as one line; `status` is the exit status: 2 the request is wrong, 1 it failed."""

    def __init__(self, message: str, *, status: int = 1) -> None:
        super().__init__(message)
        self.status = status
