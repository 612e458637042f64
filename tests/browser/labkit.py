"""JupyterLab as `make lab` starts it, used by a real browser: Debian's Chromium through Playwright.

    with Lab(folder, home) as lab, Chromium() as chromium:
        tab = chromium.tab()
        notebook = tab.open(lab, "02_coupling.ipynb")
        notebook.run_all()
        notebook.set_source("coupling", "class Coupling: ...")
        notebook.run("coupling")
        notebook.run("coupling_check")
        assert "5 / 5" in notebook.html("coupling_check")

Cells are named by their nbgrader grade_id (or, without one, by their cell id). Everything the server and the
kernels write, configuration and history included, goes into a scratch home; the pages may talk to this machine only.
"""
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Locator, Page, sync_playwright

REPOSITORY = Path(__file__).resolve().parents[2]
LAUNCHER = REPOSITORY / "bin" / "lab"            # what `make lab` runs

LOCAL = re.compile(r"(https?|wss?)://(127\.0\.0\.1|localhost)[:/]|data:|blob:|about:")

# A notebook that holds still for a test: every cell in the page, no saving and no suggestions of its own accord.
STILL = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/docmanager-extension:plugin": {"autosave": False},
    "@jupyterlab/completer-extension:manager": {"autoCompletion": False},
}

# Chromium looks for nothing outside, and a page in the background is not slowed down.
CHROMIUM_OPTIONS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding",
]

# What a student types into lesson 02.
COUPLING = '''
class Coupling(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=-1)
        alpha, mu = self.net(x1).chunk(2, dim=-1)
        return torch.cat([x1, x2 * alpha.exp() + mu], dim=-1), alpha.sum(-1)

    def inverse(self, z):
        z1, z2 = z.chunk(2, dim=-1)
        alpha, mu = self.net(z1).chunk(2, dim=-1)
        return torch.cat([z1, (z2 - mu) * (-alpha).exp()], dim=-1)
'''


def find_chromium() -> str:
    """Path of the browser: $CHROMIUM, or the first on the PATH."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("No Chromium on this machine. On Debian: apt install chromium; elsewhere set CHROMIUM to its path.")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    """JupyterLab on 127.0.0.1, by the command of `make lab`, with a home of its own.

    root: the folder it shows; None for the launcher's own choice, lessons/. home: a scratch folder, made if need be; it holds the log, `server.log`, afterwards.
    settings: the user's own JupyterLab settings, by plugin, on top of STILL; None for a user who never set any.
    env: variables for the server and its kernels.
    """

    def __init__(self, root, home, settings: dict | None = {}, env: dict | None = None):
        self.root, self.home = root, Path(home).resolve()
        self.settings, self.env = settings, env or {}
        self.port, self.token = free_port(), secrets.token_hex(16)
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.home / "server.log"
        self.process = None

    def __enter__(self):
        self.home.mkdir(parents=True, exist_ok=True)
        for plugin, values in ({} if self.settings is None else {**STILL, **self.settings}).items():
            own = self.home / "settings" / (plugin.replace(":", "/") + ".jupyterlab-settings")
            own.parent.mkdir(parents=True, exist_ok=True)
            own.write_text(json.dumps(values))
        environment = {name: value for name, value in os.environ.items()
                       if not name.startswith("JUPYTER") and name not in ("MPLBACKEND", "PYTHONPATH")}
        environment |= {
            "HOME": str(self.home), "IPYTHONDIR": str(self.home / "ipython"),
            "JUPYTER_CONFIG_DIR": str(self.home / "config"), "JUPYTER_DATA_DIR": str(self.home / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.home / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(self.home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.home / "workspaces"),
            **self.env,
        }
        command = [sys.executable, str(LAUNCHER), "--no-browser", f"--ServerApp.port={self.port}",
                   "--ServerApp.port_retries=0", f"--IdentityProvider.token={self.token}",
                   # window.jupyterapp, which Notebook asks and commands, in JupyterLab and in Notebook 7
                   "--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"]
        if self.root is not None:
            command.append(f"--ServerApp.root_dir={Path(self.root).resolve()}")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log,
                                            stderr=subprocess.STDOUT, start_new_session=True)
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Kernels first, by the server's own means; then the server and what is left of its group."""
        if self.process.poll() is None:
            with contextlib.suppress(OSError):
                for session in self.api("/api/sessions"):
                    self.api(f"/api/sessions/{session['id']}", "DELETE")
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def api(self, path: str, method: str = "GET"):
        """The server's own interface, as in `lab.api("/api/status")`."""
        request = urllib.request.Request(self.url + path, method=method, headers={"Authorization": f"token {self.token}"})
        local = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with local.open(request, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def _wait_until_it_answers(self, seconds: float = 120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise RuntimeError(f"JupyterLab ended with {self.process.returncode}:\n{self.log.read_text()[-3000:]}")
            with contextlib.suppress(OSError):
                self.api("/api/status")
                return
            time.sleep(0.1)
        raise TimeoutError(f"no answer from JupyterLab in {seconds} s:\n{self.log.read_text()[-3000:]}")


class Chromium:
    """A headless browser. Each `tab()` is a fresh profile."""

    def __enter__(self):
        self._playwright = sync_playwright().start()
        try:
            options = CHROMIUM_OPTIONS + (["--no-sandbox"] if os.geteuid() == 0 else [])
            self._browser = self._playwright.chromium.launch(executable_path=find_chromium(), args=options)
        except BaseException:
            self._playwright.stop()
            raise
        return self

    def __exit__(self, *_):
        self._browser.close()
        self._playwright.stop()

    def tab(self, width: int = 1400, height: int = 1000, sockets: bool = True) -> "Tab":
        """A page that asks for nothing outside. Watching web sockets takes each message through this process: where time is measured,
        `sockets` is false, and they go straight to the server."""
        context = self._browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(60_000)
        tab = Tab(context.new_page())

        def guard(route):
            url = route.request.url
            tab.requests.append(url)
            if LOCAL.match(url):
                route.continue_()
            else:
                tab.refused.append(url)
                route.abort()

        context.route("**/*", guard)
        # A matched web socket is never connected, so refusing it takes no more than a note of it.
        if sockets:
            context.route_web_socket(lambda url: not LOCAL.match(url), lambda ws: tab.refused.append(ws.url))
        tab.page.on("console", lambda message: tab.console.append(f"{message.type}: {message.text}"))
        tab.page.on("pageerror", lambda error: tab.console.append(f"uncaught: {error}"))
        return tab


@dataclass
class Tab:
    """A page, the addresses it asked for, those that were refused for being outside, and its console's lines."""

    page: Page
    requests: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    console: list[str] = field(default_factory=list)

    def open(self, lab: Lab, path: str) -> "Notebook":
        """Open a notebook (its path below the lab's root) and wait for its kernel."""
        # A workspace of its own and `reset`: no layout of an earlier test comes back.
        workspace = f"test-{secrets.token_hex(4)}"
        self.page.goto(f"{lab.url}/lab/workspaces/{workspace}/tree/{path}?reset&token={lab.token}", wait_until="domcontentloaded")
        self.page.locator("#jupyterlab-splash").wait_for(state="detached", timeout=120_000)
        notebook = Notebook(self)
        notebook.wait_for_kernel()
        return notebook

    def pop_ups(self) -> list[str]:
        """Texts of the dialogs and notifications on the screen."""
        return self.page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts()

    def close(self):
        self.page.context.close()


# The notebook in front, as JupyterLab's own objects: its cells, and one cell by grade_id or cell id.
_CELLS = "const panel = window.jupyterapp.shell.currentWidget; const cells = [...panel.content.widgets];"
_CELL = _CELLS + """
    const index = cells.findIndex(c => c.model.getMetadata('nbgrader')?.grade_id === id || c.model.id === id);
    if (index < 0) throw new Error('no cell named ' + id); const cell = cells[index];"""


class Notebook:
    """The notebook in front of a tab."""

    def __init__(self, tab: Tab):
        self.tab, self.page = tab, tab.page

    def _ask(self, body: str, id: str | None = None):
        return self.page.evaluate(f"id => {{ {_CELLS if id is None else _CELL} {body} }}", id)

    # What is there

    def cells(self) -> list[str]:
        """The cells' names, in order: grade_id, or the cell id where there is none."""
        return self._ask("return cells.map(c => c.model.getMetadata('nbgrader')?.grade_id ?? c.model.id)")

    def source(self, id: str) -> str:
        return self._ask("return cell.model.sharedModel.getSource()", id)

    def outputs(self, id: str) -> list[dict]:
        """A cell's outputs, as they would be saved (nbformat)."""
        return self._ask("return cell.model.outputs.toJSON()", id)

    def html(self, id: str) -> str:
        """The text/html of a cell's outputs."""
        return "\n".join(_joined(o["data"]["text/html"]) for o in self.outputs(id) if "text/html" in o.get("data", {}))

    def text(self, id: str) -> str:
        """What a cell printed, and the text/plain of its outputs."""
        return "\n".join(_joined(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in self.outputs(id))

    def pictures(self, id: str) -> int:
        """How many pictures a cell shows, drawn to the end: in its own outputs or within their HTML."""
        images = self.cell(id).locator(".jp-OutputArea-output img, .jp-OutputArea-output svg, .jp-OutputArea-output canvas")
        for image in images.all():
            image.evaluate("e => e.decode ? e.decode() : null")
        return images.count()

    def errors(self) -> list[str]:
        """The errors that the notebook's cells show, each with its cell's name."""
        return self._ask("""return cells.filter(c => c.model.type === 'code').flatMap(c => c.model.outputs.toJSON()
            .filter(o => o.output_type === 'error')
            .map(o => `${c.model.getMetadata('nbgrader')?.grade_id ?? c.model.id}: ${o.ename}: ${o.evalue}`))""")

    def cell(self, id: str) -> Locator:
        """A cell on the page, scrolled into view, for Playwright: `notebook.cell("x").get_by_role("slider")`."""
        index = self._ask("return index", id)
        found = self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-Notebook .jp-Cell").nth(index)
        found.scroll_into_view_if_needed()
        return found

    def screenshot(self, id: str, path) -> Path:
        """A picture of a cell with its outputs, whole even if it is higher than the window."""
        cell = self.cell(id)
        height, window = cell.bounding_box()["height"], self.page.viewport_size
        if height > window["height"] - 200:
            self.page.set_viewport_size({**window, "height": int(height) + 300})
        self.settle()
        cell.screenshot(path=str(path), animations="disabled")
        self.page.set_viewport_size(window)
        return Path(path)

    # What a student does

    def set_source(self, id: str, text: str):
        """Put text in place of what a cell holds: select all in its editor, and paste."""
        editor = self.cell(id).locator(".cm-content").first
        editor.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(text)
        now = self.source(id)
        assert now == text, f"the editor of {id} holds\n{now}\ninstead of\n{text}"

    def run(self, id: str, timeout: float = 180) -> bool:
        """Run one cell and wait until it is done; False if it raised."""
        self._ask("panel.content.deselectAll(); panel.content.activeCellIndex = index; panel.content.mode = 'command'", id)
        return self._command("notebook:run-cell", timeout)

    def run_all(self, timeout: float = 600) -> bool:
        """Run > Run All Cells, and wait until the last is done; False if one raised."""
        return self._command("notebook:run-all-cells", timeout)

    def restart(self):
        """A new kernel, the notebook as it is."""
        self._ask("return panel.sessionContext.restartKernel()")
        self.wait_for_kernel()

    def shut_down(self):
        """No kernel any more; who opens the notebook again gets a new one."""
        self._ask("return panel.sessionContext.shutdown()")

    def save(self):
        self._command("docmanager:save", 60)

    def wait_for_kernel(self, timeout: float = 120):
        self.page.wait_for_function("""() => {
            const context = window.jupyterapp?.shell.currentWidget?.sessionContext, kernel = context?.session?.kernel;
            return context?.isReady && kernel?.connectionStatus === 'connected' && kernel.status === 'idle' }""",
            timeout=timeout * 1000, polling=50)

    def settle(self):
        """Wait until what was drawn is on the screen."""
        self.page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def _command(self, name: str, timeout: float) -> bool:
        # Commands that run cells are done when the cells are. The kernel's "idle" would not tell: it comes also
        # when a widget's message is handled while a cell is still running.
        self.page.evaluate("""name => {
            const state = window.labkit = { done: false };
            window.jupyterapp.commands.execute(name).then(
                result => { state.result = result !== false; state.done = true },
                error => { state.error = String(error); state.done = true }) }""", name)
        self.page.wait_for_function("() => window.labkit.done", timeout=timeout * 1000, polling=50)
        state = self.page.evaluate("() => window.labkit")
        if "error" in state:
            raise RuntimeError(f"{name}: {state['error']}")
        self.settle()
        return state["result"]


def _joined(text) -> str:
    return "".join(text) if isinstance(text, list) else text
