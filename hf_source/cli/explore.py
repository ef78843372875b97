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
"""`hf-source explore`: an app in which people ask a recorded model and look at the rows behind what it says."""

from typing import Annotated

import typer

from .groups import Scoring
from .options import Datasets, Index, Record


def explore(
    record: Record,
    scoring: Scoring,
    dataset: Datasets = None,
    index: Index = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port.", show_default="the first free one from 7860")] = None,
    browser: Annotated[bool, typer.Option(help="Open it in the browser.")] = False,
) -> None:
    """Open an app: type a prompt, mark a part of the answer, see the rows, and what removing a group would change.

    Needs the extra `app` (gradio). With an --index (`hf-source index`) every question is answered in seconds. It
    serves on this machine only, unless --host says otherwise.
    """
    from ..explorer import Explorer
    from ..explorer.app import launch

    attributor = scoring.open_with(dataset, record, index=index)
    launch(Explorer(attributor), server_name=host, server_port=port, inbrowser=browser)
