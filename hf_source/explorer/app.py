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
"""The buttons of the explorer (Gradio). Texts of rows and models are shown by escaping templates, never as markup."""

from collections.abc import Callable
from functools import cache, wraps
from math import exp
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import escape

from ..errors import ConfigError, HFSourceError
from .session import Explorer, Found, Group, row_numbers, shares


EVERY = "every stage"
ANY = "any"
_WHOLE = "the whole answer (mark a part of it to ask about that)"

STYLE = """
.hfs { --up: #0b6b5d; --down: #ad3716; --quiet: #59616b; --line: #e3e0da; width: 100%; }
.dark .hfs { --up: #5cc9b0; --down: #f2906b; --quiet: #a9aeb6; --line: #3a3f46; }
table.hfs { border-collapse: collapse; border: 0 !important; font-size: .92rem; table-layout: fixed; }
.hfs th, .hfs td { text-align: left; vertical-align: top; padding: .38rem .7rem .38rem 0 !important; overflow-wrap: anywhere; }
.hfs th, .hfs td, .hfs tr { border: 0 !important; } .hfs tr + tr td { border-top: 1px solid var(--line) !important; }
.hfs th { font-size: .8rem; color: var(--quiet) !important; font-weight: 600; }
.hfs tr:first-child th:nth-child(1) { width: 7rem; } .hfs tr:first-child th:nth-child(2) { width: 5rem; }
.hfs tr:first-child th:nth-child(3) { width: 6rem; } .hfs tr:first-child th:nth-child(4) { width: 4rem; }
.hfs .n { text-align: right; font-variant-numeric: tabular-nums; } .hfs .text { white-space: pre-wrap; }
.hfs tr.up td:not(.plain) { color: var(--up) !important; } .hfs tr.down td:not(.plain) { color: var(--down) !important; }
.hfs .bar { display: inline-block; height: .55rem; min-width: 1px; border-radius: .1rem; background: currentColor; }
.hfs tr.up .bar { background: var(--up); } .hfs tr.down .bar { background: var(--down); }
.hfs p { margin: .3rem 0; } .hfs .quiet { color: var(--quiet) !important; font-size: .9rem; } .hfs .away { position: absolute; left: -99rem; }
"""  # noqa: E501


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("hf_source.explorer"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )


def rendered(template: str, **values: Any) -> str:
    """A fragment of HTML in which everything given is escaped, also from Gradio's own `${...}`."""
    return (
        _environment().get_template(f"{template}.html.j2").render(**values).replace("$", "&#36;").replace("`", "&#96;")
    )


def rows_html(explorer: Explorer, found: Found | None, group: Group, k: int) -> str:
    """The strongest rows of a group as a table."""
    if found is None:
        return ""
    rows = explorer.top(found, group, int(k))
    largest = max((abs(row["score"]) for row in rows), default=0.0) or 1.0
    return rendered("rows", rows=rows, largest=largest, unit=found.unit)


def summary_html(found: Found) -> str:
    """What was asked, how likely the model finds it, and where its support comes from."""
    probability = None if found.loss is None else f"{exp(-max(found.loss, 0.0)):.3g}"
    values = {"asked": found.asked, "loss": found.loss, "probability": probability, "shares": shares(found)}
    return rendered("summary", **values, trust=found.trust, sentences=[])


def group_from(stage: str, column: str, value: str, rows: str = "") -> Group:
    """The group that the fields stand for."""
    numbers = row_numbers(rows or "")
    chosen = None if stage == EVERY else stage
    if column == ANY or value == ANY:
        return Group(chosen, rows=numbers)
    return Group(chosen, column, value, numbers)


def build_app(explorer: Explorer) -> Any:
    """The app, a `gradio.Blocks`; `launch` starts it.

    Raises:
        ConfigError: if gradio is not installed.
    """
    gr = _gradio()

    def friendly(function: Callable) -> Callable:
        """Errors that say what to change are shown in the app."""

        @wraps(function)
        def wrapped(*values: Any) -> Any:
            try:
                return function(*values)
            except HFSourceError as error:
                raise gr.Error(str(escape(str(error))), duration=15, print_exception=False) from error

        return wrapped

    def generate(prompt: str, count: float) -> tuple:
        return explorer.generate(prompt, int(count)), None, _WHOLE

    def mark(event: gr.SelectData) -> tuple:
        start, end = sorted(event.index)
        return ((start, end), event.value) if end > start else (None, _WHOLE)

    def ask(prompt: str, answer: str, span: tuple | None, k: float, *fields: str) -> tuple:
        found = explorer.ask(prompt, answer, tuple(span) if span else None)
        return found, summary_html(found), rows_html(explorer, found, group_from(*fields), int(k)), ""

    def show(found: Found | None, k: float, *fields: str) -> str:
        return rows_html(explorer, found, group_from(*fields), int(k))

    def remove(found: Found | None, *fields: str) -> str:
        if found is None:
            raise gr.Error("Ask about an answer first: which rows?", print_exception=False)
        removal = explorer.remove(found, group_from(*fields))
        return rendered("summary", sentences=removal.sentences(found.unit))

    def of_stage(stage: str) -> tuple:
        return gr.Dropdown(choices=[ANY, *explorer.columns(_stage(stage))], value=ANY), _values(
            gr, explorer, stage, ANY
        )

    with gr.Blocks(title="hf_source explorer", analytics_enabled=False) as app:
        gr.Markdown("# Why does the model say that?\nAsk it, mark a part of the answer, and see the rows behind it.")
        span, found = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(label="Prompt", lines=2, elem_id="prompt")
                with gr.Row():
                    count = gr.Slider(1, explorer.longest, min(16, explorer.longest), step=1, label="Longest answer")
                    generated = gr.Button("Generate", elem_id="generate")
                answer = gr.Textbox(label="Answer (yours to change)", lines=3, interactive=True, elem_id="answer")
                marked = gr.Textbox(_WHOLE, label="Asked about", interactive=False, elem_id="marked")
                asked = gr.Button("Which rows?", variant="primary", elem_id="ask")
                summary = gr.HTML(elem_id="summary")
            with gr.Column(scale=3):
                with gr.Row():
                    stage = gr.Dropdown([EVERY, *explorer.stages], value=EVERY, label="Stage", elem_id="stage")
                    column = gr.Dropdown([ANY, *explorer.columns(None)], value=ANY, label="Column", elem_id="column")
                    value = gr.Dropdown([ANY], value=ANY, label="Value", elem_id="value")
                    k = gr.Slider(1, 50, 5, step=1, label="Rows a direction")
                rows = gr.HTML(elem_id="rows")
                with gr.Row():
                    numbers = gr.Textbox(label="Rows of the stage, as 3, 5, 8-10; all if empty", elem_id="numbers")
                    removed = gr.Button("What if not trained on these?", elem_id="remove")
                removal = gr.HTML(elem_id="removal")
        fields = [stage, column, value]
        gr.on([generated.click, prompt.submit], friendly(generate), [prompt, count], [answer, span, marked],
              api_name="generate")  # fmt: skip
        answer.select(mark, None, [span, marked], api_name=False)
        answer.input(lambda: (None, _WHOLE), None, [span, marked], api_name=False)
        asked.click(friendly(ask), [prompt, answer, span, k, *fields], [found, summary, rows, removal], api_name=False)
        stage.input(of_stage, stage, [column, value], api_name=False).then(
            friendly(show), [found, k, *fields], rows, api_name=False
        )
        column.input(lambda *chosen: _values(gr, explorer, *chosen), [stage, column], value, api_name=False).then(
            friendly(show), [found, k, *fields], rows, api_name=False
        )
        gr.on([value.input, k.release], friendly(show), [found, k, *fields], rows, api_name=False)
        removed.click(friendly(remove), [found, *fields, numbers], removal, api_name=False)
    return app


def launch(explorer: Explorer, **options: Any) -> Any:
    """Start the app; it loads nothing from elsewhere and reports to nobody.

    Args:
        explorer: what it shows.
        options: of `gradio.Blocks.launch`, such as `server_port` and `share`.
    """
    gr = _gradio()
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Base(primary_hue="teal", neutral_hue="stone", **fonts)
    dark = {f"button_primary_background_fill{part}": "#0b6b5d" for part in ("", "_hover", "_dark", "_hover_dark")}
    theme = theme.set(**dark, block_label_text_color="#59616b", block_title_text_color="#59616b")
    return build_app(explorer).launch(theme=theme, css=STYLE, footer_links=[], **options)


def _stage(stage: str) -> str | None:
    return None if stage == EVERY else stage


def _values(gr: Any, explorer: Explorer, stage: str, column: str) -> Any:
    return gr.Dropdown(choices=[ANY, *explorer.values(_stage(stage), None if column == ANY else column)], value=ANY)


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise ConfigError("The explorer needs gradio: pip install 'hf_source[app]'.") from error
    return gradio
