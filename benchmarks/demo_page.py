"""Asks the page of `sigphi demo` in a headless Chromium, and writes the screenshot of docs/demo.md.

    python benchmarks/demo_page.py runs/quickstart/vlm --picture runs/quickstart/sample.png

Needs selenium, Chromium and its driver: `pip install selenium`, `apt-get install chromium chromium-driver`.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

ROOT = Path(__file__).parent.parent
SCREENSHOT = ROOT / "docs" / "images" / "demo.png"
QUESTION = "What is the main object in this image?"
PATIENCE = 300  # seconds that anything may take on a busy machine


def browser_programs() -> tuple[str, str] | None:
    """Chromium (or Chrome) and its driver, where both are installed."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    return None if browser is None or driver is None else (browser, driver)


@contextmanager
def served(command: list[str], log: Path, **options: Any) -> Iterator[str]:
    """
    Run a command that serves a page, and give the address that it prints.

    Args:
        command (`list[str]`): the command.
        log (`Path`): file for its standard error.
        options: of `subprocess.Popen`.
    """
    with log.open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, **options)
    assert process.stdout is not None
    try:
        lines = (re.search(r"http://\S+", line) for line in process.stdout)
        address = next(filter(None, lines), None)
        if address is None:
            raise RuntimeError(f"{command} has ended without an address:\n{log.read_text()[-3000:]}")
        yield address[0].rstrip("/")
    finally:
        process.terminate()
        process.wait(PATIENCE)
        process.stdout.close()


class Page:
    """
    The page in a browser.

    Args:
        driver (`selenium.webdriver.Chrome`): the browser.
        address (`str`): of the page.
    """

    def __init__(self, driver: webdriver.Chrome, address: str) -> None:
        self.driver, self.address = driver, address
        driver.get(address)
        self.wait(lambda: self.at("#ask").is_displayed())

    def at(self, selector: str) -> Any:
        """The first element of a CSS selector."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        """All elements of a CSS selector."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def wait(self, condition: Any) -> Any:
        """Wait until something is true, and return it."""
        passing = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.driver, PATIENCE, ignored_exceptions=passing).until(lambda _: condition())

    def upload(self, path: Path) -> None:
        """Choose a file of this machine, in place of the picture that is there."""
        if self.all("#picture img"):
            self.at("#picture button[title='Remove Image']").click()
            self.wait(lambda: not self.all("#picture img"))
        self.at("#picture input[type=file]").send_keys(str(path.resolve()))

    def show_picture(self, path: Path) -> None:
        """[`upload`] a picture, and wait until it is seen."""
        self.upload(path)
        self.wait(lambda: self.all("#picture img"))

    def choose_example(self, number: int, what: str) -> None:
        """Click one of the examples; `what` is `"pictures"` or `"questions"`."""
        self.all(f"#example-{what} .gallery-item")[number].click()

    def type_question(self, question: str) -> None:
        """Write a question in place of the one that is there."""
        box = self.at("#question textarea, #question input")
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(Keys.DELETE)
        box.send_keys(question)

    def ask(self) -> dict[str, Any]:
        """Press the button and wait for both answers; what is shown then."""
        self.at("#ask").click()
        self.wait(lambda: self.at("#verdict").text.strip())
        return self.shown()

    def shown(self) -> dict[str, Any]:
        """What the page says now."""
        texts = {name: self._value(name) for name in ("answer", "confidence", "blank", "blank-confidence")}
        lines = [line.text.split("\n") for line in self.all("#classes .confidence-set")]
        return texts | {"verdict": self.at("#verdict").text.strip(), "classes": lines}

    def _value(self, name: str) -> str:
        return self.at(f"#{name} textarea, #{name} input").get_property("value")

    def refusal(self) -> str:
        """Press the button and wait for the message that says why there is no answer; it is closed again."""
        self.at("#ask").click()
        return self.message()

    def message(self) -> str:
        """Wait for a message, and close it."""
        # Messages move and go by themselves, so that an element that was found may be gone already.
        read = "return [...document.querySelectorAll('[data-testid=toast-text]')].map(e => e.textContent).join(' ')"
        close = "document.querySelectorAll('[data-testid=toast-close]').forEach(e => e.click())"
        text = self.wait(lambda: self.driver.execute_script(read).strip())
        self.driver.execute_script(close)
        self.wait(lambda: not self.driver.execute_script(read))
        return text

    def requested_elsewhere(self) -> list[str]:
        """The addresses outside this page's server that the browser has asked for, since this was last called."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        assert any(url.startswith(self.address) for url in urls), "the browser's log tells of no request"
        return [url for url in urls if not url.startswith((self.address, "data:", "blob:"))]


@contextmanager
def opened(address: str, width: int = 1200, height: int = 1220) -> Iterator[Page]:
    """The page of an address in a browser without a window."""
    programs = browser_programs()
    if programs is None:
        raise RuntimeError("there is no Chromium with its driver: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location, driver_path = programs
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    # The sandbox needs what containers do not give; shared memory is small in them.
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-dev-shm-usage",
        "disable-gpu",
        "disable-background-networking",
    ):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--window-size={width},{height}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(driver_path))
    try:
        driver.set_page_load_timeout(PATIENCE)
        yield Page(driver, address)
    finally:
        driver.quit()


def demo_command(model: str, *words: str) -> list[str]:
    """The command that serves the page of a model, on a free port."""
    return [sys.executable, "-m", "sigphi", "demo", model, "--port", "0", *words]


def main() -> None:
    """Ask one question, write what is shown to standard output, and the screenshot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--picture", type=Path, required=True)
    parser.add_argument("--question", default=QUESTION)
    parser.add_argument("--output", type=Path, default=SCREENSHOT)
    options = parser.parse_args()
    log = Path(tempfile.mkdtemp(), "demo.log")
    with served(demo_command(options.model), log) as address, opened(address) as page:
        page.show_picture(options.picture)
        page.type_question(options.question)
        sys.stdout.write(json.dumps(page.ask(), indent=2) + "\n")
        options.output.parent.mkdir(exist_ok=True)
        page.driver.save_screenshot(str(options.output))
    # With a palette it is a third as large, and nobody sees the difference.
    with Image.open(options.output) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(options.output, optimize=True)


if __name__ == "__main__":
    main()
