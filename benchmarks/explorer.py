"""How quickly ``sasa explore`` answers: a photograph of 224x224 to a SASA-ResNet-26, and the pointer moved over it.

    python -m benchmarks.explorer        writes benchmarks/results/explorer-cpu.json

An answer takes from the drop of the file to the drawn page. A frame is the page's own work when the pointer enters
another pixel: handler, drawing and layout. Both are measured in headless Chromium (Debian's package chromium), which
runs on the same cores as the server. ``python -m benchmarks.readme`` then fills in the table of docs/explore.md.
"""

from __future__ import annotations

import base64
import io
import json
import shutil
import statistics
import sys
import threading
import time
from typing import Any

import torch

from .machine import described, machine
from .results import RESULTS
from .tables import Listing

FILE = RESULTS / "explorer-cpu.json"
NETWORK, SIDE, UPLOADS, MOVES = "sasa_resnet26", 224, 9, 200

DROP = """async (text) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], "photograph.jpg", { type: "image/jpeg" }));
  const images = document.getElementById("images"), before = images.childElementCount, begin = performance.now();
  const drawn = new Promise((done) => new MutationObserver((_, observer) => {
    if (images.childElementCount > before) { observer.disconnect(); setTimeout(() => done(performance.now()), 0); }
  }).observe(images, { childList: true }));
  dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
  return (await drawn) - begin;
}"""

MOVE = """async (moves) => {
  const canvas = document.getElementById("image"), area = canvas.getBoundingClientRect(), times = [];
  const real = requestAnimationFrame;
  for (let i = 0; i < moves; i++) {
    const frames = [];
    window.requestAnimationFrame = (draw) => frames.push(draw);
    const x = area.left + area.width * ((i * 37) % 101) / 101, y = area.top + area.height * ((i * 53) % 103) / 103;
    const begin = performance.now();
    canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: x, clientY: y, bubbles: true }));
    for (const draw of frames) draw(begin);
    document.body.getBoundingClientRect();
    times.push(performance.now() - begin);
    window.requestAnimationFrame = real;
    await new Promise((done) => real(done));
  }
  return times;
}"""


def photograph() -> str:
    """A smooth random picture, as a JPEG file in base64."""
    from torchvision.transforms.v2.functional import resize, to_pil_image

    torch.manual_seed(0)
    file = io.BytesIO()
    to_pil_image(resize(torch.rand(3, 14, 14), [SIDE, SIDE])).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def measure() -> dict[str, list[float]]:
    """Milliseconds of every answer and every frame."""
    import uvicorn
    from playwright.sync_api import sync_playwright

    from sasa.explore.server import Explored, application, listen
    from sasa.explore.source import Network
    from sasa.models import create_model

    torch.manual_seed(0)
    classes = [f"class {i}" for i in range(1000)]
    facts = {"model": NETWORK, "classes": classes, "in_chans": 3, "image_size": SIDE, "crop_pct": 1.0}
    model = create_model(NETWORK, len(classes), 3).eval()
    network = Network(model, facts | {"mean": (0.5,) * 3, "std": (0.25,) * 3})
    picture = photograph()
    first = network.read(base64.b64decode(picture), "first")
    with listen(0) as socket, sync_playwright() as driver:
        server = uvicorn.Server(uvicorn.Config(application(Explored(network, [first])), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.goto(f"http://127.0.0.1:{socket.getsockname()[1]}/")
        page.wait_for_function("window.sasaReady === true")
        answers = [page.evaluate(DROP, picture) for _ in range(UPLOADS + 1)][1:]
        frames = page.evaluate(MOVE, MOVES)
        browser.close()
        server.should_exit = True
        thread.join()
    return {"answer_ms": answers, "frame_ms": frames}


def listing(found: dict[str, Any]) -> Listing:
    """Medians and the slowest."""
    rows = [
        [words, f"{found[key]['median']:,.3g}", f"{found[key]['highest']:,.3g}", f"{limit:,}"]
        for words, key, limit in (
            ("answer to a photograph, ms", "answer_ms", 1000),
            ("frame when the pointer moves, ms", "frame_ms", 16),
        )
    ]
    header = [f"{NETWORK}, {SIDE}x{SIDE}", "median", "slowest", "to reach"]
    return Listing(header, rows, f"{described(found['machine'])}.", words=1)


def main() -> None:
    """Measure, print and write."""
    if shutil.which("chromium") is None:
        sys.exit("benchmarks.explorer: no Chromium here: apt-get install chromium")
    found: dict[str, Any] = {"machine": machine("cpu")}
    for key, values in measure().items():
        found[key] = {"median": statistics.median(values), "highest": max(values), "count": len(values)}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
