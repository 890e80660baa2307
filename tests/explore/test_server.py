"""The server: the user's own images, what a change does to the prediction, and what it refuses."""

import io
import json
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from sasa.cli import main
from sasa.explore import source
from sasa.explore.server import MOST_UPLOAD, listen
from sasa.train.errors import OptionError

pytestmark = pytest.mark.slow


def png(width=40, height=30):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def ask(url, data=None, **headers):
    """Status and answer of a request, as JSON."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else text.decode()


def test_images_are_taken_and_asked_about(server, network):
    status, payload = ask(f"{server}explore", png(), **{"x-name": "mine.png"})
    assert status == 200 and payload["name"] == "mine.png" and len(payload["layers"]) == 5
    question = {"image": payload["key"], "position": False, "temperature": 2, "cover": [0, 0, 10, 10]}
    status, answer = ask(f"{server}predict", json.dumps(question).encode())
    assert status == 200
    assert {one["name"] for one in answer["prediction"]} <= set(network.facts["classes"])


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (b"not an image", 415, "not an image in a known format"),
        (png()[:300], 415, "your image can't be read"),
        (b"", 415, "it is empty"),
        (b"0" * (MOST_UPLOAD + 1), 413, "at most 16 MB"),
    ],
)
def test_what_is_no_image_is_refused(server, data, status, message):
    found, answer = ask(f"{server}explore", data)
    assert found == status and message in answer["error"]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "expected an object"),
        (b'{"image": ["x"]}', "no longer kept"),
        (b'{"image": "packaged-0", "temperature": NaN}', "image: it is no longer kept"),
        (b"[" * 9000, "recursion"),
    ],
)
def test_questions_that_make_no_sense_are_answered(server, question, message):
    status, answer = ask(f"{server}predict", question)
    assert status == 400 and message in answer["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": True}, "temperature: expected one of"),
        ({"temperature": "1"}, "temperature: expected one of"),
        ({"position": 1}, "position: expected true or false"),
        ({"cover": [0, 0, 1]}, "cover: expected top, left, bottom and right"),
        ({"cover": [0, 0, 1, -1]}, "cover: expected top, left, bottom and right"),
    ],
)
def test_changes_out_of_range_are_named(server, images, change, message):
    status, answer = ask(f"{server}predict", json.dumps({"image": images[0].key} | change).encode())
    assert status == 400 and message in answer["error"]


def test_other_sites_are_not_answered(server):
    assert ask(f"{server}explore", png(), origin="https://example.org")[0] == 403
    assert ask(f"{server}predict", b"{}", origin="null")[0] == 403
    assert ask(server, host="example.org")[0] == 400


def test_the_page_takes_an_image_and_says_what_is_wrong(visit, server, tmp_path):
    page = visit.open(server)
    page.set_input_files("#upload", {"name": "mine.png", "mimeType": "image/png", "buffer": png()})
    page.wait_for_function("document.querySelectorAll('#images button').length === 4")
    page.wait_for_function("document.getElementById('message').textContent === ''")
    assert page.locator("#heads [data-head]").count() == 4
    page.set_input_files("#upload", {"name": "wrong.png", "mimeType": "image/png", "buffer": b"wrong"})
    page.wait_for_function("document.getElementById('message').textContent.includes('not an image')")
    huge = tmp_path / "huge.png"
    huge.write_bytes(bytes(MOST_UPLOAD + 1))
    page.set_input_files("#upload", huge)
    page.wait_for_function("document.getElementById('message').textContent.includes('at most 16 MB')")
    page.locator("#images button").nth(2).click()
    page.wait_for_function("location.hash.includes('image=2')")
    page.locator("#cover").check()
    page.wait_for_function("document.getElementById('changed').textContent.includes('window covered')")


def test_a_taken_port_is_named():
    with listen(0) as taken:
        taken.listen()
        with pytest.raises(OptionError, match="port: expected a free one"):
            listen(taken.getsockname()[1])
    with pytest.raises(OptionError, match=r"port: expected 0 to 65535, got 65536"):
        listen(65536)


@pytest.fixture
def nothing_trained(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "DEMO", tmp_path / "none")


def test_command_saves_a_page_of_the_packages_network(nothing_trained, tmp_path, capsys):
    (tmp_path / "one.png").write_bytes(png())
    (tmp_path / "two.png").write_bytes(b"no image")
    out = tmp_path / "pages" / "page.html"
    assert main(["explore", str(tmp_path / "one.png"), str(tmp_path / "two.png"), "--save", str(out)]) == 0
    said = capsys.readouterr()
    assert f"wrote {out}: 1 images" in said.out
    assert "two.png can't be read" in said.err
    assert "Ankle boot" in out.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.png"], "images: expected a file or folder, none.png is not there"),
        (["--weights", "none.safetensors"], "weights: expected model.safetensors of a run of sasa train"),
        (["--port", "70000"], "port: expected 0 to 65535, got 70000"),
    ],
)
def test_mistakes_on_the_command_line_are_a_line(nothing_trained, capsys, arguments, message):
    assert main(["explore", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_network_without_attention_is_named(tmp_path, capsys, network):
    from sasa.models import create_model
    from sasa.train.weights import save_weights

    facts = network.facts | {"model": "resnet14", "model_options": {}}
    save_weights(create_model("resnet14", 10, 1), tmp_path / "model.safetensors", facts)
    assert main(["explore", "--weights", str(tmp_path / "model.safetensors")]) == 2
    assert "weights: expected a network with attention layers, resnet14 has none" in capsys.readouterr().err
