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
"""How commands tell that something is wrong."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..errors import HFSourceError


@contextmanager
def friendly_errors() -> Iterator[None]:
    """Errors that say what to change, and being interrupted, are shown without a traceback."""
    try:
        yield
    except HFSourceError as error:
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as stopped:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(130) from stopped
