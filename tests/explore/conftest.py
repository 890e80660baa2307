"""A small network with its images, its page in a file and behind a server, and a browser to look at them."""

from __future__ import annotations

import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from sasa.explore.server import Explored, application, listen
from sasa.explore.source import Network, find_images
from sasa.models import create_model
from sasa.train.sources import open_source


@pytest.fixture(scope="session")
def network():
    """A network that is not trained, with attention that differs from pixel to pixel."""
    torch.manual_seed(0)
    source = open_source(None)
    model = create_model("sasa_resnet14", len(source.classes), 1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 1.5
    facts = {"model": "sasa_resnet14", "classes": source.classes, "in_chans": 1, "image_size": 28, "crop_pct": 1.0}
    return Network(model, facts | {"mean": source.mean, "std": source.std})


@pytest.fixture(scope="session")
def images(network):
    return find_images(network, [])[0]


@pytest.fixture(scope="session")
def server(network, images):
    uvicorn = pytest.importorskip("uvicorn")
    found = listen(0)
    running = uvicorn.Server(uvicorn.Config(application(Explored(network, images[:3])), log_level="warning"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [found]}, daemon=True)
    thread.start()
    while not running.started and thread.is_alive():
        time.sleep(0.01)
    yield f"http://127.0.0.1:{found.getsockname()[1]}/"
    running.should_exit = True
    thread.join()
    found.close()


@pytest.fixture(scope="session")
def browser():
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser):
    """Open a page, wait until it is drawn; at the end nothing may have been written to its console."""
    said, context = [], browser.new_context(viewport={"width": 1280, "height": 900})

    def open_page(url: str, **viewport: int):
        page = context.new_page()
        if viewport:
            page.set_viewport_size(viewport)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(url)
        page.wait_for_function("window.sasaReady === true")
        return page

    asked: list[str] = []
    yield SimpleNamespace(open=open_page, said=said, asked=asked)
    context.close()
    # Chromium itself writes that an answer had a status of 400 or more, which is what the test asked for.
    assert [line for line in said if "the server responded with a status of 4" not in line] == []
