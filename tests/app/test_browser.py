"""The app as people use it: every tab in a real browser, twenty users at once, and what it must not give away."""

import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

import condition_models
import text_models
from ddpm_pipeline import AlphaDDPMPipeline, AlphaDDPMScheduler, ImageCondition, VectorCondition
from ddpm_pipeline.app.engine import FITTED, Engine, Sampling
from ddpm_pipeline.generation.drawing import Request
from ddpm_pipeline.generation.pipelines import load_pipeline
from helpers import ROOT, tiny_unet

gradio_client = pytest.importorskip("gradio_client", reason="needs gradio, the extra `app`")
httpx = pytest.importorskip("httpx")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
USERS = 20
GRADIO_REFUSES = {"gradio.exceptions.InvalidPathError", "gradio.exceptions.Error"}  # in its log
SAMPLER = {"timesteps": [11, 5, 0], "coefficients": [[0.9, 0.1, 0, 0], [0.8, 0.1, 0.1, 0], [0, 1, 0, 0]], "guidance_scale": 1.0}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "ddpm-tiny"
    scheduler = AlphaDDPMScheduler(12, beta_start=0.02, beta_end=0.6, fitted_samplers={"3": {**SAMPLER, "rmse": 0.1}})
    AlphaDDPMPipeline(tiny_unet(), scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(model, tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen]]:
    """The address of the real command, and its process, which must not fail; Gradio logs the paths that it refuses."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as file:
        command = [sys.executable, "-m", "ddpm_pipeline.app", str(model), "--port", str(port), "--num_cpu_threads", "1"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file)
    try:
        while "Running on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.terminate()
        process.wait()
    assert set(re.findall(r"(?m)^([\w.]+(?:Error|Exception))\b", log.read_text())) <= GRADIO_REFUSES


class Person:
    """Who looks at a page and uses it."""

    def __init__(self, page):
        self.page = page

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def press(self, name: str, number: int = 0) -> None:
        self.page.get_by_role("button", name=name, exact=True).filter(visible=True).nth(number).click()

    def reads(self, words: str) -> None:
        self.page.get_by_text(re.compile(words)).filter(visible=True).first.wait_for()

    def sees(self, count: int) -> None:
        pictures = "[...document.images].filter(image => image.checkVisibility() && image.width > 90)"
        self.page.wait_for_function(f"count => {pictures}.length >= count", arg=count)

    def brushes(self) -> None:
        """A stroke over the canvas, once it shows the picture; and waits until the stroke has been sent."""
        self.page.wait_for_timeout(3000)
        canvas = self.page.locator("canvas").filter(visible=True).first
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        points = [(box["x"] + box["width"] * (0.4 + 0.04 * i), box["y"] + box["height"] * (0.35 + 0.05 * i)) for i in range(6)]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        for point in points:
            self.page.mouse.move(*point)
        self.page.mouse.up()
        self.page.wait_for_timeout(3000)


def use_every_tab(person: Person, picture: Path, shot: Callable[[str], None]) -> None:
    """Draw, noise an uploaded picture, paint over one, mix two, evaluate one; `shot` is called with each tab's name."""
    person.press("Draw")
    person.reads("Done in")
    person.sees(1)
    shot("draw")

    person.tab("Forward process")
    person.page.locator("input[type=file]").nth(0).set_input_files(picture)
    person.reads("Report eq. 4.10")
    person.sees(2)
    shot("forward")

    person.tab("Inpaint")
    person.press("Paint anew")
    person.reads("There is no picture yet")
    person.press("Let the model draw it")
    person.sees(1)
    person.brushes()
    person.press("Paint anew")
    person.reads("Done in")
    person.sees(2)
    shot("inpaint")

    person.tab("Interpolate")
    for number in range(2):
        person.press("Let the model draw it", number)
        person.sees(number + 1)
    person.press("Mix")
    person.reads("Done in")
    person.sees(3)
    shot("interpolate")

    person.tab("Likelihood")
    person.press("Let the model draw it")
    person.sees(1)
    person.press("Evaluate")
    person.reads("from 2 of 2 rounds")
    person.sees(2)
    shot("likelihood")


def test_models_of_every_kind_have_the_screens_that_they_can_serve():
    from ddpm_pipeline.app.server import build  # needs gradio

    everything = {"draw", "noise", "inpaint", "interpolate", "likelihood"}
    age, labels = VectorCondition(("age",), (40.0,), (10.0,)), ImageCondition(1, classes=3)
    for pipe, expected in (
        (text_models.make(), everything),
        (condition_models.pipeline(1, None, age), everything),
        (condition_models.pipeline(3, num_class_embeds=2), everything),
        (condition_models.pipeline(1, labels), {"noise"}),
        (condition_models.pipeline(6), {"draw"}),
    ):
        calls = {
            call.api_name for call in build(Engine(pipe, "model"), ["a", "b"]).fns.values() if call.api_visibility == "public"
        }
        assert calls - {"load_example"} == expected


@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium, such as that of the distribution's packages")
def test_every_tab_works_in_a_browser(server, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    asked, errors = [], []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(120_000)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(server[0])
        use_every_tab(Person(page), tmp_path / "photo.png", lambda name: page.screenshot(path=tmp_path / f"{name}.png"))
        browser.close()
    assert not errors
    assert {url for url in asked if not url.startswith((server[0], "data:", "blob:"))} == set()  # nothing of elsewhere


def test_twenty_users_at_once_are_answered_each_with_their_own(server, model):
    address, process = server
    engine = Engine(load_pipeline(str(model)), "alone")
    clients = [gradio_client.Client(address, verbose=False) for _ in range(USERS)]
    before = psutil.Process(process.pid).memory_info().rss

    def ask(number: int) -> Image.Image | str:
        try:
            if number % 5 == 4:
                return clients[number].predict(None, 3, api_name="/noise")[0]
            path, _ = clients[number].predict(4, FITTED, 3, number, 1.0, api_name="/draw")
            return Image.open(path)
        except Exception as error:
            return str(error)

    with ThreadPoolExecutor(USERS) as pool:
        answers = list(pool.map(ask, range(USERS)))
    for number, answer in enumerate(answers):
        if number % 5 == 4:
            assert answer is None
            continue
        *_, (_, images) = engine.draw(Request(), Sampling(FITTED, 3, number), 4)
        assert np.array_equal(np.asarray(answer), np.asarray(engine.show(images))), answer
    assert psutil.Process(process.pid).memory_info().rss - before < 300e6


def test_refusals_reach_the_user_in_words(server, tmp_path):
    client = gradio_client.Client(server[0], verbose=False)
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (30_000, 30_000)).save(tmp_path / "bomb.png")
    for file, words in {"text.png": "cannot identify its format", "bomb.png": "decompression bomb"}.items():
        with pytest.raises(Exception, match=words):
            client.predict(gradio_client.handle_file(tmp_path / file), 3, api_name="/noise")
    with pytest.raises(Exception, match="takes 3 network calls, not 5"):
        client.predict(1, FITTED, 5, 0, 1.0, api_name="/draw")
    assert client.predict(1, "DDIM", 5, 0, 1.0, api_name="/draw")[1] == "Done in 5 network calls."
    with pytest.raises(Exception, match="16"):
        client.predict(17, FITTED, 3, 0, 1.0, api_name="/draw")


def test_no_file_of_the_machine_can_be_read_and_uploads_are_limited(server, model):
    address, _ = server
    for path in ("/etc/passwd", f"{model}/unet/config.json", "setup.py", str(ROOT / "setup.py"), "../../../../etc/passwd"):
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404), path
        data = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}, 3]}
        asked = httpx.post(f"{address}/gradio_api/call/noise", json=data)
        if asked.status_code == 200:
            events = httpx.get(f"{address}/gradio_api/call/noise/{asked.json()['event_id']}", timeout=60).text
            assert "event: error" in events and "event: complete" not in events, path
    large = httpx.post(f"{address}/gradio_api/upload", files={"files": ("large.png", b"0" * 17 * 2**20)})
    assert large.status_code == 413
