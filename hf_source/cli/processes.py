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
"""Commands that `torchrun` or `accelerate launch` starts several times: all compute, one speaks and writes."""

import contextlib
import os
from collections.abc import Iterator


def is_main_process() -> bool:
    """Whether this is the first, or the only one, of the processes of a launch."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """What is printed on standard output is, by the main process only; errors are everybody's."""
    if is_main_process():
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
