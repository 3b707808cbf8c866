"""Progress of a run: a bar of rich on standard error, or one line per case without
rich.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Steps:
    """Progress of a run, used in ``with steps.running():``.

    :meth:`begin` starts a case, :meth:`advance` counts its steps, and :meth:`restart`
    begins a case that is measured again.
    """

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        self._start = 0.0
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
            )
        except ImportError:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task("", total=total)

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._bar is None else self._bar

    def begin(self, name: str) -> None:
        if self._bar is None:
            print(name, file=sys.stderr, flush=True)
        else:
            self._bar.update(self._task, description=name)
            self._start = self._bar.tasks[self._task].completed

    def restart(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=self._start)

    def advance(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)
