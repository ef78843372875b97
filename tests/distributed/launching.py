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
"""Starting several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent


def launch(script, *arguments, processes=2):
    """Run a script of this folder in some processes that talk through gloo on this machine; what they printed.

    Raises:
        AssertionError: if a process failed; holds what it printed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # What `accelerate launch` starts on GPUs; on CPUs it starts one process, whatever it is told.
    start = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_addr", "127.0.0.1"]
    command = [sys.executable, *start, "--master_port", port, str(HERE / script), *map(str, arguments)]
    paths = [str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def endings(folder):
    """How a case of two processes ended on each: `None`, or the error's class and message."""
    return [json.loads((folder / f"ended-{rank}.json").read_text()) for rank in range(2)]
