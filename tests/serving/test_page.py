"""The page in a real browser, on the real endpoint: what a client does on it, by mouse and by keyboard."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gt_ray.pairs.root import Root
from gt_ray.serving.endpoint import unpack
from gt_ray.updates.files import read_adapter
from tests.serving.conftest import Served

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.ray,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def problems() -> Iterator[list[str]]:
    """What the console says, what the Content-Security-Policy refuses among it; a test removes what it expects."""
    found: list[str] = []
    yield found
    assert not found


@pytest.fixture
def unopened(browser: Browser, endpoint: Served, problems: list[str]) -> Iterator[Page]:
    """The page as it comes: it asks for a token."""
    context = browser.new_context(base_url=endpoint.url)
    context.set_default_timeout(30_000)
    page = context.new_page()
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto("/")
    page.get_by_label("API token").wait_for()
    expect_refusal(problems, 401)
    yield page
    context.close()


@pytest.fixture
def page(unopened: Page, endpoint: Served) -> Page:
    """The page with a token."""
    unopened.get_by_label("API token").fill(endpoint.token)
    unopened.get_by_role("button", name="Use it").click()
    unopened.get_by_role("heading", name="This service").wait_for()
    return unopened


def expect_refusal(problems: list[str], status: int) -> None:
    """Chromium reports every refused request in the console."""
    assert len(problems) == 1 and f"status of {status}" in problems.pop()


def choose(page: Page, *files: Path) -> None:
    page.get_by_label("Drop an update file here").set_input_files(files)


def generate(page: Page) -> None:
    page.get_by_role("button", name="Generate").click()
    page.get_by_role("link", name="Download").wait_for()


def alert(page: Page) -> str:
    """The one error that is shown."""
    shown = page.get_by_role("alert").filter(has_text=re.compile("."))
    shown.wait_for()
    return shown.inner_text()


def check_adapter(archive: str | Path, root: Root, folder: Path) -> None:
    """That a download is a zipped adapter of the LLM."""
    unpack(Path(archive).read_bytes(), folder)
    assert read_adapter(folder, root).norm() > 0


def test_a_file_is_checked_plotted_and_becomes_an_adapter(page: Page, endpoint: Served, tmp_path: Path) -> None:
    assert f"gt-ray client root {endpoint.url}" in page.locator("pre").inner_text()
    assert page.get_by_title(endpoint.root("tinylm").hash).is_visible()
    choose(page, endpoint.update)
    plot = page.get_by_role("img", name="Norm of each block")
    plot.wait_for()
    told = page.locator("#told").inner_text()
    assert "dp-sgd: epsilon 4, delta 0.00001" in told and "256" in told and "steps\n30" in told
    update_Ld, _ = endpoint.update_of(0)
    assert plot.locator("circle").count() == plot.locator(".range").count() == len(update_Ld)
    page.get_by_text("The numbers").click()
    for norm, row in zip(update_Ld.norm(dim=1), page.locator("#numbers tr").all()[1:], strict=True):
        assert float(row.locator("td").first.inner_text()) == pytest.approx(float(norm), rel=1e-2)
    generate(page)
    stages = page.locator("#stages li").all_inner_texts()
    assert [stage.split()[0] for stage in stages] == ["Checked", "Sent", "Generated", "Ready"]
    estimate = endpoint.model().estimate(update_Ld)
    assert estimate is not None
    status = page.locator("#generate-status")
    assert ("Out of range" in status.inner_text()) == ("warning" in str(status.get_attribute("class")))
    assert ("Out of range" in status.inner_text()) == estimate.out_of_range
    assert endpoint.model().fingerprint() in page.locator("#made-by").inner_text()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == "adapter.zip"
    check_adapter(download.value.path(), endpoint.root("llm"), tmp_path / "adapter")


def test_the_keyboard_is_enough(unopened: Page, endpoint: Served, problems: list[str], tmp_path: Path) -> None:
    page, keyboard = unopened, unopened.keyboard

    def tab_to(id: str) -> None:
        for _ in range(40):
            keyboard.press("Tab")
            style, at = page.evaluate(
                "[getComputedStyle(document.activeElement).outlineStyle, document.activeElement.id]"
            )
            assert style != "none", f"the focus on {at} is not visible"
            if at == id:
                return
        raise AssertionError(f"Tab does not lead to {id}")

    tab_to("token")
    keyboard.type("gtr_wrong")
    keyboard.press("Enter")
    assert "token" in alert(page)
    expect_refusal(problems, 401)
    keyboard.press("Control+A")
    keyboard.type(endpoint.token)
    keyboard.press("Enter")
    page.get_by_role("heading", name="This service").wait_for()
    tab_to("file")
    with page.expect_file_chooser() as chooser:
        keyboard.press("Space")
    chooser.value.set_files(endpoint.update)
    page.get_by_role("img").wait_for()
    tab_to("generate")
    keyboard.press("Enter")
    page.get_by_role("link", name="Download").wait_for()
    tab_to("download")
    with page.expect_download() as download:
        keyboard.press("Enter")
    check_adapter(download.value.path(), endpoint.root("llm"), tmp_path / "adapter")


def test_several_files_are_dropped_and_pooled(page: Page, endpoint: Served) -> None:
    contents = [list(endpoint.update_of(seed)[1]) for seed in (0, 1, 2)]
    dropped = page.evaluate_handle(
        """(contents) => {
            const dropped = new DataTransfer();
            const files = contents.map((content, i) => new File([new Uint8Array(content)], `${i}.safetensors`));
            for (const file of files) dropped.items.add(file);
            return dropped;
        }""",
        contents,
    )
    page.dispatch_event("main", "drop", {"dataTransfer": dropped})  # beside the zone counts too
    page.get_by_label("Pooling").select_option("median")
    generate(page)
    assert "pooling: median" in page.locator("#made-by").inner_text()


def test_a_broken_file_is_explained_and_a_good_one_works_after_it(
    page: Page, endpoint: Served, problems: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(endpoint.update.read_bytes()[:-100])
    choose(page, broken)
    assert "the update is damaged" in alert(page)
    expect_refusal(problems, 422)
    assert page.get_by_role("button", name="Generate").is_disabled()
    choose(page, endpoint.update)
    page.get_by_role("img").wait_for()
    assert not page.get_by_role("alert").filter(has_text=re.compile(".")).count()
    generate(page)


def test_private_data_chosen_by_mistake_is_not_sent(page: Page, tmp_path: Path) -> None:
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    (tmp_path / "my.jsonl").write_text("{}")
    choose(page, tmp_path / "my.jsonl")
    assert "nothing has been sent" in alert(page) and not sent


def test_without_a_network_the_page_says_so_and_goes_on_after(
    page: Page, endpoint: Served, problems: list[str]
) -> None:
    choose(page, endpoint.update)
    page.get_by_role("img").wait_for()
    page.context.set_offline(True)
    page.get_by_role("button", name="Generate").click()
    assert "does not answer" in alert(page)
    assert "Not generated" in page.locator("#stages").inner_text()
    assert "ERR_INTERNET_DISCONNECTED" in problems.pop()
    page.context.set_offline(False)
    generate(page)


def test_a_prompt_is_tried(page: Page, endpoint: Served) -> None:
    choose(page, endpoint.update)
    page.get_by_role("img").wait_for()
    page.get_by_role("button", name="Example: gsm8k").click()
    prompt = page.get_by_label("Prompt").input_value()
    page.get_by_role("button", name="Ask the LLM").click()
    answers = page.locator("#answers p")
    answers.nth(1).wait_for()
    files = {"update": endpoint.update.read_bytes()}
    told = endpoint.http.post("/v1/updates:try", files=files, data={"prompt": prompt}).json()
    assert [answer.strip() for answer in answers.all_inner_texts()] == [
        (told[kind] or "(nothing)").strip() for kind in ("base", "updated")
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_its_text_has_contrast(page: Page, endpoint: Served, scheme: str) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
    choose(page, endpoint.update)
    generate(page)
    page.get_by_title(endpoint.root("tinylm").hash).click()  # shows all of it
    page.get_by_text("The numbers").click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360

    def luminance(selector: str, of: str) -> float:
        colour = page.locator(selector).first.evaluate(f"(element) => getComputedStyle(element).{of}")
        linear = [
            part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
            for part in (int(part) / 255 for part in re.findall(r"\d+", colour)[:3])
        ]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    back = luminance("body", "backgroundColor")
    assert (back < 0.5) == (scheme == "dark")
    pairs = [("body", back), (".muted", back), ("#generate", luminance("#generate", "backgroundColor"))]
    for selector, behind in pairs:
        dark, light = sorted((luminance(selector, "color"), behind))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, selector
