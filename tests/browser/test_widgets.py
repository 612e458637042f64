"""The live views in a real browser: every view there is opens, answers keys and mouse, resets; the page without a kernel works offline."""
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time

import nbformat
import numpy as np
import pytest
from labkit import COUPLING, REPOSITORY, Lab, Notebook, free_port
from PIL import Image
from test_lab import write

from flowkit import widgets

pytestmark = pytest.mark.browser

# What makes a view quick enough for a test; every view must be here, so that none is forgotten.
VIEWS = {
    "autoregressive": "widgets.autoregressive()",
    "bend": "widgets.bend()",
    "contraction": "widgets.contraction()",
    "dequantize": "widgets.dequantize()",
    "flow_in_time": "widgets.flow_in_time(steps=8)",
    "layers": "widgets.layers(frames=24, points=300)",
    "matrix": "widgets.matrix()",
    "modulo": "widgets.modulo()",
    "planar": "widgets.planar()",
    "sigmoidal": "widgets.sigmoidal()",
    "surjection": "widgets.surjection()",
    "temperature": "widgets.temperature()",
    "training": "widgets.training(steps=6, size=32)",
    "two_kl": "widgets.two_kl()",
}
SETUP = "from flowkit import widgets\nimport torch\nfrom torch import nn"
LAYER = COUPLING + '''
torch.manual_seed(0)
layer = Coupling(nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 2)))
'''


def test_no_view_is_forgotten():
    assert set(VIEWS) == set(widgets.VIEWS)


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One JupyterLab for the module, whose kernels find this flowkit."""
    root = tmp_path_factory.mktemp("views")
    with Lab(root, tmp_path_factory.mktemp("home"), env={"PYTHONPATH": str(REPOSITORY), "FLOWKIT_FAST": "1", "OMP_NUM_THREADS": "1"}) as lab:
        yield lab


def rests(page, box):
    """Wait until a view has drawn nothing for a second: a key is answered coarsely at once, and in full a quarter of a second later."""
    page.evaluate("""box => new Promise(done => {
        let timer;
        const drawn = () => { clearTimeout(timer); timer = setTimeout(quiet, 1000) };
        const quiet = () => { box.removeEventListener("flowkit-drawn", drawn); done() };
        box.addEventListener("flowkit-drawn", drawn);
        drawn() })""", box.element_handle())


class Shown:
    """A view in the output of a notebook's cell."""

    def __init__(self, notebook, name):
        self.page = notebook.page
        self.box = notebook.cell(name).locator(".flowkit-view")
        self.canvas = self.box.locator("canvas")
        self.canvas.wait_for()
        self.until("d => +d.drawn > 0")

    def until(self, condition, seconds=60):
        self.page.wait_for_function(f"([box, known]) => ({condition})(box.dataset, known, box)", arg=[self.box.element_handle(), None],
                                    timeout=seconds * 1000, polling="raf")

    def pixels(self):
        return self.canvas.evaluate("c => c.toDataURL()")

    def rests(self):
        rests(self.page, self.box)

    def changes(self, act, seconds=60):
        """Do something and wait until the picture is another: of this, and not of what was done before it."""
        self.rests()
        before = self.pixels()
        act()
        self.page.wait_for_function("([c, before]) => c.toDataURL() !== before", arg=[self.canvas.element_handle(), before],
                                    timeout=seconds * 1000, polling=50)

    def becomes(self, wanted, seconds=60):
        self.page.wait_for_function("([c, wanted]) => c.toDataURL() === wanted", arg=[self.canvas.element_handle(), wanted],
                                    timeout=seconds * 1000, polling=50)

    def press(self, key):
        self.canvas.focus()
        self.page.keyboard.press(key)

    def where(self):
        return self.box.locator(".flowkit-where").inner_text()


def opened(running, tab, name, *cells):
    write(running.root / f"{name}.ipynb", *cells)
    notebook = tab.open(running, f"{name}.ipynb")
    assert notebook.run_all(), notebook.errors()
    return notebook


def faults(tab):
    return [line for line in tab.console if line.startswith(("error", "uncaught"))]


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_opens_answers_and_resets(running, tab, name, tmp_path):
    notebook = opened(running, tab, name, "setup", SETUP, "view", f"view = {VIEWS[name]}\nview")
    view = Shown(notebook, "view")
    view.rests()
    first = view.pixels()
    view.changes(lambda: view.press("ArrowRight"))
    view.press("r")
    view.becomes(first)
    view.changes(lambda: view.box.locator(".flowkit-play").click())
    tab.page.wait_for_timeout(300)
    view.box.locator(".flowkit-reset").click()
    view.becomes(first)
    tab.page.wait_for_timeout(500)
    assert view.pixels() == first, "what was under way when Reset was pressed came after it"
    # The keys were the view's alone: JupyterLab has neither moved nor made nor deleted a cell.
    assert notebook.cells() == ["setup", "view"]
    assert view.box.get_attribute("data-frame") == "0"
    label = view.canvas.get_attribute("aria-label")
    assert len(label) > 40 and view.where() in label
    for element in view.box.locator("[tabindex], input, button").all():
        assert element.get_attribute("data-lm-suppress-shortcuts") == "true"
    assert notebook.errors() == [] and faults(tab) == []
    notebook.screenshot("view", tmp_path / f"{name}.png")


def test_keys_step_and_are_not_swallowed(running, tab):
    notebook = opened(running, tab, "keys", "setup", SETUP, "view", VIEWS["layers"])
    view = Shown(notebook, "view")
    for key, frame in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowUp", 13), ("ArrowDown", 1), ("End", 26), ("Home", 0)):
        view.press(key)
        last = int(view.box.locator(".flowkit-slider").get_attribute("max"))
        view.until(f"d => +d.frame === {min(frame, last)}")
    view.press(" ")
    view.until("d => +d.frame > 2")
    view.press("r")
    view.until("d => d.frame === '0'")
    slider = view.box.locator(".flowkit-slider")
    slider.focus()
    tab.page.keyboard.press("ArrowRight")
    view.until("d => d.frame === '1'")
    place = slider.bounding_box()
    tab.page.mouse.click(place["x"] + 0.5 * place["width"], place["y"] + place["height"] / 2)
    view.until("d => +d.frame > 5")


def test_a_students_coupling_in_layers(running, tab, tmp_path):
    notebook = opened(running, tab, "student", "setup", SETUP, "layer", LAYER, "view", "view = widgets.explore(layer)\nview",
                      "kinds", "print(type(view).__name__, view.compute.__closure__ is not None, 'STRAIGHT' if 'straight' in view.canvas.caption else 'TRUE')")
    view = Shown(notebook, "view")
    view.changes(lambda: view.press("End"))
    assert "after 1 layer" in view.where()
    assert "TRUE" in notebook.text("kinds")
    # The kernel's controls: another grid, by keyboard, without losing the notebook's cell.
    choice = notebook.cell("view").locator(".flowkit-controls select").first
    view.press("Home")
    view.changes(lambda: (choice.focus(), tab.page.keyboard.press("ArrowDown")))
    assert notebook.errors() == [] and faults(tab) == []
    notebook.screenshot("view", tmp_path / "student.png")


def drag_a_knot(view):
    """Of `bend`: the selected knot, the middle one at first, a little to the right and up."""
    view.canvas.scroll_into_view_if_needed()
    place, mouse = view.canvas.bounding_box(), view.page.mouse
    # The middle knot lies in the middle of the first panel: the selected ones are found by their place in the picture.
    x, y = view.canvas.evaluate("""c => { const data = c.getContext('2d').getImageData(0, 0, c.width, c.height / 2).data; const r = devicePixelRatio;
        const found = []; for (let i = 0; i < data.length; i += 4) if (data[i] === 0 && data[i + 1] === 158 && data[i + 2] === 115)
            found.push([(i / 4) % c.width / r, Math.floor(i / 4 / c.width) / r]);
        const middle = found.map(p => p[0]).sort((a, b) => a - b)[found.length >> 1];
        const near = found.filter(p => Math.abs(p[0] - middle) < 12); const mean = k => near.reduce((s, p) => s + p[k], 0) / near.length;
        return [mean(0), mean(1)] }""")
    mouse.move(place["x"] + x, place["y"] + y)
    mouse.down()
    mouse.move(place["x"] + x + 10, place["y"] + y - 30, steps=8)
    mouse.up()


def test_knots_are_dragged_and_the_density_follows(running, tab):
    notebook = opened(running, tab, "drag", "setup", SETUP, "view", "view = widgets.bend()\nview", "look", "print(view.state['knots'][2].tolist())")
    assert notebook.text("look").split() == ["[0.0,", "0.0]"]
    view = Shown(notebook, "view")
    view.changes(lambda: drag_a_knot(view))
    view.rests()
    notebook.run("look")
    x, z = json.loads(notebook.text("look"))
    assert 0.02 < x < 0.5 and 0.2 < z < 2
    for key in ("4", "ArrowDown"):
        view.changes(lambda key=key: view.press(key))
    view.changes(lambda: notebook.cell("view").locator(".flowkit-controls input[type=checkbox]").click())
    assert "does not integrate to one" in view.box.locator(".flowkit-caption").inner_text()
    assert faults(tab) == []


SLOW = """
import time
slow = widgets.bend()
compute = slow.compute
slow.compute = lambda state, coarse: (time.sleep(0.3), compute(state, coarse))[1]
slow
"""
STATES = """
for view in (quick, slow):
    print([view.state["selected"], view.state["probe"], *view.state["knots"].ravel().tolist()])
"""


def test_nothing_asked_of_a_slow_kernel_is_lost(running, tab):
    """Where each picture takes a while, a knot still comes to the mouse's last place, and keys are heard in their order."""
    notebook = opened(running, tab, "slow", "setup", SETUP, "quick", "quick = widgets.bend()\nquick", "slow", SLOW, "look", STATES)
    quick, slow = Shown(notebook, "quick"), Shown(notebook, "slow")
    steps = [("4", "ArrowDown", "ArrowDown"), ("2", "ArrowUp", "ArrowRight")]
    for view, wait in ((quick, quick.rests), (slow, lambda: None)):
        notebook.cell("quick" if view is quick else "slow")
        view.rests()
        drag_a_knot(view)
        for keys in steps:
            for key in keys:
                wait()
                view.press(key)
        tab.page.wait_for_timeout(3000)
        view.rests()
    notebook.run("look")
    one, other = map(json.loads, notebook.text("look").splitlines())
    assert np.allclose(one, other, rtol=0, atol=0.05), "0.05 is about two pixels"
    assert one[0] == 1 and one[6] > 0.1 and one[7] > 0.4, "the middle knot was dragged"
    assert faults(tab) == []


def search(view, found, step=14):
    """Move the mouse over the picture until found() is true; the place where it is so."""
    place = view.canvas.bounding_box()
    for y in range(8, int(place["height"]), step):
        for x in range(8, int(place["width"]), step):
            view.page.mouse.move(place["x"] + x, place["y"] + y)
            if found():
                return place["x"] + x, place["y"] + y
    raise AssertionError("nothing there")


@pytest.mark.parametrize("name", ["contraction", "dequantize", "flow_in_time", "matrix", "modulo", "planar", "sigmoidal", "surjection", "temperature",
                                  "two_kl"])
def test_handles_are_dragged(running, tab, name):
    """The picture follows the mouse, and the kernel's state with it; R puts everything back."""
    look = "before, now = view._first, view.state\nprint([name for name, value in before.items() if str(now[name]) != str(value)])"
    notebook = opened(running, tab, f"drag_{name}", "setup", SETUP, "view", f"view = {VIEWS[name]}\nview", "look", look)
    assert notebook.text("look").strip() == "[]"
    view = Shown(notebook, "view")
    notebook.cell("view").scroll_into_view_if_needed()
    view.rests()
    first = view.pixels()
    x, y = search(view, lambda: view.canvas.evaluate("c => c.style.cursor") == "grab")
    assert view.pixels() == first, "looking for a handle moves nothing"

    def drag():
        tab.page.mouse.down()
        tab.page.mouse.move(x + 25, y - 25, steps=6)
        tab.page.mouse.up()

    view.changes(drag)
    view.rests()
    notebook.run("look")
    assert notebook.text("look").strip() != "[]"
    view.press("r")
    view.becomes(first)
    assert faults(tab) == []


def test_the_pointer_lights_the_paths_of_an_output(running, tab, chromium, tmp_path):
    """In the notebook, and on the page without a kernel."""
    notebook = opened(running, tab, "hover", "setup", SETUP, "view", VIEWS["autoregressive"])
    view = Shown(notebook, "view")
    notebook.cell("view").scroll_into_view_if_needed()
    view.rests()
    search(view, lambda: view.box.get_attribute("data-frame") == "3")
    assert view.where() == "pass 3 of 4: output 3 from x1, x2"
    assert faults(tab) == []
    widgets.autoregressive().save_html(tmp_path / "page.html")
    alone = chromium.tab(1280, 720)
    alone.page.context.unroute_all()
    alone.page.context.set_offline(True)
    alone.page.goto((tmp_path / "page.html").as_uri())
    alone.page.locator("canvas").wait_for()
    alone.page.wait_for_timeout(300)
    place = alone.page.locator("canvas").bounding_box()
    frames = set()
    for x in range(10, int(place["width"] / 2), 12):
        alone.page.mouse.move(place["x"] + x, place["y"] + place["height"] - 40)
        frames.add(alone.page.locator(".flowkit-view").get_attribute("data-frame"))
    assert frames >= {"1", "2", "3", "4"}
    alone.close()


TRAINING = """
view = widgets.training(steps=100_000, size=64)
view
"""


def test_a_click_is_heard_while_a_cell_trains(running, tab):
    """Pause within a second, a step, and Reset; the cell is running all the while."""
    notebook = opened(running, tab, "train", "setup", SETUP, "view", TRAINING, "run", "pass")
    view = Shown(notebook, "view")
    notebook._ask("cell.model.sharedModel.setSource('losses = await view.run()'); panel.content.activeCellIndex = index; "
                  "window.jupyterapp.commands.execute('notebook:run-cell')", "run")
    batch = r"box.querySelector('.flowkit-where').textContent.match(/batch (\d+)/)[1]"
    view.until(f"(d, k, box) => +{batch} > 20", 120)
    view.press(" ")
    view.page.wait_for_timeout(1000)
    paused = view.where()
    view.page.wait_for_timeout(700)
    assert view.where() == paused, "it went on after the pause"
    assert notebook.cell("run").locator(".jp-InputPrompt").inner_text() == "[*]:", "the cell is still running"
    view.press("ArrowRight")
    number = int(paused.split()[1])
    view.until(f"(d, k, box) => +{batch} === {number + 1}", 10)
    view.press("r")
    view.until(f"(d, k, box) => +{batch} === 0", 20)
    assert notebook.errors() == [] and faults(tab) == []


def test_a_saved_notebook_shows_the_last_picture(running, tab, lab, tmp_path):
    """Opened again, with a kernel that knows nothing of the view, the picture stands there as it was left."""
    notebook = opened(running, tab, "saved", "setup", SETUP, "view", "view = widgets.bend()\nview")
    view = Shown(notebook, "view")
    still = notebook.cell("view").locator(".jp-RenderedImage img")
    assert still.count() == 1 and not still.is_visible(), "the still picture hides behind the live one"
    view.changes(lambda: view.press("ArrowRight"))
    view.rests()
    tab.page.wait_for_function("([i, c]) => i.src === c.toDataURL()", arg=[still.element_handle(), view.canvas.element_handle()], timeout=20_000)
    left = view.pixels()
    notebook.save()
    notebook.shut_down()        # or the page would find the kernel that still has the view, and show it live
    again = tab.open(running, "saved.ipynb")
    picture = again.cell("view").locator(".jp-RenderedImage img")
    picture.wait_for(state="visible")
    assert again.cell("view").locator(".flowkit-view").count() == 0
    assert not again.cell("view").get_by_text("Error displaying widget").is_visible()
    saved = nbformat.read(running.root / "saved.ipynb", 4).cells[1].outputs
    (png,) = [o.data["image/png"] for o in saved if "image/png" in o.get("data", {})]
    a, b = (np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), float) for text in (png, left.split(",")[1]))
    assert a.shape == b.shape and np.abs(a - b).max() == 0, "it is the last picture, not the first"


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_the_page_without_a_kernel(chromium, tmp_path, name):
    """From a file, with the network cut: it draws, plays, steps and resets, and asks for nothing."""
    view = eval(VIEWS[name], {"widgets": widgets})
    if name == "training":
        view.train()
    view.save_html(tmp_path / "page.html")
    tab = chromium.tab(1280, 720)
    asked = []
    tab.page.context.unroute_all()
    tab.page.context.set_offline(True)
    tab.page.on("request", lambda r: asked.append(r.url))
    tab.page.goto((tmp_path / "page.html").as_uri())
    canvas = tab.page.locator("canvas")
    state = "document.querySelector('.flowkit-view').dataset"
    tab.page.wait_for_function(f"() => +{state}.drawn > 0")
    pixels = lambda: canvas.evaluate("c => c.toDataURL()")  # noqa: E731
    first = pixels()
    assert tab.page.evaluate("document.activeElement.tagName") == "CANVAS", "keys work without a click"
    tab.page.keyboard.press("End")
    tab.page.wait_for_function(f"() => +{state}.frame > 0")        # a quick training has two frames only
    assert pixels() != first
    tab.page.keyboard.press("r")
    tab.page.wait_for_function(f"() => {state}.frame === '0'")
    assert pixels() == first
    tab.page.keyboard.press(" ")
    tab.page.wait_for_function(f"() => +{state}.frame > 0")
    tab.page.locator(".flowkit-reset").click()
    tab.page.wait_for_function(f"() => {state}.frame === '0'")
    overflow = tab.page.evaluate("[document.documentElement.scrollWidth - innerWidth, document.documentElement.scrollHeight - innerHeight]")
    assert max(overflow) <= 0, "the page fits the hall's screen without scrolling"
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == [] and faults(tab) == []
    tab.close()


def test_in_voila(chromium, tmp_path):
    """As a page of its own, without code: the view is there and answers."""
    write(tmp_path / "hall.ipynb", "setup", SETUP, "view", "widgets.bend()")
    port, home = free_port(), tmp_path / "home"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")} | {
        "HOME": str(home), "JUPYTER_DATA_DIR": str(home / "data"), "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"), "IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    log = open(tmp_path / "voila.log", "w")
    voila = subprocess.Popen([sys.executable, "-m", "voila", str(tmp_path / "hall.ipynb"), "--no-browser", f"--port={port}",
                              "--Voila.ip=127.0.0.1"], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    tab = chromium.tab(1280, 720)
    try:
        for _ in range(300):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            assert voila.poll() is None, (tmp_path / "voila.log").read_text()[-2000:]
            time.sleep(0.2)
        tab.page.goto(f"http://127.0.0.1:{port}/", timeout=120_000)
        answers(tab, tab.page)
        # Voila complains about extensions of JupyterLab's that it cannot load, and its page asks for an icon font elsewhere; the view
        # does neither.
        assert [line for line in faults(tab) if "flowkit" in line or "anywidget" in line] == []
        assert [url for url in tab.refused if "fontawesome" not in url and "mathjax" not in url.lower()] == []
    finally:
        tab.close()
        os.killpg(voila.pid, signal.SIGTERM)
        voila.wait(20)
        log.close()


def test_in_notebook_7(running, tab):
    write(running.root / "seven.ipynb", "setup", SETUP, "view", "widgets.bend()")
    tab.page.goto(f"{running.url}/notebooks/seven.ipynb?token={running.token}")
    tab.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=120_000)
    notebook = Notebook(tab)
    notebook.wait_for_kernel()  # what is asked before there is a kernel opens a dialog
    before = faults(tab)        # of other extensions, as the page opens
    assert notebook.run_all()
    answers(tab, tab.page)
    assert faults(tab) == before


def answers(tab, page):
    """The one view on the page draws, and answers keys and mouse without an error."""
    box = page.locator(".flowkit-view")
    box.wait_for(timeout=120_000)
    canvas = box.locator("canvas")
    page.wait_for_function("() => +document.querySelector('.flowkit-view').dataset.drawn > 0")
    rests(page, box)
    first = canvas.evaluate("c => c.toDataURL()")
    assert not page.locator(".jp-RenderedImage img").first.is_visible(), "the still picture hides behind the live one"
    canvas.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("([c, before]) => c.toDataURL() !== before", arg=[canvas.element_handle(), first])
    box.locator(".flowkit-reset").click()
    page.wait_for_function("([c, before]) => c.toDataURL() === before", arg=[canvas.element_handle(), first])
