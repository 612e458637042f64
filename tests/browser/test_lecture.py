"""The page for the hall, from its opening to its last view by the keyboard alone, in JupyterLab as it is delivered."""
import shutil

import nbformat
import pytest
from labkit import REPOSITORY, Lab
from test_lab import write

pytestmark = pytest.mark.browser

CELLS = nbformat.read(REPOSITORY / "lessons" / "00_lecture.ipynb", 4).cells
NAMES = [cell.id for cell in CELLS]
# Each cell in the page, the one with the keys, and the view in it.
LOOK = """() => {
    const cells = window.jupyterapp.shell.currentWidget.content.widgets, focus = document.activeElement;
    const at = cells.findIndex(c => c.node.contains(focus)), box = focus.closest(".flowkit-view"), place = box?.closest(".flowkit-box").getBoundingClientRect();
    return { at, active: cells.findIndex(c => c.node.classList.contains("jp-mod-active")), canvas: focus.tagName === "CANVAS",
        title: box?.querySelector(".flowkit-title").textContent, picture: box ? focus.toDataURL() : "", top: place?.top, bottom: place?.bottom } }"""


def until(page, condition, *known, seconds=120):
    """What LOOK finds, as soon as condition(look, known) holds in the page."""
    page.wait_for_function(f"known => {{ const look = ({LOOK})(); return ({condition})(look, ...known) }}", arg=list(known), timeout=seconds * 1000, polling=50)
    return page.evaluate(LOOK)


def through(page, each):
    """Walk the opened page; each(what LOOK finds) is called at every view. Returns the views' titles."""
    titles, keys = [], page.keyboard
    for number, cell in enumerate(CELLS):
        view = cell.cell_type == "code" and "widgets." in cell.source and ".hall(" in cell.source
        keys.press("Shift+Enter")
        if not view:
            if number + 1 < len(CELLS):
                until(page, "(look, next) => look.active === next && !look.canvas", number + 1)
            continue
        # It has the keys, and is whole on the screen as soon as its controls are there.
        look = until(page, "(look, at) => look.canvas && look.at === at && look.active === at && look.top >= 0 && look.bottom <= innerHeight", number)
        page.wait_for_timeout(300)
        each(page.evaluate(LOOK))
        titles.append(look["title"])
    return titles


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """One JupyterLab for the module, which shows cells as it does for everybody."""
    root = tmp_path_factory.mktemp("hall")
    shutil.copy(REPOSITORY / "lessons" / "00_lecture.ipynb", root)
    settings = {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "contentVisibility"}}
    environment = {"PYTHONPATH": str(REPOSITORY), "FLOWKIT_FAST": "1", "OMP_NUM_THREADS": "1"}
    with Lab(root, tmp_path_factory.mktemp("home"), settings=settings, env=environment) as lab:
        yield lab


def test_the_whole_page_without_a_mouse(running, chromium):
    """Shift+Enter shows each view, whole, and puts the keys into it: an arrow changes the picture, N the scene; and so on to the next."""
    tab = chromium.tab(1280, 800)
    notebook = tab.open(running, "00_lecture.ipynb")
    keys = tab.page.keyboard

    def answers(look):
        keys.press("ArrowRight")
        until(tab.page, "(look, before) => look.picture !== before", look["picture"])
        if " 1 of " in look["title"] and " of 1:" not in look["title"]:
            keys.press("n")
            until(tab.page, "look => look.title.includes(' 2 of ')")

    titles = through(tab.page, answers)
    assert len(titles) == sum(".hall(" in cell.source and cell.cell_type == "code" for cell in CELLS) > 20
    assert notebook.cells() == NAMES and notebook.errors() == []
    assert [line for line in tab.console if line.startswith(("error", "uncaught"))] == [] and tab.refused == []
    tab.close()


PAGE = ["widgets.bend().hall()", "widgets.bend().hall('decreasing')", "widgets.modulo()"]


def test_escape_gives_the_keys_back_and_run_all_moves_nothing(running, chromium):
    """Escape, from a view and after the full screen; a view without hall() leaves the keys where they are."""
    write(running.root / "page.ipynb", "setup", "from flowkit import widgets", *(word for i, cell in enumerate(PAGE) for word in (f"view{i}", cell)), "end", "1")
    tab = chromium.tab(1280, 800)
    notebook = tab.open(running, "page.ipynb")
    assert notebook.run_all(), notebook.errors()
    tab.page.wait_for_function("() => [...document.querySelectorAll('.flowkit-view')].filter(box => +box.dataset.drawn > 0).length === 3")
    tab.page.wait_for_timeout(500)
    assert not tab.page.evaluate(LOOK)["canvas"], "after Run All the keys are the notebook's"
    notebook._ask("panel.content.activeCellIndex = 1; panel.content.mode = 'command'; panel.activate(); panel.content.activate()")
    keys = tab.page.keyboard
    keys.press("Shift+Enter")
    until(tab.page, "look => look.canvas && look.at === 1")
    keys.press("Escape")
    until(tab.page, "look => !look.canvas && look.active === 2 && look.at === 2")
    keys.press("Shift+Enter")
    until(tab.page, "look => look.canvas && look.at === 2")
    keys.press("f")
    tab.page.wait_for_function("() => document.fullscreenElement !== null")
    keys.press("Shift+Enter")           # out of the full screen, and on to the cell after it
    until(tab.page, "look => !look.canvas && look.active === 4")
    assert tab.page.evaluate("document.fullscreenElement === null")
    tab.page.wait_for_function("() => { const boxes = document.querySelectorAll('.flowkit-view'); return boxes.length === 3 && +boxes[2].dataset.drawn > 0 }")
    tab.page.wait_for_timeout(500)
    assert not tab.page.evaluate(LOOK)["canvas"] and notebook.cells() == ["setup", "view0", "view1", "view2", "end"]
    tab.close()
