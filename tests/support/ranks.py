"""A pool of gloo ranks that lives as long as its tests, so that processes start once.

The pool runs functions of test modules on every rank.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Seconds until a collective with a missing rank fails, and until a test that waits for
#: a rank counts as a hang.
TIMEOUT, HANG = 20, 90


class Ranks:
    """The place of a function: its rank, and the groups of any factorisation of all
    ranks.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._groups = {}

    def axes(self, *sizes: int):
        """``(coordinates, groups)`` of the ranks as a grid of these sizes.

        The group of an axis has the ranks that differ only along it.
        """
        assert torch.Size(sizes).numel() == self.world
        grid = torch.arange(self.world).view(sizes)
        groups = []
        for axis in range(len(sizes)):
            lines = grid.movedim(axis, -1).reshape(-1, sizes[axis]).tolist()
            groups.append(
                next(
                    group
                    for line, group in [(line, self.group(line)) for line in lines]
                    if self.rank in line
                )
            )
        at = (grid == self.rank).nonzero()[0].tolist()
        return at, groups

    def group(self, members, fresh=False, timeout=TIMEOUT):
        """The group of these ranks; every rank of the pool must request it.

        ``fresh`` makes a group for this test only, which it may break.
        """
        key = tuple(members)
        if fresh or key not in self._groups:
            made = dist.new_group(list(members), timeout=timedelta(seconds=timeout))
            if fresh:
                return made
            self._groups[key] = made
        return self._groups[key]


def _worker(rank, world, folder, paths, environment, pipe):
    os.environ.update(environment)
    sys.path[:0] = paths
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    ranks = Ranks(rank, world)
    while (task := pipe.recv()) is not None:
        module, name, arguments = task
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(ranks, *arguments)))
        except BaseException as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    dist.destroy_process_group()
    os._exit(0)  # there is nothing left to do, and an interpreter takes seconds to exit


class Pool:
    """``world`` processes; ``run`` calls a function of a test module on all of them and
    returns their results.
    """

    def __init__(self, world: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        paths = [
            str(Path(__file__).parent),
            *{str(path) for path in Path(__file__).parent.parent.glob("parallel")},
        ]
        environment = {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("TRITON", "REWEIGHT"))
        }
        self.pipes, self.processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (rank, world, self.folder.name, paths, environment, there)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def start(self, function, *arguments):
        for pipe in self.pipes:
            pipe.send((function.__module__, function.__name__, arguments))

    def results(self, alive=None):
        """``(returned, value or exception)`` of every rank in ``alive`` (default: all);
        a rank that hangs fails the test.
        """
        found = []
        for rank, pipe in itertools.compress(
            enumerate(self.pipes), alive or [True] * len(self.pipes)
        ):
            if not pipe.poll(HANG):
                raise AssertionError(f"rank {rank} hangs")
            found.append(pipe.recv())
        return found

    def run(self, function, *arguments):
        self.start(function, *arguments)
        found = self.results()
        wrong = [f"rank {rank}: {what}" for rank, (fine, what) in enumerate(found) if not fine]
        assert not wrong, "\n".join(wrong)
        return [what for _, what in found]

    def check(self, function, *arguments):
        """Run a function that returns the errors of its rank as a list of strings."""
        wrong = {
            f"rank {rank}: {what}"
            for rank, found in enumerate(self.run(function, *arguments))
            for what in found
        }
        assert not wrong, "\n".join(sorted(wrong))

    def close(self):
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            if process.is_alive():
                with contextlib.suppress(OSError):  # a dying rank has closed its end already
                    pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
