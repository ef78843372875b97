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
"""A real browser for pages: what it complains of, what it loads, and whether people can read what it shows."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# Every element that shows text of its own, its colour against what is painted behind it (WCAG 2.1, section 1.4.3).
_CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const light = rgb => {
    const [r, g, b] = rgb.map(c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || !element.checkVisibility()) continue;
    const layers = [];
    for (let each = element; each; each = each.parentElement) {
      const [r, g, b, a = 1] = parse(getComputedStyle(each).backgroundColor);
      layers.push([r, g, b, a]);
    }
    let below = matchMedia('(prefers-color-scheme: dark)').matches ? [0, 0, 0] : [255, 255, 255];
    for (const layer of layers.reverse()) below = over(layer, below);
    const [r, g, b, a = 1] = parse(getComputedStyle(element).color);
    const [one, other] = [light(over([r, g, b, a], below)), light(below)];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([ratio, element.tagName + '.' + element.className + ': ' + element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


class Seen:
    """A page that is open in a browser.

    Attributes:
        page: of playwright.
        errors: console errors, refused loads and uncaught exceptions.
        requests: addresses that were asked for.
        dialogs: what scripts tried to say.
    """

    def __init__(self, page: Any) -> None:
        self.page, self.errors, self.requests, self.dialogs = page, [], [], []
        page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("dialog", self._dialog)

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def low_contrast(self, least: float = 4.5) -> list[str]:
        """Visible texts that are hard to read."""
        found = self.page.evaluate(_CONTRAST)
        assert found
        return [f"{ratio:.2f} {where}" for ratio, where in found if ratio < least]

    def overflows(self) -> bool:
        """Whether the page has to be scrolled sideways."""
        return self.page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


class Browser:
    """Headless Chromium."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser

    @contextmanager
    def open(self, address: str | Path, scheme: str = "light", width: int = 1100) -> Iterator[Seen]:
        """A file or an address, in a fresh context."""
        context = self.browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        try:
            seen = Seen(context.new_page())
            seen.page.goto(address.as_uri() if isinstance(address, Path) else address)
            yield seen
        finally:
            context.close()


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser of this machine; tests are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pages are looked at with the package `playwright`")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("there is no Chromium to look at pages with")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield Browser(browser)
        finally:
            browser.close()
