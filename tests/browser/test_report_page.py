"""The report as people see it: in a browser, on a phone and on a desk, by day and by night."""

from __future__ import annotations

import pytest

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
RUNS = ("molecules", "stress", "committee", "stopped")
PICTURE = "document.querySelector('#viewer canvas').toDataURL()"


@pytest.fixture
def visit(browser, pages):
    """Open a report and listen to it; everything that goes wrong is collected."""
    contexts, trouble = [], []

    def opened(name, width=1280, scheme="light", **settings):
        context = browser.new_context(
            viewport={"width": width, "height": 844}, color_scheme=scheme, **settings
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:"))
                or trouble.append(request.url))  # fmt: skip
        page.goto(pages[name].as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", RUNS)
def test_it_fits_and_is_silent(visit, name, width, scheme):
    page = visit(name, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing sticks out but what scrolls in a box of its own.
    outside = page.evaluate("""width => [...document.querySelectorAll('main *')]
        .filter(e => e.getBoundingClientRect().right > width + 1
                     && !e.closest('.scroll, pre, svg, .sr'))
        .map(e => e.tagName + '.' + e.className)""", width)  # fmt: skip
    assert outside == []
    assert page.locator("h1").is_visible()
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).count() == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_can_be_read_on_their_ground(visit, scheme):
    page = visit("stress", 1280, scheme)
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    letters = page.evaluate("""() => [...new Set([...document.querySelectorAll('.plot text')]
        .map(e => getComputedStyle(e).fill))]""")

    def light(colour):
        return sum(float(part) for part in colour[4:].rstrip(")").split(",")[:3]) / 3

    assert (light(ground) > 128) == (scheme == "light")
    assert letters
    assert all(abs(light(colour) - light(ground)) > 100 for colour in letters)


def test_the_structure_is_drawn_and_turned(visit):
    page = visit("molecules")
    canvas = page.locator("#viewer canvas")
    canvas.scroll_into_view_if_needed()
    first = page.evaluate(PICTURE)
    assert len(first) > 5000  # an empty one has some hundred letters
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 150, box["y"] + 150)
    page.mouse.down()
    page.mouse.move(box["x"] + 220, box["y"] + 170, steps=4)
    page.mouse.up()
    turned = page.evaluate(PICTURE)
    assert turned != first
    page.mouse.move(box["x"] + 20, box["y"] + 20)  # without a button nothing turns
    assert page.evaluate(PICTURE) == turned
    canvas.press("ArrowLeft")
    assert page.evaluate(PICTURE) != turned
    page.get_by_role("button", name="reset").click()
    assert page.evaluate(PICTURE) == first


def test_structures_and_arrows_can_be_chosen(visit):
    page = visit("molecules")
    first = page.evaluate(PICTURE)
    caption = page.locator("[data-caption]").inner_text()
    page.locator("[data-frame='2']").click()
    assert page.locator("[data-caption]").inner_text() != caption
    assert page.locator("[data-frame='2']").get_attribute("aria-pressed") == "true"
    page.locator("[data-frame='0']").click()
    assert page.evaluate(PICTURE) == first
    page.get_by_role("button", name="hide").click()
    bare = page.evaluate(PICTURE)
    page.get_by_role("button", name="starting model").click()
    assert len({first, bare, page.evaluate(PICTURE)}) == 3


def test_a_finger_turns_it_on_a_phone(visit):
    page = visit("stress", 390, has_touch=True, is_mobile=True, device_scale_factor=2)
    canvas = page.locator("#viewer canvas")
    canvas.scroll_into_view_if_needed()
    first, box = page.evaluate(PICTURE), canvas.bounding_box()
    touch = page.context.new_cdp_session(page)
    for kind, shift in (("touchStart", 0), ("touchMove", 30), ("touchMove", 60)):
        at = {"x": box["x"] + 100 + shift, "y": box["y"] + 100 + shift}
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [at]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    assert page.evaluate(PICTURE) != first
    assert page.evaluate("scrollY") >= 0


def test_without_scripts_there_are_still_pictures(visit):
    page = visit("molecules", java_script_enabled=False)
    assert page.locator(".stills svg").first.is_visible()
    assert not page.locator("#viewer").is_visible()


def test_with_scripts_they_make_room(visit):
    page = visit("molecules")
    assert page.locator("#viewer").is_visible()
    assert not page.locator(".stills").is_visible()


def test_commands_can_be_copied(visit):
    page = visit("molecules", permissions=["clipboard-read", "clipboard-write"])
    block = page.locator("#use pre").first
    block.get_by_role("button").click()
    block.get_by_text("copied").wait_for()
    assert "PETCalculator" in page.evaluate("navigator.clipboard.readText()")
