"""The page as a browser shows it, as wide as a phone, a tablet and a desk: whole, legible, nothing over another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import taylor_attention as ta
from browser import Browser, find_browser, start_browser
from pages import ABSENT, WILD, write_sizes, write_wild
from taylor_attention.bench.evidence import sizes
from taylor_attention.bench.evidence.report.chapters import read_chapters
from taylor_attention.bench.evidence.report.page import make_page
from taylor_attention.cli.console import size
from taylor_attention.core.cost import plan

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium is installed: the page cannot be looked at here"),
]
SCREENS = [(width, scheme) for width in (360, 768, 1280) for scheme in ("light", "dark")]

# Everything folded is opened first. A pixel's tolerance is for rounding. `innerWidth` would grow with what is too wide.
LOOK = """
(async (width) => {
  for (const each of document.querySelectorAll("details")) each.open = true;
  const name = (element) => element.tagName + ": " + element.textContent.trim().slice(0, 40);
  const shown = [...document.querySelectorAll("body *")].filter((each) => each.getClientRects().length);
  const free = shown.filter((each) => !each.closest(".scroll") || each.matches(".scroll"));
  const box = (element) => element.getBoundingClientRect();
  const over = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  const blocks = free.filter((each) => getComputedStyle(each).display !== "inline");
  const boxes = [...document.querySelectorAll(".scroll")];

  async function isBlank(image) {
    await image.decode();
    const canvas = new OffscreenCanvas(64, 64).getContext("2d");
    canvas.drawImage(image, 0, 0, 64, 64);
    const pixels = new Uint32Array(canvas.getImageData(0, 0, 64, 64).data.buffer);
    return new Set(pixels).size < 10;
  }

  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  function ground(element) {
    const color = parse(getComputedStyle(element).backgroundColor);
    return color.length === 3 || color[3] === 1 || !element.parentElement ? color : ground(element.parentElement);
  }
  const light = (color) => color.slice(0, 3).map((x) => x / 255)
    .map((x) => x <= 0.03928 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
  function contrast(element) {
    const [a, b] = [parse(getComputedStyle(element).color), ground(element)].map(light);
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  const told = shown.filter((each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim()));

  const blank = [];
  for (const image of document.images) if (await isBlank(image)) blank.push(image.alt);
  return {
    sideways: document.documentElement.scrollWidth - width,
    outside: free.filter((each) => box(each).right > width + 1 || box(each).left < -1).map(name),
    overlapping: blocks.filter((each) => [...each.parentElement.children]
      .some((other) => other !== each && blocks.includes(other) && over(box(each), box(other)))).map(name),
    cut: free.filter((each) => !each.matches(".scroll, select, input") && each.scrollWidth > each.clientWidth + 1 &&
      getComputedStyle(each).display !== "inline").map(name),
    empty: [...document.querySelectorAll("section, figure, .scroll, dd, li, h1, h2, h3")]
      .filter((each) => !each.innerText.trim() && !each.querySelector("img")).map((each) => each.outerHTML),
    small: told.filter((each) => parseFloat(getComputedStyle(each).fontSize) < 12).map(name),
    pale: told.filter((each) => contrast(each) < 4.5).map(name),
    blank,
    unreachable: boxes.filter((each) => each.scrollWidth > each.clientWidth && each.tabIndex !== 0).map(name),
    scrolling: boxes.filter((each) => each.scrollWidth > each.clientWidth + 1).length,
    images: document.images.length,
  };
})(%d)
"""
FINE: dict[str, Any] = {
    name: [] for name in ("outside", "overlapping", "cut", "empty", "small", "pale", "blank", "unreachable")
}


def look(browser: Browser, path: Path, width: int, scheme: str = "light") -> dict[str, Any]:
    """What is wrong with a page, and a few counts."""
    browser.open(path, width, scheme=scheme)
    return browser.run(LOOK % width)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with start_browser(PROGRAM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with the real picture of sizes, and with what is too wide for any screen."""
    folder = tmp_path_factory.mktemp("results")
    write_sizes(folder)
    write_wild(folder)
    with pytest.MonkeyPatch.context() as patch:
        registry = "taylor_attention.bench.evidence.report.chapters.TOPICS"
        first = replace(sizes.EXPERIMENT, pictures=lambda findings: sizes.pictures(findings)[:1])
        patch.setattr(registry, {each.name: each for each in (first, WILD, ABSENT)})
        page = make_page(*read_chapters(folder))
    (folder / "page.html").write_text(page, encoding="utf-8")
    return folder / "page.html"


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of docs/results."""
    path = tmp_path_factory.mktemp("committed") / "page.html"
    path.write_text(make_page(*read_chapters(Path(__file__).parents[4] / "docs" / "results")), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_everything_is_seen(browser: Browser, path: Path, width: int, scheme: str) -> None:
    seen = look(browser, path, width, scheme)
    assert seen.pop("scrolling") > 0  # the wild table, on every screen
    assert seen == FINE | {"sideways": 0, "images": 2}


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_committed_evidence_is_seen(browser: Browser, committed: Path, width: int, scheme: str) -> None:
    seen = look(browser, committed, width, scheme)
    assert seen.pop("images") > 0
    seen.pop("scrolling")
    assert seen == FINE | {"sideways": 0}


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("sideways", "<p style='width: 500px'>x</p>"),
        ("outside", "<p style='width: 500px'>x</p>"),
        ("overlapping", "<p style='margin-top: -30px'>x</p>"),
        ("cut", "<p style='overflow: hidden; width: 50px; white-space: nowrap'>a long text</p>"),
        ("empty", "<section></section>"),
        ("small", "<p style='font-size: 9px'>x</p>"),
        ("pale", "<p style='color: #aaa; background: #999'>x</p>"),
        (
            "blank",
            '<img alt=\'x\' src=\'data:image/svg+xml,<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>\'>',
        ),
        ("unreachable", "<div class='scroll'><p style='width: 900px'>x</p></div>"),
    ],
)
def test_what_is_wrong_is_found(browser: Browser, path: Path, tmp_path: Path, kind: str, damage: str) -> None:
    damaged = tmp_path / "page.html"
    damaged.write_text(path.read_text(encoding="utf-8").replace("</main>", f"{damage}</main>"), encoding="utf-8")
    assert look(browser, damaged, 360)[kind]


def test_it_asks_for_nothing_and_complains_of_nothing(browser: Browser, path: Path) -> None:
    look(browser, path, 360)
    assert [address for address in browser.requests if not address.startswith("data:image/")] == [path.as_uri()]
    assert browser.complaints == []


# ---- the calculator


def fill(browser: Browser, **values: object) -> dict[str, str]:
    """Fill in fields as a user does; what the calculator then shows."""
    script = "".join(f"form.elements[{name!r}].value = {str(value)!r};" for name, value in values.items())
    return browser.run(
        f"""(() => {{
        const form = document.querySelector("form");
        {script}
        form.dispatchEvent(new Event("input"));
        const places = [...document.querySelectorAll("[data-show]")];
        const shown = places.map((each) => [each.dataset.show, each.textContent]);
        const complaint = document.querySelector("#complaint");
        return {{...Object.fromEntries(shown), complaint: complaint.hidden ? "" : complaint.textContent}};
        }})()"""
    )


def test_the_calculator_shows_what_the_library_computes(browser: Browser, path: Path) -> None:
    browser.open(path, 360)
    asked = {"heads": 32, "kv_heads": 8, "head_dim": 64, "degree": 2, "layers": 24, "context": 1_000_000, "window": 16}
    made = plan(**asked)
    shown = fill(browser, **asked, std=0.8, mean=0.1)
    assert shown == {
        "state_bytes": size(made.state_bytes),
        "cache_bytes": size(made.cache_bytes),
        "memory_ratio": f"{made.cache_bytes / made.state_bytes:.3g}",
        "state_bytes_per_layer": size(made.state_bytes_per_layer),
        "cache_bytes_per_layer": size(made.cache_bytes_per_layer),
        "flops_per_token": f"{made.flops_per_token:,}",
        "cache_flops_per_token": f"{made.cache_flops_per_token:,}",
        "flops_ratio": f"{made.cache_flops_per_token / made.flops_per_token:.3g}",
        "break_even_memory": f"{made.break_even_memory:,} tokens on",
        "break_even_flops": f"{made.break_even_flops:,} tokens on",
        "taylor": f"{100 * ta.expected_error(0.8, 2, mean=0.1):.2g}%",
        "fitted": f"{100 * ta.expected_error(0.8, 2, mean=0.1, fitted=True):.2g}%",
        "complaint": "",
    }


def test_the_calculator_has_numbers_from_the_start_and_none_where_it_complains(browser: Browser, path: Path) -> None:
    browser.open(path, 360)
    begun = fill(browser)
    assert [name for name, text in begun.items() if name != "complaint" and not text[:1].isdigit()] == []
    wrong = fill(browser, kv_heads=5)
    assert wrong.pop("complaint") == "kv_heads: expected a divisor of heads = 32, got 5"
    assert set(wrong.values()) == {"–"}
    assert "Please" in fill(browser, kv_heads=8, std="")["complaint"]  # the browser's own words
    assert fill(browser, std=1) == begun | fill(browser)


def test_without_a_far_part_there_is_no_error_of_it(browser: Browser, path: Path) -> None:
    browser.open(path, 360)
    shown = fill(browser, degree="", window=64)
    assert (shown["taylor"], shown["fitted"], shown["break_even_memory"]) == ("no far part",) * 2 + ("64 tokens on",)


def read_check(browser: Browser) -> tuple[bool, str]:
    """Whether the page warns of its calculator, visibly, and its words."""
    script = "(() => { const e = document.querySelector('#self-check'); return [e.matches('.warning') && "
    script += "getComputedStyle(e).borderStyle === 'solid' && e.offsetHeight > 0, e.textContent]; })()"
    warns, text = browser.run(script)
    return warns, text


def test_the_page_says_that_it_checked_itself(browser: Browser, path: Path) -> None:
    browser.open(path, 360)
    assert read_check(browser) == (False, "Checked against the library: 8 models and 24 errors agree.")


@pytest.mark.parametrize(
    ("old", "new"),
    [('"state_elements": "', '"state_elements": "9'), ("(2n * e + 1n)", "(2n * e + 2n)")],
    ids=["data", "script"],
)
def test_a_page_whose_calculator_is_wrong_warns(
    browser: Browser, path: Path, tmp_path: Path, old: str, new: str
) -> None:
    page = path.read_text(encoding="utf-8")
    assert old in page
    wrong = tmp_path / "page.html"
    wrong.write_text(page.replace(old, new, 1), encoding="utf-8")
    browser.open(wrong, 360)
    warns, text = read_check(browser)
    assert warns
    assert text.startswith("Do not trust this calculator: it differs from the library (")
