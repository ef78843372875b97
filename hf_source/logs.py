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
"""Messages of one process among several that train together."""

from typing import Any

from accelerate import PartialState
from accelerate.logging import MultiProcessAdapter
from accelerate.logging import get_logger as accelerate_logger


class _Logger(MultiProcessAdapter):
    """accelerate's, which otherwise fails before something has asked which process this is.

    A record may be read, or a worker die, before anything trains.
    """

    def log(self, level: int, msg: str, *args: Any, **kwargs: Any) -> None:
        """See `logging.Logger.log`; on the main process only, unless `main_process_only=False`."""
        PartialState()
        kwargs.setdefault("stacklevel", 3)  # the line that warns, beyond this method and accelerate's
        super().log(level, msg, *args, **kwargs)


def get_logger(name: str) -> MultiProcessAdapter:
    """The logger of a module."""
    return _Logger(accelerate_logger(name).logger, {})
