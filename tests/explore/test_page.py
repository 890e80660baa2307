"""The page in a browser: what it shows are the network's own numbers."""

import pytest
import torch

import sasa
from sasa.viz import attention_layers, explorer, look, roll_out
from sasa.viz.page import render

LAYER = "stages.stage1.0.spatial"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(network, images, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    payloads = [network.payload(one, with_effects=True) for one in images[:2]]
    path.write_text(render(payloads, network="a <network>", note="A note."), encoding="utf-8")
    return path.as_uri()


def settle(page):
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def point(page, row, col, size=28):
    """Move the mouse over the middle of a pixel."""
    page.locator("#image").scroll_into_view_if_needed()
    box = page.locator("#image").bounding_box()
    page.mouse.move(box["x"] + (col + 0.5) / size * box["width"], box["y"] + (row + 0.5) / size * box["height"])
    settle(page)


def shown(page):
    """The numbers of the equation."""
    terms = page.locator("#equation [data-term]")
    return {term.get_attribute("data-term"): float(term.get_attribute("data-value")) for term in terms.all()}


def weights_of(network, image, layer, query):
    """From sasa.local_attention_weights, apart from what the page was made with: (N, K)."""
    module, inputs = attention_layers(network.model)[layer], []
    handle = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        network.model(network.input(image)[None])
        handle.remove()
        query_, key, _ = module.qkv(inputs[0]).unflatten(1, (3, module.num_heads, -1)).unbind(1)
        rows, cols = (
            half.unflatten(0, (module.num_heads, -1)) for half in (module.row_embedding, module.col_embedding)
        )
        rows = torch.cat((rows, torch.zeros(cols.shape[0], cols.shape[1], rows.shape[2])), 1)
        cols = torch.cat((torch.zeros(cols.shape[0], rows.shape[1] - cols.shape[1], cols.shape[2]), cols), 1)
        weights = sasa.local_attention_weights(
            query_, key, module.kernel_size, row_embedding=rows, col_embedding=cols, scale=module.scale
        )
    return weights[0, :, :, query[0], query[1]]


def test_it_opens_from_disk_and_asks_for_nothing(visit, saved):
    page = visit.open(saved)
    assert page.title() == "a <network>: what a pixel sees"
    assert page.inner_text("#note") == "A note."
    assert page.inner_text("#pixel") == "14, 14"
    assert page.locator("#heads [data-head]").count() == 4
    assert page.locator("#layer option").count() == 5
    assert page.locator("#prediction tr").count() == 5
    assert not [url for url in visit.asked if not url.startswith(("file:", "data:"))]


@pytest.mark.parametrize(("row", "col", "head"), [(13, 9, 0), (0, 27, 3), (27, 0, 1)])
def test_the_equation_has_the_layers_own_numbers(visit, saved, network, images, row, col, head):
    page = visit.open(f"{saved}#layer={LAYER}&head={head}")
    point(page, row, col)
    assert page.inner_text("#pixel") == f"{row}, {col}"
    weights = weights_of(network, images[0], LAYER, (row // 2, col // 2))[head]  # a map of 14 x 14
    for tap in (int(weights.argmax()), 0, 24):
        page.locator("#taps [data-map=weight]").click(position=at_tap(page, tap))
        settle(page)
        numbers = shown(page)
        assert int(page.get_attribute("#equation", "data-tap")) == tap
        assert numbers["weight"] == pytest.approx(weights[tap].item(), abs=2e-4)
        assert numbers["content"] + numbers["position"] == pytest.approx(numbers["logit"], abs=1e-9)
        text = page.inner_text("#equation [data-term=weight]")
        assert float(text) == pytest.approx(weights[tap].item(), abs=3e-4)  # four digits are shown


def at_tap(page, tap, kernel=5):
    box = page.locator("#taps [data-map=weight]").bounding_box()
    return {"x": (tap % kernel + 0.5) * box["width"] / kernel, "y": (tap // kernel + 0.5) * box["height"] / kernel}


def test_content_and_position_are_apart(visit, saved, network, images):
    page = visit.open(f"{saved}#layer={LAYER}&pixel=12,16&head=2&tap=7")
    (seen,) = [one for one in look(network.model, network.input(images[0]))[0] if one.name == LAYER]
    numbers = shown(page)
    assert numbers["content"] == pytest.approx(seen.content()[2, 7, 6, 8].item(), abs=2e-3)
    assert numbers["position"] == pytest.approx(seen.position()[2, 7, 6, 8].item(), abs=2e-3)
    page.locator("#position").uncheck()
    settle(page)
    assert shown(page)["position"] == 0
    assert shown(page)["weight"] == pytest.approx(seen.content().softmax(1)[2, 7, 6, 8].item(), abs=2e-4)
    assert "position terms off" in page.inner_text("#changed")


def test_click_pins_and_keys_move(visit, saved):
    page = visit.open(saved)
    point(page, 5, 6)
    page.mouse.down()
    page.mouse.up()
    point(page, 20, 20)
    assert page.inner_text("#pixel") == "5, 6"
    page.locator("#image").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowUp"):
        page.keyboard.press(key)
    settle(page)
    assert page.inner_text("#pixel") == "4, 8"  # a query of the chosen layer is two pixels
    page.keyboard.press("]")
    page.keyboard.press("2")
    settle(page)
    assert page.input_value("#layer") == "stages.stage1.1.spatial"
    assert page.get_attribute("#heads [data-head='1']", "aria-pressed") == "true"
    page.keyboard.press("Escape")
    point(page, 20, 21)
    assert page.inner_text("#pixel") == "20, 21"


def test_layers_change_what_is_shown_and_the_link_keeps_it(visit, saved):
    page = visit.open(saved)
    page.select_option("#layer", "stem.spatial")
    settle(page)
    assert page.locator("#heads [data-head]").count() == 8
    point(page, 3, 4)
    page.wait_for_function("location.hash.includes('pixel=3,4')")
    again = visit.open(page.url)
    assert again.inner_text("#pixel") == "3, 4"
    assert again.input_value("#layer") == "stem.spatial"
    assert shown(again) == shown(page)


def test_broken_links_show_the_page(visit, saved):
    page = visit.open(f"{saved}#layer=none&pixel=99999,-1&head=77&tap=x&image=12&temperature=nan")
    assert page.inner_text("#pixel") == "27, 14"
    assert page.locator("#heads [aria-pressed=true]").count() == 1


def test_roll_out_is_that_of_the_library(visit, saved, network, images):
    page = visit.open(f"{saved}#layer={LAYER}&pixel=0,13&rollout=on")
    seen, _ = look(network.model, network.input(images[0]))
    share = roll_out(seen[:2], (0, 6), (28, 28))
    assert f"{(1 - share.sum().item()) * 100:.1f} % fell outside" in page.inner_text("#reach")


def test_saved_pages_take_no_images(visit, saved):
    page = visit.open(saved)
    assert page.locator("#upload").is_disabled()
    page.evaluate("() => { const data = new DataTransfer(); data.items.add(new File(['x'], 'x.png')); "
                  "dispatchEvent(new DragEvent('drop', { dataTransfer: data })); }")  # fmt: skip
    assert "takes no images" in page.inner_text("#message")


@pytest.mark.parametrize("width", [360, 1280, 3840])
def test_nothing_is_wider_than_the_window(visit, saved, width):
    page = visit.open(saved, width=width, height=800)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_notebooks_show_it_and_dilated_windows_and_other_borders(visit, tmp_path):
    torch.manual_seed(1)
    layers = [
        sasa.RelativeSelfAttention(3, 8, (3, 5), 2, dilation=(1, 2), border="mask"),
        sasa.RelativeSelfAttention(8, 8, 4, 2, stride=2, border="valid", scale=0.5),
        sasa.RelativeSelfAttention(8, 8, 3, 4, position="absolute"),
        sasa.RelativeSelfAttention(8, 8, 3, 4, position="bias"),
        sasa.AttentionConv2d(torch.nn.Conv2d(8, 4, 3, padding=2, padding_mode="reflect")),
    ]
    network, image = torch.nn.Sequential(*layers), torch.randn(3, 13, 17)
    found = explorer(network, image[None])
    assert found._repr_html_().startswith("<iframe srcdoc=")
    found.save(tmp_path / "page.html")
    seen, _ = look(network, image)
    for one in seen:
        page = visit.open((tmp_path / "page.html").as_uri() + f"#layer={one.name}&pixel=1,15&head=1&tap=2")
        assert "not that of a classifier" in page.inner_text("#prediction")
        query = one.query_of((1, 15), (13, 17))
        assert page.get_attribute("#equation", "data-query") == f"{query[0]}, {query[1]}"
        numbers = shown(page)
        assert numbers["weight"] == pytest.approx(one.weights()[1, 2][query].item(), abs=2e-4)
        assert numbers["position"] == pytest.approx(one.position()[1, 2][query].item(), abs=2e-3)
        page.close()
