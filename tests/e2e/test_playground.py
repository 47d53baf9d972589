"""The playground in a real browser: Chromium without a window, against a small HTTP server and against a real replica."""

import random
import re
import shutil
from collections.abc import Callable, Iterator

import pytest

from .playground_server import HELD_AFTER, TEXTS, PlaygroundServer
from .replica_server import MODEL_NAME, ReplicaServer

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed; it is in the extra `dev`")

from selenium.common.exceptions import TimeoutException  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.select import Select  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or CHROMEDRIVER is None,
    reason="Chromium or its driver is not installed (Debian: apt-get install chromium chromium-driver)",
)

CONTRAST = """
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
function rgba(color) {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = color;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
}
function luminance(color) {
  const [r, g, b] = color.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element) {
  for (let at = element; at; at = at.parentElement) {
    const color = rgba(getComputedStyle(at).backgroundColor);
    if (color[3] === 255) return color;
  }
  return [255, 255, 255];
}
const found = [];
function note(element, color, text) {
  const [dark, light] = [luminance(rgba(color)), luminance(behind(element))].sort((a, b) => a - b);
  found.push([(light + 0.05) / (dark + 0.05), text]);
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement, style = getComputedStyle(element), text = walker.currentNode.data.trim();
  if (!text || !element.checkVisibility() || element.matches("option, script, noscript")) continue;
  note(element, element.closest("svg") ? style.fill : style.color, text);
}
for (const element of document.querySelectorAll("input:not([type=checkbox]), select, textarea")) {
  if (!element.checkVisibility()) continue;
  note(element, getComputedStyle(element).color, "value");
  if (element.placeholder) note(element, getComputedStyle(element, "::placeholder").color, element.placeholder);
}
return found;
"""
"""Contrast ratio, as WCAG 2 defines it, of every visible text with what is painted behind it."""

OUTSIDE = """
return [...document.querySelectorAll("body *")]
  .filter((element) => element.checkVisibility() && !element.closest(".scroll, svg") && element.tagName !== "OPTION")
  .filter((element) => { const box = element.getBoundingClientRect(); return box.left < 0 || box.right > innerWidth; })
  .map((element) => element.outerHTML.slice(0, 80));
"""
"""Elements that reach beyond the window's left or right edge."""


class Page:
    """The open page, by what a reader sees."""

    def __init__(self, driver) -> None:
        self.driver = driver
        self.expected_failures: set[int] = set()
        """HTTP statuses that the test provokes: the browser logs them as failed loads."""

    def open(self, url: str, precision: str = "8") -> None:
        self.driver.get(url)
        self.wait(lambda: self.column(0).find_element(By.CLASS_NAME, "precision").get_attribute("value") == precision)

    def wait(self, condition: Callable[[], object], timeout_s: float = 8) -> None:
        WebDriverWait(self.driver, timeout_s, poll_frequency=0.03).until(lambda _: condition())

    def id(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def column(self, index: int) -> WebElement:
        return self.driver.find_elements(By.CLASS_NAME, "column")[index]

    def part(self, index: int, name: str) -> WebElement:
        return self.column(index).find_element(By.CLASS_NAME, name)

    def text(self, index: int, name: str = "answer") -> str:
        """As it stands in the document: not what CSS makes of its spaces."""
        return self.part(index, name).get_property("textContent")

    def marks(self, index: int) -> list[str]:
        return [mark.text for mark in self.column(index).find_elements(By.TAG_NAME, "mark")]

    def choose(self, index: int, precision: str) -> None:
        Select(self.part(index, "precision")).select_by_value(precision)

    def type(self, *keys: str) -> None:
        ActionChains(self.driver).send_keys(*keys).perform()

    def press_control_enter(self) -> None:
        ActionChains(self.driver).key_down(Keys.CONTROL).send_keys(Keys.ENTER).key_up(Keys.CONTROL).perform()

    def set(self, element: WebElement, value: str) -> None:
        element.clear()
        element.send_keys(value)

    def run(self, timeout_s: float = 8) -> str:
        """Press Run and wait for the end; the status line."""
        self.id("run").click()
        self.wait_for_end(timeout_s)
        return self.id("status").text

    def wait_for_end(self, timeout_s: float = 8) -> None:
        self.wait(lambda: self.id("stop").get_attribute("aria-disabled") == "true", timeout_s)

    def emulate(self, width: int = 1120, **features: str) -> None:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        listed = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def complaints(self) -> list[str]:
        """What the browser has logged: errors of the script, violations of the policy, loads that failed unexpectedly."""
        expected = [f"status of {status} " for status in self.expected_failures]
        messages = [entry["message"] for entry in self.driver.get_log("browser")]
        return [message for message in messages if not any(status in message for status in expected)]


@pytest.fixture(scope="module")
def driver() -> Iterator:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--lang=en"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=CHROMEDRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def running_server() -> Iterator[PlaygroundServer]:
    with PlaygroundServer() as server:
        yield server


@pytest.fixture
def server(running_server: PlaygroundServer) -> PlaygroundServer:
    running_server.reset()
    return running_server


@pytest.fixture
def blank_page(driver) -> Iterator[Page]:
    """A browser window; afterwards, nothing may have gone wrong in it."""
    page = Page(driver)
    page.emulate()
    page.complaints()
    yield page
    complaints = page.complaints()
    driver.get("about:blank")
    assert complaints == []


@pytest.fixture
def page(blank_page: Page, server: PlaygroundServer) -> Page:
    blank_page.open(server.url)
    return blank_page


def test_it_knows_the_model_and_offers_what_the_server_holds(page: Page) -> None:
    assert page.id("about").text == "tiny"  # the aliases come first in /v1/models
    offered = [option.get_attribute("value") for option in Select(page.part(0, "precision")).options]
    assert offered == ["2", "3", "4", "6", "8", "mix-3.0", "mix-5.0", "auto"]
    assert [Select(page.part(index, "precision")).first_selected_option.text for index in (0, 1)] == ["8", "4"]


def test_all_columns_stream_at_once_and_text_appears_before_the_end(page: Page, server: PlaygroundServer) -> None:
    server.hold = True
    page.id("add").click()
    page.choose(2, "2")
    page.id("run").click()
    starts = [" ".join(TEXTS[name].split(" ")[:HELD_AFTER]) for name in ("8", "4", "2")]
    page.wait(lambda: [page.text(index) for index in range(3)] == starts)
    assert (server.open_streams, server.most_streams) == (3, 3)
    assert page.id("status").text == "Running 3 columns"
    assert [page.text(index, "tokens") for index in range(3)] == [str(HELD_AFTER)] * 3
    assert page.text(0, "first").endswith(" ms")
    assert page.text(1, "served") == "Served at 4 (header)"

    server.hold = False
    page.wait_for_end()
    assert [page.text(index) for index in range(3)] == [TEXTS[name] for name in ("8", "4", "2")]
    tokens = [len(TEXTS[name].split(" ")) for name in ("8", "4", "2")]
    assert [page.text(index, "tokens") for index in range(3)] == [str(count) for count in tokens]
    speed, step = (float(page.text(0, name)) for name in ("speed", "step"))
    assert speed * step == pytest.approx(1000, rel=0.02)
    assert re.fullmatch(r"Finished: A 22 tokens at [\d.]+ per second; B 21 tokens .*; C 20 tokens .*", page.id("status").text)


def test_what_is_sent(page: Page, server: PlaygroundServer) -> None:
    page.set(page.id("prompt"), "Call me Ishmael")
    page.set(page.id("max-tokens"), "5")
    page.set(page.id("temperature"), "0.5")
    page.choose(1, "auto")
    page.set(page.part(1, "tpot"), "12.5")
    page.set(page.part(1, "ttft"), "300")
    page.run()
    by_precision = {headers["x-precision"]: (headers, body) for headers, body in server.requests}
    body = by_precision["8"][1]
    assert body == by_precision["auto"][1]
    assert (body["model"], body["prompt"], body["max_tokens"], body["temperature"]) == ("tiny", "Call me Ishmael", 5, 0.5)
    assert body["stream"] is True
    budgets = {name: value for name, value in by_precision["auto"][0].items() if name.startswith("x-") and "budget" in name}
    assert budgets == {"x-latency-budget-ms": "12.5", "x-ttft-budget-ms": "300"}
    assert not any("budget" in name or "policy" in name or name == "authorization" for name in by_precision["8"][0])
    assert page.text(1, "served") == "Served at 4 (budget)"


def test_chat_is_offered_only_with_a_chat_template(page: Page, server: PlaygroundServer) -> None:
    page.wait(lambda: page.id("chat").is_displayed())
    page.id("chat").click()
    page.run()
    assert server.requests[0][1]["messages"] == [{"role": "user", "content": "The captain of the ship was"}]
    assert "prompt" not in server.requests[0][1]
    assert page.text(0) == TEXTS["8"]

    server.chat_template = False
    page.expected_failures = {400}
    page.open(server.url)
    assert not page.id("chat").is_displayed()


def test_words_that_differ_from_the_first_column_are_marked_by_more_than_colour(page: Page) -> None:
    page.run()
    assert (page.marks(0), page.marks(1)) == ([], ["gazed", "some"])
    assert page.part(1, "difference").text == "2 words differ from A (underlined); 3 words of A missing"
    assert not page.part(0, "difference").is_displayed()
    assert "underline" in page.column(1).find_element(By.TAG_NAME, "mark").value_of_css_property("text-decoration-line")


def longest_common(a: list[str], b: list[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        previous = row
        row = [0]
        for j, other in enumerate(b):
            row.append(previous[j] + 1 if word == other else max(previous[j + 1], row[j]))
    return row[-1]


RANDOM = random.Random(0)


@pytest.mark.parametrize(
    ("base", "other"),
    [
        pytest.param("the same words", "the same words", id="equal"),
        pytest.param("a b c d", "a d", id="words missing"),
        pytest.param("a d", "a\n\n b c\td ", id="words added, other white space"),
        pytest.param("", "a b", id="nothing in the first"),
        pytest.param("海は広い。", "海は青い。", id="no spaces between words"),
        pytest.param(" ".join(RANDOM.choices("abcd", k=70)), " ".join(RANDOM.choices("abcd", k=50)), id="random"),
    ],
)
def test_marks_are_what_is_outside_a_longest_common_subsequence(
    page: Page, server: PlaygroundServer, base: str, other: str
) -> None:
    server.word_delay_s = 0
    server.texts = {"8": base, "4": other}
    page.set(page.id("max-tokens"), "200")
    page.run()
    assert page.text(1) == other  # marking changes no character
    split = list if "海" in base else str.split
    common = longest_common(split(base), split(other))
    added, missing = len(split(other)) - common, len(split(base)) - common
    marked = "".join(page.marks(1)) if split is list else " ".join(page.marks(1))
    assert len(split(marked)) == added
    shown = page.part(1, "difference").text
    expected = [added, missing] if added + missing else []
    assert [int(number) for number in re.findall(r"\d+", shown)] == expected
    assert (shown == "Same words as A") == (not expected)


def test_model_output_is_text_whatever_it_looks_like(page: Page) -> None:
    page.choose(1, "2")
    page.run()
    assert "<img src=x onerror=alert(1)> <b>bold</b> &amp; end." in page.text(1)
    assert page.driver.execute_script("return document.querySelectorAll('.answer img, .answer b').length") == 0


def test_the_browser_refuses_markup_from_text_and_other_servers(page: Page) -> None:
    refused = page.driver.execute_script(
        "try { document.body.innerHTML = '<b>x</b>'; return 'allowed'; } catch (error) { return error.name; }"
    )
    assert refused == "TypeError"
    reached = page.driver.execute_async_script(
        "fetch('http://localhost:9/').then(() => arguments[0]('reached'), (error) => arguments[0](error.message))"
    )
    assert "Refused to connect" in reached or "Failed to fetch" in reached
    assert any("Content Security Policy" in message for message in page.complaints())


def test_stop_ends_the_streams_and_the_server_notices(page: Page, server: PlaygroundServer) -> None:
    server.hold = True
    page.id("run").click()
    page.wait(lambda: page.text(1, "tokens") == str(HELD_AFTER))
    page.id("stop").click()
    page.wait_for_end()
    assert page.id("status").text == "Stopped: A stopped; B stopped"
    assert page.text(0, "served") == "Served at 8 (header), stopped"
    assert page.text(0) == "The captain of"
    assert page.marks(1) == []
    page.wait(lambda: server.abandoned == 2)


def test_run_again_replaces_a_run_under_way(page: Page, server: PlaygroundServer) -> None:
    server.hold = True
    page.id("run").click()
    page.wait(lambda: page.text(1, "tokens") == str(HELD_AFTER))
    server.hold = False
    page.run()
    assert (page.text(0), page.text(1)) == (TEXTS["8"], TEXTS["4"])
    assert page.id("status").text.startswith("Finished: ")


def test_errors_are_shown_in_their_column_with_when_to_retry(page: Page) -> None:
    page.expected_failures = {400, 429}
    page.choose(1, "6")
    page.id("add").click()
    page.choose(2, "auto")
    page.part(2, "strict").click()
    assert page.run().endswith("B failed; C failed")
    assert page.text(0) == TEXTS["8"]
    refused = "precision '6' is not held by this replica; ask for one of 2, 3, 4, 8, auto"
    assert page.part(1, "error").text == f"Error 400: {refused}."
    assert page.part(2, "error").text == "Error 429: no precision meets the budget at the present load. Retry after 7 s."
    assert not page.part(0, "error").is_displayed()
    page.choose(1, "4")
    page.run()
    assert not page.part(1, "error").is_displayed()


def test_a_stream_that_breaks_off_is_an_error(page: Page, server: PlaygroundServer) -> None:
    server.breaks_off = True
    page.run()
    assert page.part(0, "error").text == "Error: the stream broke off before the answer was complete"
    assert page.part(1, "difference").is_displayed() is False


def test_a_key_is_asked_for_and_sent_but_not_kept(blank_page: Page, server: PlaygroundServer) -> None:
    page = blank_page
    page.expected_failures = {401}
    server.key = "sesame"
    page.driver.get(server.url)
    page.wait(lambda: page.id("status").text == "This server wants an API key.")
    page.set(page.id("key"), "wrong")
    page.run()
    assert page.id("status").text == "This server wants an API key."
    assert page.id("key").get_attribute("aria-invalid") == "true"
    page.set(page.id("key"), "sesame")
    page.id("prompt").click()
    page.wait(lambda: page.id("about").text == "tiny")
    page.run()
    assert {headers["authorization"] for headers, _ in server.requests} == {"Bearer sesame"}
    assert page.text(0) == TEXTS["8"]
    kept = page.driver.execute_script("return [localStorage.length, sessionStorage.length, document.cookie, location.search]")
    assert kept == [0, 0, "", ""]
    page.driver.refresh()
    page.wait(lambda: page.id("status").text == "This server wants an API key.")
    assert page.id("key").get_attribute("value") == ""


def test_the_keyboard_reaches_everything_in_order_with_visible_focus(page: Page) -> None:
    page.wait(lambda: page.id("chat").is_displayed())
    # Not by a click, so that the first Tab starts at the top.
    page.driver.execute_script(
        "arguments[0].value = 'auto'; arguments[0].dispatchEvent(new Event('change'))", page.part(1, "precision")
    )
    seen = []
    for _ in range(40):
        page.type(Keys.TAB)
        # The number in the document's order, what it is, and how its focus shows.
        at = page.driver.execute_script(
            "const at = document.activeElement, style = getComputedStyle(at);"
            "return [[...document.querySelectorAll('*')].indexOf(at), at.id || at.className || at.tagName,"
            " style.outlineStyle, parseFloat(style.outlineWidth)]"
        )
        if at[1] == "BODY" or at in seen:
            break
        seen.append(at)
    names = [name for _, name, *_ in seen]
    fields = ["prompt", "max-tokens", "temperature", "seed", "key", "chat", "add", "stop", "run"]
    auto = ["precision", "tpot", "ttft", "strict", "answer"]
    assert names == [*fields, "precision", "answer", *auto, "curve-load", "SUMMARY", "scroll"]
    assert [number for number, *_ in seen] == sorted(number for number, *_ in seen)
    assert all(style == "solid" and width >= 2 for *_, style, width in seen)


def test_everything_can_be_done_without_a_mouse(page: Page, server: PlaygroundServer) -> None:
    server.hold = True
    page.wait(lambda: page.id("chat").is_displayed())
    page.type(Keys.TAB)
    page.type(Keys.END, " and he")
    page.press_control_enter()
    page.wait(lambda: page.text(1, "tokens") == str(HELD_AFTER))
    assert server.requests[0][1]["prompt"].endswith(" and he")
    page.type(Keys.ESCAPE)
    page.wait_for_end()
    assert page.id("status").text.startswith("Stopped")

    server.hold = False
    page.type(*[Keys.TAB] * 6, Keys.ENTER)  # add a precision
    assert page.driver.switch_to.active_element == page.part(2, "precision")
    page.type("3")
    page.press_control_enter()
    page.wait_for_end()
    assert {headers["x-precision"] for headers, _ in server.requests[2:]} == {"8", "4", "3"}
    page.type(Keys.TAB, Keys.ENTER)  # remove it
    assert len(page.driver.find_elements(By.CLASS_NAME, "column")) == 2
    assert page.driver.switch_to.active_element == page.part(1, "precision")
    assert not page.part(0, "remove").is_displayed()


def test_results_are_announced(page: Page) -> None:
    assert page.id("status").get_attribute("role") == "status"
    assert page.run().startswith("Finished: A 22 tokens")
    names = [(page.part(index, part).accessible_name) for index in (0, 1) for part in ("precision", "answer")]
    assert names == ["Precision of column A", "Answer of column A", "Precision of column B", "Answer of column B"]


def test_a_phone_needs_no_horizontal_scrolling(page: Page, server: PlaygroundServer) -> None:
    page.emulate(width=320)
    page.expected_failures = {400}
    server.texts["2"] = "unbroken" * 60
    page.open(server.url)
    for index, precision in enumerate(["8", "2", "auto", "6", "mix-5.0"]):
        if index > 1:
            page.id("add").click()
        page.choose(index, precision)
    page.driver.find_element(By.TAG_NAME, "summary").click()
    page.run()
    assert page.driver.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    assert page.driver.execute_script(OUTSIDE) == []
    assert page.id("add").get_attribute("aria-disabled") == "true"  # five columns: as many as connections allow


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(page: Page, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme)
    page.expected_failures = {429}
    page.id("add").click()
    page.choose(2, "auto")
    page.part(2, "strict").click()
    page.driver.find_element(By.TAG_NAME, "summary").click()
    page.run()
    found = page.driver.execute_script(CONTRAST)
    texts = {text for _, text in found}
    assert {"gazed", "best-effort", "mix-5.0", "none", "value", "Run", "Stop"} <= texts
    assert any(text.startswith("Error 429") for text in texts)
    assert [entry for entry in found if entry[0] < 4.5] == []
    background = page.driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(int(part) for part in re.findall(r"\d+", background)) > 384) == (scheme == "light")


def test_nothing_moves_for_those_who_ask_for_that(page: Page) -> None:
    bar = page.driver.find_element(By.CLASS_NAME, "bar")
    assert bar.value_of_css_property("transition-duration") == "0.4s"
    page.emulate(prefers_reduced_motion="reduce")
    assert bar.value_of_css_property("transition-duration") == "0s"


def test_the_curve_shows_what_is_known(page: Page, server: PlaygroundServer) -> None:
    def points() -> list[str]:
        return [name.text for name in page.driver.find_elements(By.CSS_SELECTOR, "#curve .name")]

    assert sorted(points()) == ["2", "3", "4", "8", "mix-3.0", "mix-5.0"]
    assert page.id("curve-note").text == "Lower left is better. Not known yet: 6."
    Select(page.id("curve-load")).select_by_value("32")
    assert len(points()) == 6
    rows = page.driver.find_elements(By.CSS_SELECTOR, "#curve-numbers tbody tr")
    cells = [cell.get_property("textContent") for cell in rows[3].find_elements(By.TAG_NAME, "td")]
    assert cells == ["6", "6", "20.6", *["\N{EN DASH}"] * 3]

    for entry in server.document["data"]:
        entry["perplexity"] = None
    page.open(server.url)
    page.wait(lambda: "quality is shown as bits" in page.id("curve-note").text)
    assert len(points()) == 6

    for entry in server.document["data"]:
        entry["step_ms"] = None
    page.open(server.url)
    page.wait(lambda: page.id("curve-note").text.startswith("No curve yet"))
    assert points() == []


def test_a_server_that_reports_less_is_shown_with_what_there_is(page: Page, server: PlaygroundServer) -> None:
    for name in ("load", "latency_model", "slo", "decisions"):
        del server.document[name]
    server.document["data"] = [{"id": entry["id"], "default": entry["default"]} for entry in server.document["data"]]
    page.open(server.url)
    page.wait(lambda: page.id("facts").text == "Running\nnot reported")
    assert page.id("no-decisions").is_displayed()
    page.run()
    assert page.text(0) == TEXTS["8"]


def test_load_and_decisions_follow_the_server_while_the_page_is_visible(page: Page, server: PlaygroundServer) -> None:
    def hide(hidden: bool) -> None:
        page.driver.execute_script(
            "Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true });"
            "document.dispatchEvent(new Event('visibilitychange'))",
            hidden,
        )

    rows = page.id("decisions").find_elements(By.TAG_NAME, "tr")
    assert len(rows) == 9
    assert rows[0].text.split(" ", 1)[1] == "2 best-effort 9.60 5 9"  # the newest first
    assert page.id("running").text.split() == ["2", "1", "4", "3", "8", "5"]
    assert "12 ms per token, auto not below 3" in page.id("facts").text

    server.document["load"]["running"] = {"mix-5.0": 7}
    page.wait(lambda: page.id("running").text.split() == ["mix-5.0", "7"])
    hide(True)
    server.document["load"]["running"] = {"3": 2}
    with pytest.raises(TimeoutException):  # longer than the interval between two polls
        page.wait(lambda: page.id("running").text.split() == ["3", "2"], timeout_s=2.4)
    hide(False)
    page.wait(lambda: page.id("running").text.split() == ["3", "2"], timeout_s=1)


def test_wrong_fields_are_refused_before_anything_is_sent(page: Page, server: PlaygroundServer) -> None:
    page.set(page.id("max-tokens"), "0")
    page.press_control_enter()
    assert page.driver.switch_to.active_element == page.id("max-tokens")
    page.set(page.id("max-tokens"), "8")
    page.choose(1, "auto")
    page.set(page.part(1, "tpot"), "-3")
    page.press_control_enter()
    assert page.driver.switch_to.active_element == page.part(1, "tpot")
    assert server.requests == []


@pytest.mark.engine
def test_on_a_real_server(blank_page: Page, v1_server: ReplicaServer) -> None:
    page = blank_page
    page.open(f"{v1_server.url}/playground")
    page.wait(lambda: page.id("about").text == MODEL_NAME)
    page.id("add").click()
    page.choose(2, "2")
    page.set(page.id("max-tokens"), "24")
    page.run(timeout_s=60)
    assert [page.text(index, "served") for index in range(3)] == [f"Served at {name} (header)" for name in ("8", "4", "2")]
    for index in range(3):
        assert page.text(index).strip()
        assert 1 <= int(page.text(index, "tokens")) <= 24
        assert float(page.text(index, "speed")) > 0
    assert page.part(2, "difference").text.endswith("of A missing")
    assert page.marks(2)
