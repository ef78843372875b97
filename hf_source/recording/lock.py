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
"""One writer at a time: a record is locked by the process that writes to it.

The lock is the operating system's, so it goes with the process that held it, however that ended.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import RecordError
from ..logs import get_logger


logger = get_logger(__name__)

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".writer.lock"

_held: set[Path] = set()
"""Records that this process writes to: the operating system does not lock a process out of its own files."""


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """Hold the lock of a record.

    Raises:
        RecordError: if another writer holds it; says which process.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecordError(f"A record cannot be written to {root} ({error}): choose another record_dir.") from error
    file = root.resolve() / LOCK_FILE
    if file in _held:
        raise _busy(root, f"another trainer of this process (pid {os.getpid()})")
    descriptor = _locked(file, root)
    _held.add(file)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is still ours
        _held.discard(file)
        os.close(descriptor)
        with contextlib.suppress(OSError):
            root.rmdir()  # if nothing was recorded


def _locked(file: Path, root: Path) -> int:
    """An open and locked descriptor of the file that has this name now."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                # Not flock: processes that training forks (data loaders) would hold that one too, and outlive us.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            owner = _owner(descriptor)
            os.close(descriptor)
            raise _busy(root, owner) from error
        except OSError as error:
            logger.warning(f"{root} cannot be locked ({error}): make sure that no other training writes to it.")
        if _is_current(descriptor, file):
            break
        os.close(descriptor)  # its last holder removed it while we waited
    os.truncate(descriptor, 0)
    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
    return descriptor


def _is_current(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def _busy(root: Path, owner: str) -> RecordError:
    return RecordError(
        f"The record {root} is being written by {owner}. Wait until that training ends (or end it), or set another "
        "record_dir."
    )
