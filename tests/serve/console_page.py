"""The console in a headless Chromium: driving it, and watching what it must never do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from live_server import SECONDS, LiveServer
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, ViewportSize, expect, sync_playwright

expect.set_options(timeout=SECONDS * 1000)
DESKTOP: ViewportSize = {"width": 1280, "height": 800}
PHONE: ViewportSize = {"width": 360, "height": 800}


@contextmanager
def chromium() -> Iterator[Browser]:
    """The system's Chromium; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        # Its sandbox needs user namespaces or a set-uid helper, which containers do not give; the pages are ours.
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


class ConsolePage:
    """The page at one server, with the few things that people do on it."""

    def __init__(self, page: Page, server: LiveServer) -> None:
        self.page = page
        self.url = server.url
        self.refusals: list[int] = []  # statuses that the test wants to see
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.set_default_timeout(SECONDS * 1000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: self.asked.append(request.url))

    def _said(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        # Chromium reports every status of 400 and above; those that the test is about are no complaint.
        if not any(f"responded with a status of {status} " in message.text for status in self.refusals):
            self.complaints.append(message.text)

    def open(self) -> ConsolePage:
        """Load the page, to the point where it can be used."""
        self.page.goto(self.url)
        expect(self.find("#run")).to_be_enabled()
        return self

    def find(self, selector: str) -> Locator:
        """Elements by CSS selector."""
        return self.page.locator(selector)

    def parameter(self, path: str) -> Locator:
        """The control of a parameter, unfolded."""
        control = self.find(f'[id="parameter-{path}"]')
        control.evaluate("control => { control.closest('details').open = true }")
        return control

    def fill(self, **values: str) -> None:
        """Type into parameters; ``chat_template_kwargs__x`` is the parameter ``chat_template_kwargs.x``."""
        for name, value in values.items():
            self.parameter(name.replace("__", ".")).fill(value)

    def say(self, text: str) -> None:
        """Write the last message."""
        self.find(".turn.user textarea").last.fill(text)

    def run(self) -> None:
        """Run, and wait for the end."""
        self.find("#run").click()
        self.wait_for("Done")

    def wait_for(self, status: str) -> None:
        """Wait until the status line says so."""
        expect(self.find("#status")).to_have_text(status)

    def show(self, tab: str) -> None:
        """Go to a tab of the result."""
        self.find(f"#tab-{tab}").click()
        expect(self.find(f"#{tab}")).to_be_visible()

    def code(self, language: str) -> str:
        """The snippet in a language, as it is shown."""
        self.show("code")
        self.find(f"label[for=language-{language}]").click()
        return self.find("#code-text").text_content() or ""

    def check(self) -> None:
        """It complained of nothing, and asked nobody but its own server."""
        assert not self.complaints
        foreign = [url for url in self.asked if not url.startswith((self.url + "/", "data:"))]
        assert not foreign


@contextmanager
def opened(browser: Browser, server: LiveServer, **context: Any) -> Iterator[ConsolePage]:
    """A page in a profile of its own, which must have nothing to complain of at its end."""
    profile = browser.new_context(**{"viewport": DESKTOP, **context})
    try:
        page = ConsolePage(profile.new_page(), server)
        yield page
        page.check()
    finally:
        profile.close()
