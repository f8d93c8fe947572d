"""The page in Chromium, from the disk: it opens, its tables can be sorted, and it asks the network for nothing."""

import json
import shutil
from urllib.parse import urlsplit

import pytest

from symphony_hf.evaluation.report.find_runs import read_runs
from symphony_hf.evaluation.report.page import write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, which drives the browser, is not installed")

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.once,
    pytest.mark.enable_socket,  # selenium speaks to the driver over the loopback
    pytest.mark.allow_hosts(["127.0.0.1", "::1"]),
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="Chromium is not installed: apt-get install chromium chromium-driver",
    ),
]
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",  # or a click comes while the page still scrolls
)


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get("about:blank")
    for log in ("browser", "performance"):
        driver.get_log(log)  # what the browser's own start page did is read, and gone
    yield driver
    driver.quit()


def requested(browser):
    """Addresses of everything that the page asked for, what is inside it left out."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert urls, "the browser logged no request, not even the page's own"
    return [url for url in urls if urlsplit(url).scheme != "data"]


def column(browser, caption, place):
    script = """
        const table = [...document.querySelectorAll("table")].find((t) => t.caption.textContent === arguments[0]);
        return [...table.tBodies[0].rows].map((row) => row.cells[arguments[1]].textContent.trim());
    """
    return browser.execute_script(script, caption, place)


def header(browser, caption, place):
    return browser.find_element("xpath", f"//table[caption='{caption}']/thead/tr/th[{place + 1}]")


def test_it_opens_and_asks_for_nothing(browser, page):
    browser.get(page.as_uri())
    assert browser.title == "4 runs compared"
    sizes = browser.execute_script("return [...document.images].map((image) => image.complete && image.naturalWidth)")
    assert len(sizes) > 10
    assert all(sizes), "a picture did not load"
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert requested(browser) == [page.as_uri()]
    assert browser.get_log("browser") == []


def test_a_header_sorts_its_column(browser, page):
    browser.get(page.as_uri())
    rows = column(browser, "Levels", 4)
    numbers = sorted(float(value.replace(",", "")) for value in rows if not value.endswith("%"))
    button = header(browser, "Levels", 4).find_element("tag name", "button")
    for order, expected in (("ascending", numbers), ("descending", numbers[::-1])):
        button.click()
        shown = [float(value.replace(",", "")) for value in column(browser, "Levels", 4) if not value.endswith("%")]
        assert shown == expected
        assert header(browser, "Levels", 4).get_attribute("aria-sort") == order
    words = column(browser, "Levels", 2)
    header(browser, "Levels", 2).find_element("tag name", "button").send_keys("\ue007")  # the key Enter
    assert column(browser, "Levels", 2) == sorted(words)
    assert header(browser, "Levels", 4).get_attribute("aria-sort") is None
    assert sorted(column(browser, "Levels", 4)) == sorted(rows)
    # What is missing comes last, in both directions.
    for _ in range(2):
        header(browser, "Levels", 7).find_element("tag name", "button").click()
        assert column(browser, "Levels", 7)[-2:] == ["–", "–"]
    # By number, not by letter: 10 comes after 2.
    names = column(browser, "Routing of routed", 0)
    assert names == [f"layer {number}" for number in range(len(names))]
    script = """
        const captions = [...document.querySelectorAll("caption")];
        const table = captions.find((caption) => caption.textContent === "Routing of routed").closest("table");
        table.tBodies[0].rows[0].cells[0].textContent = "layer 10";
    """
    browser.execute_script(script)
    header(browser, "Routing of routed", 0).find_element("tag name", "button").click()
    assert column(browser, "Routing of routed", 0) == [*names[1:], "layer 10"]
    assert browser.get_log("browser") == []


def test_scripts_of_a_run_do_not_run(browser, trained, tmp_path, quick_pictures):
    """Even where the page had not made text of them, its policy would stop them."""
    run = tmp_path / "<img src=x onerror=document.title=1>"
    shutil.copytree(trained, run)
    results = json.loads((run / "results.json").read_text())
    results["command"] = "</code></script><script>document.title = 'taken'</script>"
    (run / "results.json").write_text(json.dumps(results))
    page = write_page(read_runs([run]), tmp_path / "page.html")
    browser.get(page.as_uri())
    assert browser.title == run.name
    assert requested(browser) == [page.as_uri()]
    browser.execute_script("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert any("Content Security Policy" in message for message in refused)
    browser.execute_script(
        "const s = document.createElement('script'); s.text = 'document.title=1'; document.body.append(s)"
    )
    assert browser.title == run.name


def test_it_fits_a_phone(browser, page):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") == 400
