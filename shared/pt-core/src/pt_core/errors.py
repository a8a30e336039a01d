"""What ends a run in one line: bad input, named precisely and before anything starts, and a loss that is not finite."""

from __future__ import annotations

from pathlib import Path


class InputError(ValueError):
    """Bad input. The message names the file, row and field (where there are any) and the remedy.

    The command line prints it as one line and exits with code 2.

    Args:
        problem: what is wrong, as a sentence without a full stop.
        remedy: what the user can do about it.
        file: the file that is wrong.
        row: 1-based row (line) in that file.
        field: the column or key that is wrong.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str = "",
        file: str | Path | None = None,
        row: int | None = None,
        field: str | None = None,
    ) -> None:
        where = [str(file)] if file is not None else []
        where += [f"row {row}"] if row is not None else []
        where += [f"field {field!r}"] if field is not None else []
        message = f"{', '.join(where)}: {problem}" if where else problem
        super().__init__(f"{message}. {remedy}" if remedy else message)


class NonFiniteLoss(RuntimeError):
    """The loss or its gradient is NaN or infinite. Says the step, the sample ids and the last good checkpoint.

    The command line prints it as one line and exits with code 1.
    """
