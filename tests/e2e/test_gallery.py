"""The gallery in a real browser: pictures to look at, to pin and to walk between, by hand, by keyboard, on a phone."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import BIN, command, metrics, serving
from tests.serve.site import Site, site
from tests.serve.test_security import token

sync = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")

Launch = Callable[..., Any]
Pixels = np.ndarray[Any, Any]
RUNTIME = Path(__file__).parents[2] / "serve" / "server" / "http" / "ort"
PATIENCE = 180_000  # milliseconds: a browser that draws by the processor is slow on a busy machine


@pytest.fixture(scope="module")
def gallery(smoke_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(smoke_bundle, folder / "smoke.onnx")
    shutil.copy(smoke_bundle, folder / "smoke@2.onnx")
    log = folder / "log"
    words = ("--models", folder, "--device", "cpu", "--http", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    words += ("--share-models",)
    with serving(*words, log=log) as (_, process):
        yield site(log, process)


@pytest.fixture(scope="module")
def launch() -> Iterator[Launch]:
    """What starts a browser, with more words on its command line."""
    with sync.sync_playwright() as playwright, ExitStack() as stack:

        def launched(*words: str) -> Any:
            words = ("--no-sandbox", *words)  # root has none
            started = playwright.chromium.launch(executable_path=CHROMIUM, args=words)
            stack.callback(started.close)
            return started

        yield launched


@pytest.fixture(scope="module")
def browser(launch: Launch) -> Any:
    return launch()


def context_of(browser: Any, **options: Any) -> Any:
    """A profile of its own, whose pages wait for what they should show."""
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    return context


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A page that may say nothing to its console: neither errors nor breaches of its policy."""
    context = context_of(browser, viewport={"width": 1200, "height": 800})
    found, said = context.new_page(), list[str]()
    found.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    found.on("pageerror", lambda error: said.append(str(error)))
    yield found
    context.close()
    assert said == []


def opened(page: Any, gallery: Site, query: str = "") -> None:
    page.goto(f"{gallery.url}/{query}")
    page.wait_for_selector(".cell .part")


def cell(page: Any, index: int) -> Any:
    return page.locator(f".cell[data-index='{index}']")


def pixels(page: Any, url: str) -> Pixels:
    """What the page shows of an address, [height, width, 3]."""
    code = """async (url) => {
      const image = new Image();
      image.src = url;
      await image.decode();
      const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
      context.drawImage(image, 0, 0);
      const { data } = context.getImageData(0, 0, image.width, image.height);
      return [image.height, image.width, ...data];
    }"""
    height, width, *values = page.evaluate(code, url)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def sheet(page: Any) -> Pixels:
    """The first block's pictures."""
    style = page.locator(".part").first.evaluate("part => part.style.backgroundImage")
    return pixels(page, style.removeprefix('url("').removesuffix('")'))


def test_two_thousand_pictures_by_scrolling(page: Any, gallery: Site) -> None:
    opened(page, gallery)
    for from_ in range(0, 2000, 64):
        page.locator(f".block[data-from='{from_}']").scroll_into_view_if_needed()
        page.wait_for_selector(f".block[data-from='{from_ + 64}']", state="attached")
    page.wait_for_selector(".cell[data-index='2000'] .part")
    assert page.locator(".cell").count() < 1500  # what is far away is not kept
    page.wait_for_function("() => BigInt(document.querySelector('#start').value) > 1800n")
    assert re.search(r"start=1[89]\d\d", page.url)  # what is shown is what the address says
    page.keyboard.press("Tab")
    for _ in range(15):
        if page.evaluate("() => document.activeElement.classList.contains('cell')"):
            break
        page.keyboard.press("Tab")
    assert int(page.evaluate("() => document.activeElement.dataset.index")) > 1600


def test_pinned_pictures_have_a_way_between_them(page: Any, gallery: Site) -> None:
    opened(page, gallery, "?seed=7")
    for index in (3, 9):
        cell(page, index).click()
    assert page.locator("#pins li").count() == 2
    page.wait_for_selector("#frame[src^=blob]")
    first = page.locator("#frame").get_attribute("data-url")
    assert "/between/7/3/9/0.png" in first
    before = page.locator("#frame").get_attribute("src")
    page.locator("#at").focus()
    page.keyboard.press("End")
    page.wait_for_function("(before) => document.querySelector('#frame').src !== before", arg=before)
    last = page.locator("#frame").get_attribute("data-url")
    assert "/between/7/3/9/23.png" in last
    assert np.array_equal(pixels(page, page.locator("#frame").get_attribute("src")), gallery.ask(last).array())
    with page.expect_download() as download:
        page.locator("#downloads a").click()
    assert (
        Path(download.value.path()).read_bytes() == gallery.ask(page.locator("#downloads a").get_attribute("href")).body
    )
    page.locator("#play").click()
    assert page.locator("#play").get_attribute("aria-pressed") == "true"
    page.locator("#play").click()
    assert "sample-cli" in page.locator("#shell").text_content()


def test_a_permalink_shows_the_same(page: Any, gallery: Site) -> None:
    opened(page, gallery)
    page.fill("#seed", str(2**64 - 1))
    page.fill("#start", str(2**53 + 1))
    page.keyboard.press("Enter")
    page.wait_for_selector(f".cell[data-index='{2**53 + 1}'] .part")
    cell(page, 2**53 + 2).click()
    link = page.locator("#link").text_content()
    assert f"seed={2**64 - 1}" in link
    assert f"pins={2**53 + 2}" in link

    before = sheet(page)
    page.goto(link)
    page.wait_for_selector(".cell .part")
    assert np.array_equal(sheet(page), before)
    assert cell(page, 2**53 + 2).get_attribute("aria-pressed") == "true"


def copied(page: Any, out: Path) -> list[Path]:
    """The pictures that the page's line for a shell makes, in another folder."""
    *words, _ = shlex.split(page.locator("#shell").text_content())
    done = command(*words, out)
    assert done.returncode == 0, done.stderr
    return sorted(out.rglob("*.png"))


def test_what_is_shown_is_made_elsewhere_by_what_can_be_copied(page: Any, gallery: Site, tmp_path: Path) -> None:
    opened(page, gallery, "?model=smoke@1&seed=7&start=40&temperature=0.8&pins=3")
    (file,) = copied(page, tmp_path / "one")
    wanted = gallery.follow("/v1/models/smoke/samples/7/3.png?temperature=0.8&version=1").array()
    assert np.array_equal(np.asarray(Image.open(file)), wanted)
    opened(page, gallery, "?model=smoke@1&seed=7&temperature=0.8&pins=3,9")
    files = copied(page, tmp_path / "way")
    assert len(files) == 24
    for frame in (0, 11, 23):
        place = f"/v1/models/smoke/between/7/3/9/{frame}.png?steps=24&temperature=0.8&version=1"
        assert np.array_equal(np.asarray(Image.open(files[frame])), gallery.follow(place).array())
    for query, place in (
        ("&pins=3", "samples/7/3.png?temperature=0.8"),
        ("&pins=3,9", "between/7/3/9/0.png?steps=24&temperature=0.8"),
    ):
        opened(page, gallery, f"?seed=7&temperature=0.8{query}")
        code = (
            page.locator("#python").text_content() + f"\nimport numpy\nnumpy.save({str(tmp_path / 'x.npy')!r}, images)"
        )
        subprocess.run([BIN / "python", "-c", code], check=True)
        made = np.load(tmp_path / "x.npy").reshape(-1, *wanted.shape)
        assert np.array_equal(made[0], gallery.follow(f"/v1/models/smoke/{place}").array())


def test_models_side_by_side(page: Any, gallery: Site) -> None:
    opened(page, gallery)
    page.select_option("#beside", "smoke@1")
    page.wait_for_selector(".cell .part:nth-child(2)")
    assert page.locator(".cell").first.locator("span").count() == 2


def test_by_keyboard_alone(page: Any, gallery: Site) -> None:
    opened(page, gallery)
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("() => document.activeElement.classList.contains('cell')"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    index = page.evaluate("() => document.activeElement.dataset.index")
    assert int(index) > 1
    assert cell(page, index).get_attribute("aria-pressed") == "true"
    page.locator("#card-open").focus()
    page.keyboard.press("Enter")
    assert page.locator("#facts").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#facts").is_visible()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A script that looks for barriers."""
    npm = shutil.which("npm")
    if not npm:
        pytest.skip("needs npm")
    copy = tmp_path_factory.mktemp("axe") / "axe"
    shutil.copytree(Path(__file__).parent / "axe", copy, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run([npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=copy, check=True)
    return (copy / "node_modules" / "axe-core" / "axe.min.js").read_text()


@pytest.mark.parametrize(
    ("width", "scheme", "query"),
    [
        (360, "dark", "?pins=1"),
        (360, "light", "?pins=1,5&beside=smoke@1"),
        (768, "light", ""),
        (1600, "dark", "?pins=1,5&beside=smoke@1"),
    ],
)
def test_it_fits_and_has_no_barriers(
    width: int, scheme: str, query: str, browser: Any, gallery: Site, axe: str
) -> None:
    context = context_of(
        browser, viewport={"width": width, "height": 740}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = context.new_page()
    opened(page, gallery, query)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width
    page.evaluate(axe)
    assert page.evaluate("async () => (await axe.run()).violations.map((each) => each.help)") == []
    page.locator("#card-open").click()
    assert page.evaluate("async () => (await axe.run('#card')).violations.map((each) => each.help)") == []
    context.close()


def test_what_cannot_be_is_said(page: Any, gallery: Site) -> None:
    opened(page, gallery, "?temperature=0.83")
    page.fill("#seed", str(2**64))
    page.keyboard.press("Enter")
    assert "below 2^64" in page.evaluate("() => document.querySelector('#seed').validationMessage")
    page.fill("#seed", "5")
    page.keyboard.press("Enter")
    page.wait_for_function("() => location.search.includes('seed=5')")
    assert "temperature=0.83" in page.url  # between two steps of the slider


def test_a_server_that_is_away_is_asked_again(page: Any, gallery: Site) -> None:
    fails = [3]

    def answer(route: Any) -> None:
        fails[0] -= 1
        route.continue_() if fails[0] < 0 else route.abort() if fails[0] else route.fulfill(status=502, body="<html>")

    page.route("**/grid/**", answer)
    said = page.context.new_page()  # what fails is said to the console of this page only
    said.route("**/grid/**", answer)
    opened(said, gallery, "?seed=21")
    assert fails[0] < 0


def test_a_token_is_asked_for_once(browser: Any, smoke_bundle: Path, tmp_path: Path) -> None:
    tokens, log = tmp_path / "tokens.toml", tmp_path / "log"
    alice = token(tokens, "alice")
    words = ("--model", smoke_bundle, "--device", "cpu", "--tokens", tokens, "--http", "127.0.0.1:0")
    with serving(*words, log=log) as (_, process):
        page = context_of(browser).new_page()
        page.goto(f"{site(log, process).url}/?pins=3,9")
        page.locator("#token").fill(alice)
        page.keyboard.press("Enter")
        page.wait_for_selector(".cell .part")
        page.wait_for_selector("#frame[src^=blob]")
        with page.expect_download() as download:
            page.locator("#downloads a").click()
        assert Image.open(download.value.path()).format == "WEBP"
        assert "--token TOKEN" in page.locator("#shell").text_content()
        page.reload()
        page.wait_for_selector(".cell .part")
        page.context.close()


def test_a_second_visit_asks_for_no_picture(page: Any, gallery: Site) -> None:
    opened(page, gallery, "?seed=11")
    page.wait_for_load_state("networkidle")
    before = pictures(gallery)
    page.goto(f"{gallery.url}/?seed=11")
    page.wait_for_selector(".cell .part")
    page.wait_for_load_state("networkidle")
    assert pictures(gallery) == before > 0


needs_runtime = pytest.mark.skipif(
    not (RUNTIME / "ort.wasm.min.mjs.gz").is_file(), reason="needs ONNX Runtime for browsers: make browser"
)


@needs_runtime
@pytest.mark.parametrize(
    ("by", "words"),
    [
        ("WebAssembly on ", ()),
        ("WebGPU", ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")),
    ],
)
def test_a_browser_makes_the_same_pictures(by: str, words: tuple[str, ...], gallery: Site, launch: Launch) -> None:
    """At seeds and indices that JavaScript's own numbers do not have."""
    page, said = context_of(launch(*words)).new_page(), list[str]()
    page.route("**/favicon.ico", lambda route: route.fulfill(status=204))
    page.goto(f"{gallery.url}/page/icon.svg")  # of the same origin: a blank page has no WebGPU
    if by == "WebGPU" and not page.evaluate("async () => !!(await navigator.gpu?.requestAdapter())"):
        pytest.skip("needs a chromium with WebGPU")
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    before = pictures(gallery)
    seed, start, warm = 2**64 - 1, 2**53 + 1, "temperature=0.7"
    opened(page, gallery, f"?seed={seed}&start={start}&{warm}&pins={2**62},{2**62 + 1}&made=here")
    page.wait_for_selector("#frame[src^=blob]")
    page.wait_for_function("() => document.querySelector('#speed').textContent")
    assert re.match(rf"This browser: \d+ images/s by {by}.*server's", page.locator("#speed").text_content())
    frame = page.locator("#frame")
    for made, place in (
        (sheet(page), f"grid/{seed}/{start}.png?{warm}"),
        (pixels(page, frame.get_attribute("src")), frame.get_attribute("data-url").split("/", 4)[4]),
    ):
        there = gallery.follow(f"/v1/models/smoke/{place}").array()
        assert np.abs(made.astype(int) - there).max() <= 1
    assert pictures(gallery) == before + 1 + 2  # one that it is compared with, and ours
    assert said == []


def pictures(gallery: Site) -> float:
    """How many requests for pictures there were."""
    lines = metrics(gallery.log).splitlines()
    return sum(
        float(line.split()[-1])
        for line in lines
        if re.search(r"requests_total\{.*GET /v1/digests/\{digest\}/(samples|grid|between)", line)
    )
