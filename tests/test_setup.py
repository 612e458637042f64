"""The set-up agrees with itself: pyproject.toml, requirements.lock, environment.yml, what is installed, the licences."""
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WANTED = [Requirement(text) for texts in [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()] for text in texts]

# conda-forge's names, where they are not PyPI's
CONDA_NAMES = {"torch": "pytorch-cpu", "matplotlib": "matplotlib-base", "dask": "dask-core"}

PYTHONS = ["3.11.0", "3.12.0", "3.13.0"]       # the oldest of each: Debian 12 has 3.11.2
SYSTEMS = {"linux": ("Linux", "posix"), "darwin": ("Darwin", "posix"), "win32": ("Windows", "nt")}

CONFIGURATION = ["requirements.lock", "environment.yml", "pyproject.toml", "Makefile", "postBuild", ".ci/run", "bin/make-env", "bin/lab"]


def lock() -> dict[str, Requirement]:
    lines = (line.split("#")[0].strip() for line in (REPOSITORY / "requirements.lock").read_text().splitlines())
    return {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line)}


def version(requirement: Requirement) -> str:
    (only,) = requirement.specifier
    assert only.operator == "==", f"{requirement} is no exact version"
    return only.version


def conda() -> tuple[dict[str, Requirement], dict[str, Requirement], list[str]]:
    """environment.yml: conda's packages, pip's packages, and pip's options."""
    entries = yaml.safe_load((REPOSITORY / "environment.yml").read_text())["dependencies"]
    (pip,) = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    named = [Requirement(entry) for entry in entries if isinstance(entry, str)]
    piped = [Requirement(entry) for entry in pip if not entry.startswith("-")]
    return {r.name: r for r in named}, {r.name: r for r in piped}, [entry for entry in pip if entry.startswith("-")]


def tracked() -> list[Path]:
    """The repository's files; in a copy without git, all but what is made."""
    if (REPOSITORY / ".git").exists() and shutil.which("git"):
        names = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
        files = [REPOSITORY / name for name in names.split("\0") if name]
    else:
        made = {".venv", ".git", "__pycache__", ".pytest_cache", ".hypothesis", ".ipynb_checkpoints", "graded", "course", "build"}
        files = [path for path in REPOSITORY.rglob("*") if not made & set(path.relative_to(REPOSITORY).parts)]
    return [path for path in files if path.is_file()]


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_lock_has_each_dependency_in_its_range(wanted):
    locked = lock()[canonicalize_name(wanted.name)]
    assert locked.marker is None, "a dependency of the course is wanted on every system"
    assert wanted.specifier.contains(version(locked))


def test_lock_is_exact_and_torch_has_no_local_suffix():
    for requirement in lock().values():
        assert version(requirement) and not requirement.extras and requirement.url is None
    assert version(lock()["torch"]) == "2.13.0"


def test_installed_is_what_is_locked():
    """In an environment made by other means than `make env` this says what differs."""
    different = {}
    for name, requirement in lock().items():
        if requirement.marker is None or requirement.marker.evaluate():
            try:
                installed = importlib.metadata.version(name).split("+")[0]       # torch's 2.13.0+cpu is 2.13.0
            except importlib.metadata.PackageNotFoundError:
                installed = None
            if installed != version(requirement):
                different[name] = (installed, version(requirement))
    assert different == {}, "installed and locked"


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_lock_is_complete(python, system):
    """What the locked packages require is locked too and in range, on every Python and system, and each allows that Python."""
    platform, os_name = SYSTEMS[system]
    environment = default_environment() | {
        "python_version": python.rpartition(".")[0], "python_full_version": python, "sys_platform": system,
        "platform_system": platform, "os_name": os_name, "extra": ""}
    here = {name: r for name, r in lock().items() if r.marker is None or r.marker.evaluate(environment)}
    faults = []
    for name in here:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            assert here[name].marker is not None       # another system's, not installed on this one
            continue
        if not SpecifierSet(distribution.metadata.get("Requires-Python") or "").contains(python):
            faults.append(f"{name} is not for Python {python}")
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker and not requirement.marker.evaluate(environment):
                continue
            other = canonicalize_name(requirement.name)
            if other.startswith(("nvidia-", "cuda-", "triton")):      # pinned by PyTorch's builds for GPUs themselves
                continue
            if other not in here:
                faults.append(f"{name} requires {requirement}, which is not locked")
            elif not requirement.specifier.contains(version(here[other])):
                faults.append(f"{name} requires {requirement}, locked is {here[other]}")
    assert faults == []


def test_conda_has_the_same_dependencies():
    """Every dependency of pyproject.toml, under conda's name or through pip, with the same range; and nothing else."""
    named, piped, options = conda()
    assert options == ["-e ."]
    expected = {CONDA_NAMES.get(r.name, r.name): r.specifier for r in WANTED}
    assert named.keys() & piped.keys() == set()
    given = {name: r.specifier for name, r in (named | piped).items()}
    python = given.pop("python")
    assert given.pop("pip") == SpecifierSet()
    assert given == expected
    assert not python.contains("3.10") and all(python.contains(p) for p in PYTHONS)
    assert PROJECT["requires-python"] == ">=3.11"


def test_licences():
    """Both licences are there, say what they are, and go with the packages."""
    assert PROJECT["license"] == "MIT AND CC-BY-4.0"
    assert set(PROJECT["license-files"]) == {path.name for path in REPOSITORY.glob("LICENSE*")} == {"LICENSE", "LICENSE-CC-BY-4.0"}
    assert (REPOSITORY / "LICENSE").read_text().startswith("MIT License")
    texts = (REPOSITORY / "LICENSE-CC-BY-4.0").read_text()
    assert "CC-BY-4.0" in texts and "creativecommons.org/licenses/by/4.0/legalcode" in texts


def test_no_file_names_a_package_index():
    """Where packages come from is the machine's business (its own pip settings, PIP_ARGS)."""
    index = re.compile(r"(pypi|pythonhosted|npmjs|anaconda|download\.pytorch)\.(org|com)", re.IGNORECASE)
    assert [str(path) for path in tracked() if index.search(path.read_text(errors="ignore"))] == []


@pytest.mark.parametrize("name", CONFIGURATION)
def test_configuration_has_no_address_and_no_hash(name):
    text = (REPOSITORY / name).read_text()
    assert "://" not in text
    assert not re.search(r"--hash|sha256|--(extra-)?index-url|--find-links|--trusted-host", text)


def test_no_skips_means_none(tmp_path):
    """--no-skips, which make test uses: skipped or expected to fail, in a test or a whole module, is a failure."""
    shutil.copy(REPOSITORY / "conftest.py", tmp_path)
    (tmp_path / "test_some.py").write_text("""import pytest
def test_fine(): pass
def test_skips(): pytest.skip("no browser")
@pytest.mark.skip
def test_marked(): pass
@pytest.mark.xfail
def test_expected(): assert False
@pytest.mark.xfail(strict=False)
def test_unexpected(): pass
""")
    (tmp_path / "test_module.py").write_text('import pytest\npytest.importorskip("no_such_module")\ndef test_never(): pass\n')

    def run(*options):
        done = subprocess.run([sys.executable, "-m", "pytest", "--rootdir=.", "-p", "no:cacheprovider", *options], cwd=tmp_path,
                              capture_output=True, text=True)
        return done.returncode, done.stdout.splitlines()[-1].strip("= ").split(" in ")[0]

    assert run() == (0, "1 passed, 3 skipped, 1 xfailed, 1 xpassed")
    assert run("--no-skips", "test_some.py") == (1, "3 failed, 1 passed, 1 error")
    assert run("--no-skips", "test_module.py") == (2, "1 error")


# make env, with a stand-in for Python and pip

# A make that runs these tests has told its children things that are not meant for a make of their own.
OUTSIDE_MAKE = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}


def make_env(folder, python):
    for name in ("Makefile", "requirements.lock", "pyproject.toml", "bin/make-env"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, folder / name)
    return subprocess.run(["make", "env", f"PYTHON={python}"], cwd=folder, env=OUTSIDE_MAKE, capture_output=True, text=True)


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_make_env_names_the_python_it_needs(tmp_path):
    absent = make_env(tmp_path, tmp_path / "no-python")
    assert absent.returncode != 0 and "Install Python 3.11 or newer" in absent.stderr
    old = script(tmp_path / "old", 'case "$2" in *version_info*) exit 1;; esac; [ "$1" = -V ] && echo Python 3.9.2; exit 0')
    refused = make_env(tmp_path, old)
    assert refused.returncode != 0 and "needs Python 3.11 or newer, and" in refused.stderr and "Python 3.9.2" in refused.stderr
    bare = script(tmp_path / "bare", 'case "$2" in *ensurepip*) exit 1;; esac; exit 0')
    refused = make_env(tmp_path, bare)
    assert refused.returncode != 0 and "apt install python3-venv" in refused.stderr
    assert not (tmp_path / ".venv").exists()


def test_make_env_does_not_take_a_half_finished_environment_for_a_finished_one(tmp_path):
    """pip (here: a stand-in) fails the first time; the second run starts afresh, the third has nothing to do."""
    pip = script(tmp_path / "pip", 'if [ "$2" = pip ]; then echo "$@" >> pip.log; test -e works; fi')
    fake = script(tmp_path / "python", f'[ "$2" = venv ] || exec "{sys.executable}" "$@"\nmkdir -p .venv/bin; cp {pip} .venv/bin/python')
    cut = make_env(tmp_path, fake)
    assert cut.returncode != 0 and not (tmp_path / ".venv/flowkit-ready").exists()
    (tmp_path / "works").touch()
    (tmp_path / ".venv/left-over").touch()
    again = make_env(tmp_path, fake)
    assert again.returncode == 0 and "starting afresh" in again.stdout
    assert (tmp_path / ".venv/flowkit-ready").read_text().strip() == str(tmp_path) and not (tmp_path / ".venv/left-over").exists()
    calls = (tmp_path / "pip.log").read_text()
    assert "-r requirements.lock" in calls and "--no-deps --no-build-isolation -e ." in calls

    def third():
        return subprocess.run(["make", "env"], cwd=tmp_path, env=OUTSIDE_MAKE, capture_output=True, text=True, check=True)
    assert third().stdout == ""
    (tmp_path / "requirements.lock").write_text("six==1.17.0\n")
    assert "Installing" in third().stdout
