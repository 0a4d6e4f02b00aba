"""The page of `steerkit serve` in a real browser."""

from __future__ import annotations

import ast
import contextlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest

from steerkit.composition.terms import Composition
from steerkit.serve import Request
from steerkit.serve.running import bound, running
from steerkit.serve.settings import Settings
from tests.serve.asked import STEERINGS, chat
from tests.serve.spoken import Served, served, slowly

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra browser)")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

NEW = 6
MINUS = "\u2212"
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


class Shown(NamedTuple):
    """A page, and what it has asked for."""

    page: Any
    requests: list[Any]

    def ask(self, question: str) -> None:
        self.page.get_by_label("Your question").fill(question)
        self.page.get_by_role("button", name="Send").click()
        self.until_answered()

    def until_answered(self) -> None:
        playwright.expect(self.page.locator("#status")).to_have_text(
            re.compile("Answered|Stopped"), timeout=PATIENCE_MS
        )

    def answer(self, column: str) -> str:
        return str(self.page.locator(f"[data-column={column}] .answer").last.text_content())

    def slider(self, name: str = "a") -> Any:
        return self.page.get_by_role("slider", name=f"strength of {name}")

    def copied(self, kind: str) -> str:
        self.page.get_by_role("group", name="Copy the composition").get_by_role("button", name=kind).click()
        playwright.expect(self.page.locator("#status")).to_contain_text("Copied")
        return str(self.page.evaluate("() => navigator.clipboard.readText()"))


@contextlib.contextmanager
def opened(browser: Any, address: str, width: int = 1280, **options: Any) -> Iterator[Shown]:
    """A page whose every request stays with the server, and in which nothing fails."""
    context = browser.new_context(viewport={"width": width, "height": 800}, **options)
    context.set_default_timeout(PATIENCE_MS)
    context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
    page = context.new_page()
    requests: list[Any] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if "Security Policy" in message.text else None)
    page.goto(address)
    yield Shown(page, requests)
    own = urlsplit(address).netloc
    assert {urlsplit(one.url).netloc for one in requests if not one.url.startswith("data:")} == {own}
    assert not problems
    context.close()


@pytest.fixture
def shown(browser: Any, server: Served) -> Iterator[Shown]:
    with opened(browser, server.address) as one:
        one.page.get_by_label("Most tokens").fill(str(NEW))
        one.page.get_by_label("Add a vector").wait_for()
        yield one


def said(server: Served, question: str, steering: str | None) -> str:
    (answer,) = server.engine.answers(Request(chat(question), steering=steering, max_tokens=NEW))
    return answer.text


def test_a_slider_changes_the_steered_text_alone(shown: Shown, server: Served) -> None:
    shown.ask("Hi")
    plain, steered = shown.answer("plain"), shown.answer("steered")
    assert (plain, steered) == (said(server, "Hi", None), said(server, "Hi", "a*1"))
    shown.slider().press("End")
    line = str(shown.page.locator("#composition").text_content())
    assert Composition.parse(line).terms[0].strength == float(shown.slider().get_attribute("max"))
    shown.page.get_by_role("button", name="Again").click()
    shown.until_answered()
    assert shown.answer("plain") == plain
    assert shown.answer("steered") == said(server, "Hi", line) != steered
    assert shown.page.locator(".turn").count() == 1
    # And with the sign turned, answered again by itself.
    shown.page.get_by_label("Answer again when a slider moves").check()
    shown.slider().press("Home")
    playwright.expect(shown.page.locator(".turn .used")).to_have_text(f"- {line}")
    shown.until_answered()
    playwright.expect(shown.page.locator(".answer[aria-busy=false]")).to_have_count(2)
    assert (shown.answer("plain"), shown.answer("steered")) == (plain, said(server, "Hi", f"- {line}"))


def test_a_slider_that_moves_meanwhile_is_followed(shown: Shown) -> None:
    page = shown.page
    page.get_by_label("Answer again when a slider moves").check()
    with slowly():
        page.get_by_label("Your question").fill("Hi")
        page.get_by_label("Your question").press("Enter")
        page.locator("[data-column=steered] .token").first.wait_for(state="attached")
        shown.slider().press("ArrowRight")
        playwright.expect(page.locator(".turn .used")).to_have_text("a*1.1")
    shown.until_answered()
    assert page.locator(".turn").count() == 1


def test_what_is_copied_is_the_composition(shown: Shown, server: Served) -> None:
    page = shown.page
    card = page.get_by_role("group", name="a", exact=True)
    card.get_by_label("from").fill("2")
    card.get_by_label("to", exact=True).fill("5")
    card.get_by_label("strength of a as a number").fill("2.25")
    page.get_by_label("Add a vector").select_option("b")
    other = page.get_by_role("group", name="b", exact=True)
    other.get_by_label("Tokens").select_option("all")
    assert other.get_by_label("from").is_disabled()
    shown.slider("b").press("ArrowLeft")
    page.get_by_label("System prompt").fill("It's \"short\"\nand 'sweet'")
    wanted = Composition.parse("a[2:5]*2.25 + b@all*0.9")
    assert Composition.parse(shown.copied("Text")) == wanted
    shown.ask("Hi")
    answer = shown.answer("steered")

    words = shlex.split(shown.copied("curl"))
    assert words[:2] == ["curl", f"{server.address}/v1/chat/completions"]
    status, text = server.post("/v1/chat/completions", words[-1].encode())
    assert (status, json.loads(text)["choices"][0]["message"]["content"]) == (200, answer)

    called = ast.parse(shown.copied("Python")).body[-1].value.args[0].value  # type: ignore[attr-defined]
    assert {one.arg: ast.literal_eval(one.value) for one in called.keywords if one.arg} == {"vector": str(wanted)}
    page.get_by_role("button", name="Remove a").click()
    page.get_by_role("button", name="Remove b").click()
    assert page.locator("#composition").text_content() == "no steering"


def test_every_composition_is_written_as_steerkit_reads_it(shown: Shown) -> None:
    more = (
        '"two words"@first(3)*2 norm - a~b[:7]',
        "- a*2 fade(cosine over 8 to 1) + b*1e-9",
        '"1.5"*3',
        "- é-b_c/d.e",
        "a when(b > 1 off 0.5 & (c < 0 | ~(a > 2)) | b < -3 per token)",
        'a*2 when("two words" > 1e-7 & (b < 1 & c > 2)) + b when(a > 1 | (b > 2 | c > 3) | a < 0)',
        "b hold(a at -1.5 within -3 to 0)",
    )
    known = [Composition.parse(one) for one in (*filter(None, STEERINGS), *more)]
    write = "async (all) => { const { textOf } = await import('./page/composition.js'); return all.map(textOf); }"
    texts = shown.page.evaluate(write, [one.as_json()["terms"] for one in known])
    assert [Composition.parse(text) for text in texts] == known


def test_tokens_are_tinted(shown: Shown, server: Served) -> None:
    page = shown.page
    shown.ask("Hi")
    assert page.locator(".token.tinted").count() == 0
    page.get_by_label("Tint by").select_option("kl")
    (answer,) = server.engine.answers(Request(chat("Hi"), steering="a*1", max_tokens=NEW, kl=True, probe="b"))
    distances, readings = [one.kl for one in answer.tokens], [one.reading for one in answer.tokens]
    playwright.expect(page.locator("#most")).to_have_text(f"{max(distances):.2f}")  # type: ignore[type-var]
    assert page.locator("[data-column=plain] .tinted").count() == 0  # it is no way from itself
    facts = page.locator("[data-column=steered] .facts")
    assert f"mean KL {sum(distances) / NEW:.3f} nats" in facts.text_content()  # type: ignore[arg-type]
    colours = page.eval_on_selector_all(
        "[data-column=steered] .token", "(all) => all.map((one) => getComputedStyle(one).backgroundColor)"
    )
    assert len(set(colours)) > 1
    first = page.locator("[data-column=steered] .token").first
    share = first.evaluate("(one) => Number(one.style.getPropertyValue('--share'))")
    assert share == pytest.approx(0.9 * distances[0] / max(distances))  # type: ignore[operator,type-var]
    first.hover()
    assert f"KL {distances[0]:.3f} nats" in facts.text_content()

    # A probe is read from the next answer on.
    page.get_by_label("Tint by").select_option("b")
    assert page.locator("#unit").text_content() == "b is read from the next answer on"
    assert page.locator(".token.tinted").count() == 0
    page.get_by_role("button", name="Again").click()
    shown.until_answered()
    assert page.locator("#unit").text_content() == "standard deviations of b"
    classes = page.eval_on_selector_all("[data-column=steered] .token", "(all) => all.map((one) => one.className)")
    assert {"below" in one for one in classes} <= {value < 0 for value in readings}  # type: ignore[operator]
    assert f"mean b {MINUS if sum(readings) < 0 else '+'}{abs(sum(readings) / NEW):.2f} sd" in facts.text_content()  # type: ignore[arg-type]


def test_by_keyboard_alone(shown: Shown) -> None:
    page = shown.page
    focused = "() => document.activeElement.getAttribute('aria-label') ?? document.activeElement.id"
    page.locator("#fresh").focus()
    seen = ["fresh"]
    while "question" not in seen:
        page.keyboard.press("Tab")
        seen.append(page.evaluate(focused))
        ring = page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
        assert ring == "solid", seen
        if seen[-1] == "strength of a":
            page.keyboard.press("ArrowRight")
        assert len(seen) < 40, seen
    assert {"strength of a", "add", "tint", "system", "seed"} <= set(seen)
    page.keyboard.type("Hi")
    page.keyboard.press("Enter")
    shown.until_answered()
    assert page.locator(".turn .used").text_content() == "a*1.1"
    # An answer is one stop; arrow keys go on from there.
    page.keyboard.press("Shift+Tab")
    tokens = page.locator("[data-column=steered] .token")
    playwright.expect(tokens.first).to_be_focused()
    page.keyboard.press("ArrowRight")
    playwright.expect(tokens.nth(1)).to_be_focused()
    assert "nats" in page.locator("[data-column=steered] .facts").text_content()
    page.keyboard.press("Shift+Tab")
    playwright.expect(page.locator("[data-column=plain] .token").first).to_be_focused()
    for live in ("#turns[aria-live=polite]", "#status[role=status]", "#error[role=alert]"):
        assert page.locator(live).count() == 1


@pytest.mark.parametrize("way", ["Stop", "Escape", "New chat"])
def test_an_answer_is_stopped(shown: Shown, server: Served, way: str) -> None:
    page = shown.page
    page.get_by_label("Most tokens").fill("64")
    with slowly():
        page.get_by_label("Your question").fill("Hi")
        page.get_by_label("Your question").press("Enter")
        page.locator("[data-column=steered] .token").nth(1).wait_for(state="attached")
        if way == "Escape":
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name=way).click()
        server.until_idle()
    if way == "New chat":
        assert page.locator(".turn").count() == 0
        return
    playwright.expect(page.locator("#status")).to_have_text("Stopped")
    assert 0 < page.locator("[data-column=steered] .token").count() < 64
    assert "stopped" in page.locator("[data-column=steered] .facts").text_content()


def test_each_column_goes_on_with_what_it_said(shown: Shown) -> None:
    shown.page.get_by_label("System prompt").fill("Be brief.")
    shown.ask("<b>Hi</b>")
    first = {name: shown.answer(name) for name in ("plain", "steered")}
    assert shown.page.locator(".question b").count() == 0  # text is text
    shown.ask("Why?")
    asked = [one.post_data_json for one in shown.requests if one.method == "POST"][-1]["messages"]
    for name, answer in first.items():
        assert [(one["role"], one["content"]) for one in asked[name]] == [
            ("system", "Be brief."),
            ("user", "<b>Hi</b>"),
            ("assistant", answer),
            ("user", "Why?"),
        ]
    assert shown.page.locator(".turn").count() == 2


def test_an_error_is_one_line_and_loses_nothing(shown: Shown, server: Served) -> None:
    page = shown.page
    shown.ask("Hi")
    page.get_by_label("Most tokens").fill("100000")
    page.get_by_label("Your question").fill("Why?")
    page.get_by_role("button", name="Send").click()
    error = page.locator("#error[role=alert]")
    playwright.expect(error).to_have_text("max_tokens: got 100000; answers have at most 64 here")
    assert page.get_by_label("Your question").input_value() == "Why?"
    page.get_by_role("button", name="Again").click()
    playwright.expect(page.get_by_role("button", name="Again")).to_be_enabled()
    assert page.locator(".turn").count() == 1
    assert shown.answer("plain") == said(server, "Hi", None)
    page.get_by_label("Most tokens").fill("3")
    shown.ask("Why?")
    assert (error.text_content(), page.locator(".turn").count()) == ("", 2)
    page.route("**/steerkit/compare", lambda route: route.abort())
    page.get_by_role("button", name="Again").click()
    playwright.expect(error).to_have_text("the server cannot be reached")


@pytest.mark.parametrize("width", [320, 400])
def test_a_phone_scrolls_down_only(browser: Any, server: Served, width: int) -> None:
    with opened(browser, server.address, width, is_mobile=True, has_touch=True) as shown:
        page = shown.page
        page.locator("summary").tap()
        for name in ("b", "c"):
            page.get_by_label("Add a vector").select_option(name)
        page.get_by_label("Tint by").select_option("b")
        page.get_by_label("Most tokens").fill(str(NEW))
        shown.ask("Why? " * 12 + "W" * 60)
        for is_open in (False, True):  # asking has closed them
            if is_open:
                page.locator("summary").tap()
            assert page.get_by_label("Add a vector").is_visible() == is_open
            assert page.evaluate("() => document.documentElement.scrollWidth") == width
        boxes = [page.locator(f"[data-column={name}] .answer").bounding_box() for name in ("plain", "steered")]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one above the other


def test_the_key_is_asked_for_and_kept_in_memory(browser: Any, server: Served) -> None:
    default = Composition.parse("b@all*0.5 - a[1:]*2 fade(linear over 4)")
    settings = Settings("tiny", default, api_key="open sesame")
    with (
        bound("127.0.0.1", 0) as listening,
        running(server.engine, settings, listening) as address,
        opened(browser, address) as shown,
    ):
        page, door = shown.page, shown.page.get_by_role("dialog")
        for key in ("wrong", "open sesame"):
            door.get_by_label("Key").fill(key)
            door.get_by_role("button", name="Go on").click()
            if key == "wrong":
                playwright.expect(door.get_by_role("alert")).to_contain_text("the key is missing or wrong")
        # What the server steers by where nobody says is where the page begins.
        playwright.expect(page.locator("#composition")).to_have_text(str(default))
        page.get_by_label("Most tokens").fill("3")
        shown.ask("Hi")
        assert "$STEERKIT_API_KEY" in shown.copied("curl")
        assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_the_page_is_sent_with_a_strict_policy(server: Served) -> None:
    status, page = server.get("/")
    assert status == 200
    assert not re.search(r"https?://|style=|\son\w+=|<style|<script>", page)
    for name in re.findall(r'(?:href|src)="([^"]+)"', page):
        assert server.get(f"/{name}")[0] == 200
    assert server.get("/page/../app.py")[0] == server.get("/page/app.py")[0] == 404


def luminance(colour: str) -> float:
    """Of a colour as WCAG 2 defines it, which browsers' own tools go by."""
    whole = colour if len(colour) == 7 else "#" + "".join(2 * one for one in colour[1:])
    parts = [int(whole[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_can_be_told_apart(server: Served) -> None:
    themes = re.findall(r":root \{(.*?)\}", server.get("/page/style.css")[1], re.DOTALL)
    assert len(themes) == 2
    for theme in themes:
        of = {name: luminance(colour) for name, colour in re.findall(r"--([\w-]+): (#\w+);", theme)}
        texts = [("ink", one) for one in ("paper", "card", "warm", "cool")] + [("on-accent", "accent")]
        texts += [(one, ground) for one in ("soft", "bad", "accent") for ground in ("paper", "card")]
        for one, ground in texts:
            low, high = sorted((of[one], of[ground]))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (one, ground)


@pytest.mark.slow
@pytest.mark.embedded
def test_the_embedded_model(browser: Any, embedded: tuple[Any, Any]) -> None:
    from steerkit.serve import Catalogue, Engine

    catalogue, settings = Catalogue(model="smollm2-135m"), Settings("smollm2-135m")
    with (
        Engine(*embedded, catalogue) as engine,
        bound("127.0.0.1", 0) as listening,
        running(engine, settings, listening) as address,
        opened(browser, address) as shown,
    ):
        page = shown.page
        page.get_by_label("Add a vector").select_option("pirate-persona")
        page.get_by_role("button", name=re.compile("Remove (?!pirate)")).click()
        page.get_by_label("Tint by").select_option("pirate-persona")
        page.get_by_label("Most tokens").fill("40")
        page.set_default_timeout(120_000)
        shown.ask("How was your day?")
        told = [re.search(r"mean pirate-persona (\S+) sd", one) for one in page.locator(".facts").all_text_contents()]
        plain, steered = (float(one[1].replace(MINUS, "-")) for one in told)  # type: ignore[index]
        assert steered > plain + 0.1
