# Copyright 2026 The hf_source team. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Jobs in spawned processes, each of which opens what it needs once; a process that dies costs its own job only."""

import multiprocessing
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from ..errors import ConfigError
from ..logs import get_logger


logger = get_logger(__name__)

Open = Callable[[], Callable[[Any], Any]]
"""What `multiprocessing` can send; called once in a process, and gives the function that does a job there."""


@dataclass(frozen=True)
class Failure:
    """A job that came to nothing.

    Attributes:
        reason: one line.
        details: the traceback, if the job raised.
        died: whether its process died, twice.
    """

    reason: str
    details: str = ""
    died: bool = False


def run_jobs(open_worker: Open, jobs: Sequence[Any], num_workers: int) -> Iterator[tuple[int, Any]]:
    """Do jobs, several at once.

    Args:
        open_worker: see `Open`.
        jobs: what the workers' function is called with.
        num_workers: processes, each with one thread; 0 does the jobs in this process, one after the other.

    Yields:
        Position and result of each job as it is done, in any order; a `Failure` for one that raised, or whose process
        died twice.

    Raises:
        ConfigError: if something cannot be sent to another process.
    """
    if num_workers < 1:
        work = open_worker()
        for position, job in enumerate(jobs):
            yield position, _attempt(work, job)
        return
    pool = _Pool(open_worker, min(num_workers, len(jobs)))
    try:
        yield from pool.run(jobs)
    finally:
        pool.close()


def _attempt(work: Callable[[Any], Any], job: Any) -> Any:
    try:
        return work(job)
    except Exception as error:  # whatever the user's own training raises belongs to this one job
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())


def _serve(connection: Connection, open_worker: Open) -> None:
    """The life of a worker."""
    torch.set_num_threads(1)
    work = None
    while True:
        job = connection.recv()
        if work is None:
            opened = _attempt(lambda _: open_worker(), None)
            if isinstance(opened, Failure):
                connection.send(opened)
                continue
            work = opened
        connection.send(_attempt(work, job))


class _Pool:
    """Worker processes and what each is at."""

    def __init__(self, open_worker: Open, size: int) -> None:
        self.open_worker, self.size = open_worker, size
        self.context = multiprocessing.get_context("spawn")  # forked copies of threads and of CUDA do not work
        self.workers: dict[Connection, tuple[Any, int | None]] = {}

    def _start(self) -> Connection:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=_serve, args=(theirs, self.open_worker), daemon=True)
        try:
            process.start()
        except (OSError, RuntimeError):  # no room for one more, or a script without `if __name__ == "__main__"`
            raise
        except Exception as error:  # while `open_worker` is written down for it
            raise ConfigError(
                f"What training needs cannot be sent to another process ({error}). Give functions and classes that "
                "are defined at the top of a module, or num_workers=0."
            ) from error
        theirs.close()  # so that the death of the process ends the connection
        self.workers[ours] = (process, None)
        return ours

    def run(self, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """See `run_jobs`."""
        waiting, attempts = deque(range(len(jobs))), [0] * len(jobs)
        idle = [self._start() for _ in range(self.size)]
        while waiting or any(job is not None for _, job in self.workers.values()):
            while waiting and idle:
                self._give(idle.pop(), waiting.popleft(), jobs, attempts)
            busy = [connection for connection, (_, job) in self.workers.items() if job is not None]
            for connection in wait(busy):
                process, position = self.workers[connection]
                try:
                    result = connection.recv()
                except (EOFError, OSError):
                    process.join()
                    del self.workers[connection]
                    idle.append(self._start())
                    reason = f"its process died (exit code {process.exitcode})"
                    if attempts[position] < 2:
                        logger.warning(f"Job {position}: {reason}; it is tried once more.")
                        waiting.appendleft(position)
                        continue
                    result = Failure(f"{reason}, twice", died=True)
                else:
                    self.workers[connection] = (process, None)
                    idle.append(connection)
                yield position, result

    def _give(self, connection: Connection, position: int, jobs: Sequence[Any], attempts: list[int]) -> None:
        attempts[position] += 1
        process, _ = self.workers[connection]
        self.workers[connection] = (process, position)
        try:
            connection.send(jobs[position])
        except OSError:
            pass  # it died while idle: the next wait finds the end of the connection

    def close(self) -> None:
        """End every process."""
        for connection, (process, _) in self.workers.items():
            connection.close()
            process.terminate()
        for process, _ in self.workers.values():
            process.join()
