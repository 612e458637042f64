"""For every pytest run, the tests' and nbval's alike: fast mode, no windows, an IPython of its own, `--no-skips`, and which
tests share a process when several run side by side (`-n 2`, as make test has it)."""
import os
import signal
import tempfile

import matplotlib
import pytest

os.environ.setdefault("FLOWKIT_FAST", "1")
# Not by MPLBACKEND: the notebooks' kernels would inherit that, and show no pictures.
matplotlib.use("Agg")


def pytest_configure(config):
    # What is started in the background is told to ignore an interrupt, and would tell its children; some tests send one.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # The kernels that tests start shall not run the user's own start-up files, nor write into the user's history.
    profile = tempfile.TemporaryDirectory(prefix="flowkit-ipython-")
    config.add_cleanup(profile.cleanup)
    os.environ["IPYTHONDIR"] = profile.name


def pytest_addoption(parser):
    parser.addoption("--no-skips", action="store_true",
                     help="a test that is skipped, or that is expected to fail, fails")


# What takes longest comes first, so that no process is left alone with it at the end.
LONG = ("tests/autograder/test_grade.py", "browser", "audit")


def _unit(nodeid):
    """The tests that share what is expensive: a browser, the bank of an exercise's mistakes, a notebook's kernel, a module's fixtures."""
    path, _, name = nodeid.partition("::")
    given = name.partition("[")[2].rstrip("]").split("-")
    if path.startswith("tests/browser/"):
        return "browser"
    if path == "tests/autograder/test_build.py" and given != [""]:
        return ("audit " if "audit" in name else "lesson ") + given[-1]
    if path == "tests/autograder/test_checks.py" and given != [""]:
        return "checks " + next(part for part in given if not part.isdecimal())
    return path


def pytest_collection_modifyitems(items):
    def rank(item):
        unit = _unit(item.nodeid)
        return next((i for i, long in enumerate(LONG) if unit.startswith(long)), len(LONG))
    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByUnit(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _unit(nodeid)
    return ByUnit(config, log)


def _forbid(config, report):
    """Turn the report of a test that did not run to a clean pass into a failure."""
    if not config.getoption("--no-skips"):
        return
    if report.skipped or hasattr(report, "wasxfail"):
        kind = "expected to fail" if hasattr(report, "wasxfail") else "skipped"
        reason = getattr(report, "wasxfail", None) or (
            report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{kind}, and this run allows none of that (--no-skips): {reason}"
        if hasattr(report, "wasxfail"):
            del report.wasxfail


# Outermost, so that pytest's own handling of skip and xfail has had its say.
@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item, call):
    report = yield
    _forbid(item.config, report)
    return report


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector):
    report = yield
    _forbid(collector.config, report)
    return report
