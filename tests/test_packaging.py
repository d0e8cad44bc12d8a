"""The wheel, what an import does, and which layer may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT, clean_environment

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PACKAGE = ROOT / "django_aioserve"

#: From the lowest layer to the highest. A module imports from its own layer and from those
#: before it; a name that ends with a dot stands for the modules below it.
LAYERS = [
    ["exceptions", "conf", "signals"],
    ["server.recycling"],
    ["server.scoreboard"],
    ["keys", "bridge."],
    [
        "routes",
        "static",
        "state",
        "auth",
        "websocket",
        "native",
        "groups",
        "groups.",
        "application",
        "testing",
        "pytest_plugin",
    ],
    ["server."],
    ["checks", "apps", "management.", "__main__"],
]


def module_name(path: Path) -> str:
    """The name within the package: `conf`, `server.worker`, and an empty one for the package."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def layer(module: str) -> int:
    """The number of the module's layer; the most exact entry decides."""
    for exact in (True, False):
        for number, names in enumerate(LAYERS):
            for name in names:
                if module == name if exact else f"{module}.".startswith(name) and name[-1] == ".":
                    return number
    raise AssertionError(f"{module} is in no layer")


def imports(path: Path) -> Iterator[str]:
    """Full names of all that the file imports, also inside functions and for types only."""
    package = ["django_aioserve", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import module` imports the module, any other name its holder.
                yield f"{source}.{alias.name}"


def own_module(imported: str) -> str | None:
    """The module of this package that `imported` lies in, or None for anything else."""
    package, _, name = imported.partition(".")
    if package != "django_aioserve":
        return None
    known = modules()
    while name not in known:
        name = name.rpartition(".")[0]
    return name


# --- the wheel ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    directory = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(directory / done.stdout.split()[-1]) as file:
        yield file


def test_wheel_holds_every_module_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {str(path.relative_to(ROOT)) for path in modules().values()}
    python = {name for name in wheel.namelist() if name.endswith(".py")}
    assert python == expected
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    assert tops == {"django_aioserve", "django_aioserve-0.1.0.dist-info"}


def test_wheel_tells_type_checkers_that_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert "django_aioserve/py.typed" in wheel.namelist()


def test_wheel_holds_the_management_command(wheel: zipfile.ZipFile) -> None:
    assert "django_aioserve/management/commands/runaio.py" in wheel.namelist()


def test_wheel_carries_its_licence(wheel: zipfile.ZipFile) -> None:
    assert "django_aioserve-0.1.0.dist-info/licenses/LICENSE" in wheel.namelist()


# --- importing ----------------------------------------------------------------------------

#: Run in a fresh interpreter: whatever asks for the environment or for settings is reported.
NO_EFFECTS = """
import importlib, logging, os, signal, sys, threading
import aiohttp_wsgi, django.conf, django.core.management.base, environ, greenlet, gunicorn.app.base
import gunicorn.config, gunicorn.arbiter, aiohttp.web, aiohttp.worker, asgiref.sync, django.test
try:
    import uvloop
except ImportError:
    pass
from asyncio import events

asked = []
def watch(cls, name):
    original = getattr(cls, name)
    def method(self, *args, **kwargs):
        # What another package asks for when it is first imported is its own affair.
        frame = sys._getframe(1)
        names = ("django_aioserve", "importlib")
        while frame and not frame.f_globals["__name__"].startswith(names):
            frame = frame.f_back
        if frame and frame.f_globals["__name__"].startswith("django_aioserve"):
            asked.append((name, args, frame.f_lineno))
        return original(self, *args, **kwargs)
    setattr(cls, name, method)

def state():
    return (
        {number: signal.getsignal(number) for number in signal.valid_signals()},
        threading.active_count(), list(logging.root.handlers), dict(os.environ),
    )

before = state()
watch(type(os.environ), "__getitem__")
watch(django.conf.LazySettings, "__getattr__")
for module in sys.argv[1:]:
    importlib.import_module(module)
    if asked:
        sys.exit(f"{module} asks at import: {asked}")
    if django.conf.settings.configured:
        sys.exit(f"{module} loads the settings")
    if events._event_loop_policy is not None:
        sys.exit(f"{module} touches the event loop policy")
    if state() != before:
        sys.exit(f"{module} changes {before} into {state()}")
"""


def test_importing_any_module_has_no_effects() -> None:
    names = [f"django_aioserve.{name}".rstrip(".") for name in modules() if name != "__main__"]
    done = subprocess.run(
        [sys.executable, "-c", NO_EFFECTS, *names],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr


# --- layers -------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [name for name in modules() if name])
def test_module_imports_only_from_its_own_layer_and_those_below(module: str) -> None:
    above = {
        used
        for imported in imports(modules()[module])
        if (used := own_module(imported)) and layer(used) > layer(module)
    }
    assert above == set()


def test_only_the_server_imports_gunicorn() -> None:
    importers = {
        module
        for module, path in modules().items()
        if any(name.partition(".")[0] == "gunicorn" for name in imports(path))
    }
    assert importers <= {"server.worker", "server.arbiter", "server.launcher"}


def test_configuration_needs_only_the_standard_library_environ_and_django_settings() -> None:
    foreign = {
        name
        for module in ("conf", "exceptions")
        for name in imports(modules()[module])
        if name.partition(".")[0] not in {*sys.stdlib_module_names, "environ", "django_aioserve"}
    }
    assert foreign <= {"django.conf.settings"}
