"""A headless Chromium on the page where people compare; tests are skipped where there is none.

Debian's `chromium` and `chromium-driver` are used, and selenium from the extra `dev`. Nothing but
the page itself can be reached from it.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (the extra dev)")
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver"
)
PHONE, DESKTOP = (390, 844), (1280, 900)

# Nothing is asked of the network but the page; without /dev/shm, which is small in containers.
ARGUMENTS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-proxy-server", "--no-first-run", "--disable-extensions", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
    "--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Browser:
    """One browser; `get`, `press` and `click` return when the page that follows is there."""

    def __init__(self):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ARGUMENTS:
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        service = webdriver.ChromeService(DRIVER)
        self.driver = webdriver.Chrome(options=options, service=service)

    def get(self, address: str) -> None:
        self.driver.get(address)

    def fresh(self) -> None:
        """As somebody else: no cookies, no earlier complaints."""
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.complaints(), self.requests()
        self.size(*DESKTOP)
        self.dark(False)

    def press(self, *keys: str) -> None:
        """Keys, one after the other, to whatever has the focus."""
        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def goes_on(self, *keys: str) -> None:
        """Keys of which the last one leads to the next page."""
        self.driver.execute_script("window.before = true")
        self.press(*keys)
        self.until(lambda: self.js("return !window.before && document.readyState === 'complete'"))

    def until(self, holds, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.text
            time.sleep(0.01)

    def js(self, script: str, *values):
        return self.driver.execute_script(script, *values)

    def find(self, css: str):
        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str):
        return self.driver.find_elements(By.CSS_SELECTOR, css)

    @property
    def text(self) -> str:
        return self.js("return document.body.innerText")

    def size(self, width: int, height: int) -> None:
        touch = {"enabled": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", touch)
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600},
        )

    def dark(self, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})

    def complaints(self) -> list[str]:
        """What stands in the console since the last call: errors, also of the security policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """The addresses asked for since the last call."""
        rows = self.driver.get_log("performance")
        events = [json.loads(row["message"])["message"] for row in rows]
        sent = [each["params"] for each in events if each["method"] == "Network.requestWillBeSent"]
        return [each["request"]["url"] for each in sent]

    def screenshot(self, path: Path) -> None:
        self.driver.save_screenshot(str(path))

    def axe(self) -> list[str]:
        """Serious and critical findings of axe-core on the page that is shown."""
        self.js(Path(os.environ["AXE_CORE"]).read_text(encoding="utf-8"))
        run = "const done = arguments[0]; axe.run().then((found) => done(found.violations));"
        found = self.driver.execute_async_script(run)
        return [
            f"{each['id']}: {node['target']} {node['failureSummary']}"
            for each in found
            if each["impact"] in ("serious", "critical")
            for node in each["nodes"]
        ]
