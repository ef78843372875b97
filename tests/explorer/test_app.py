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
"""The explorer's app in a real browser: every button, and texts that would like to run."""

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_source import SourceAttributor
from hf_source.cli import app as cli
from hf_source.explorer import Explorer, Found, Group
from hf_source.explorer.app import ANY, EVERY, group_from, launch, rendered, rows_html, summary_html

from ..browser import chromium
from ..outputs.test_shown import HOSTILE, Page
from ..story import chats, facts


ATTACKS = [*HOSTILE, "${alert(4)}", "`${document.title='mine'}`", "[x](javascript:alert(5))"]
EVIL = "<img src=x onerror=alert(6)>"


@pytest.fixture(scope="module")
def explorer(story):
    attributor = SourceAttributor.from_record(story.path, num_samples=16, progress=False)
    rows = facts().add_column(EVIL, [EVIL] * 4 + ["wiki"] * 4)
    attributor.set_dataset("pretrain", rows.add_column("origin", ["atlas"] * 6 + ["wiki"] * 2))
    attributor.set_dataset("sft", chats())
    return Explorer(attributor, longest=8)


@pytest.fixture(scope="module")
def address(explorer):
    gradio = pytest.importorskip("gradio", reason="the explorer needs the extra `app`")
    assert gradio
    server, address, _ = launch(explorer, prevent_thread_lock=True, quiet=True, show_error=True)
    yield address
    server.blocks.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.mark.parametrize("text", ATTACKS)
def test_texts_are_escaped(text):
    def page(given: str) -> Page:
        rows = [{"stage": given, "row": 1, "score": 0.5, "text": given}]
        found = Found(given, 1.0, {given: np.ones(2, dtype=np.float32)}, given, given)
        html = rendered("rows", rows=rows, largest=1.0, unit=given) + summary_html(found)
        assert "${" not in html
        return Page(html + rendered("summary", sentences=[given]))

    harmless, hostile = page("harmless"), page(text)
    assert hostile.tags == harmless.tags and hostile.attributes == harmless.attributes
    assert hostile.text.count(text) == harmless.text.count("harmless") == 7


def test_fields_stand_for_a_group():
    assert group_from(EVERY, ANY, ANY) == Group()
    assert group_from("sft", ANY, "x", "2 3") == Group("sft", rows=(2, 3))
    assert group_from("sft", "origin", "wiki") == Group("sft", "origin", "wiki")


def test_nothing_is_shown_before_a_question(explorer):
    assert rows_html(explorer, None, Group(), 5) == ""
    found = explorer.ask("Peru:", " Lima")
    assert "No row of this group" in rows_html(explorer, found, Group("sft", "origin", "wiki"), 5)


def choose(page, field: str, value: str) -> None:
    """Pick an entry of a dropdown, as a person does."""
    page.click(f"#{field} input")
    page.get_by_role("option", name=value, exact=True).click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_app_from_prompt_to_prediction(browser, address, explorer, scheme, tmp_path):
    with browser.open(address, scheme) as seen:
        page = seen.page
        page.fill("#prompt textarea", "Peru:")
        page.click("#generate")
        page.wait_for_function("document.querySelector('#answer textarea').value")
        assert page.input_value("#answer textarea") == explorer.generate("Peru:", 8)
        page.fill("#answer textarea", " Lima")
        page.wait_for_timeout(300)
        page.evaluate("""() => {
            const area = document.querySelector('#answer textarea');
            area.focus(); area.setSelectionRange(1, 3); area.dispatchEvent(new Event('select'));
        }""")
        page.wait_for_function("document.querySelector('#marked textarea, #marked input').value == 'Li'")
        page.click("#ask")
        page.wait_for_selector("#rows table")
        found = explorer.ask("Peru:", " Lima", (1, 3))
        assert f"{explorer.top(found, Group(), 5)[0]['score']:+.4f}" in page.inner_text("#rows")
        assert "Asked about Li, which has a probability of" in page.inner_text("#summary")

        choose(page, "stage", "pretrain")
        page.wait_for_timeout(500)
        choose(page, "column", "origin")
        page.wait_for_timeout(500)
        choose(page, "value", "wiki")
        page.wait_for_function("document.querySelectorAll('#rows tr').length == 3")
        page.click("#remove")
        page.wait_for_selector("#removal p")
        expected = explorer.remove(found, Group("pretrain", "origin", "wiki"))
        assert expected.sentences("nats")[0] in page.inner_text("#removal")
        page.fill("#numbers textarea, #numbers input", "nothing")
        page.click("#remove")
        page.wait_for_selector("text=is no row number")
        assert [text for text in seen.low_contrast() if "hfs" in text or "BUTTON.lg" in text] == []
        page.screenshot(path=tmp_path / "shot.png")
        own = [url for url in seen.requests if not url.startswith((address.rstrip("/"), "data:", "blob:"))]
        assert not own and not seen.errors and not seen.dialogs


def test_hostile_texts_do_not_run(browser, address, explorer):
    """In the prompt, the answer, column names, their values and error messages."""
    with browser.open(address) as seen:
        page = seen.page
        page.fill("#prompt textarea", EVIL[:24])
        page.fill("#answer textarea", "${`<b>`}")
        page.click("#ask")
        page.wait_for_selector("#rows table")
        assert "${`<b>`}" in page.inner_text("#summary")
        choose(page, "column", EVIL)
        page.wait_for_timeout(500)
        choose(page, "value", EVIL)
        page.wait_for_function("document.querySelector('#value input').value.includes('onerror')")
        page.fill("#numbers textarea, #numbers input", EVIL)
        page.click("#remove")
        page.wait_for_selector("text=is no row number")
        assert page.locator("img[src=x]").count() == 0 and page.locator("#summary b").count() == 0
        assert not seen.dialogs and not seen.errors


def test_from_a_shell(story, monkeypatch):
    started = []
    monkeypatch.setattr(
        "hf_source.explorer.app.launch", lambda explorer, **options: started.append((explorer, options))
    )
    words = ["explore", str(story.path), "--method", "bm25", "--port", "7999"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    ((explorer, options),) = started
    assert explorer.attributor.method == "bm25" and explorer.stages == ["pretrain", "sft"]
    assert explorer.attributor.index is None
    assert options == {"server_name": "127.0.0.1", "server_port": 7999, "inbrowser": False}
