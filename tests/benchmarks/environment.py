"""What has to be there before anything can be measured: programs, packages, databases."""

import json
import os
import shutil
import subprocess
import sys
import venv
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
VENV = ROOT / ".venvs" / "bench"
PYTHON = VENV / "bin" / "python"

PEERS = ["granian", "gunicorn", "httptools", "uvicorn", "uvloop", "waitress", "whitenoise"]
#: It tells where the time goes in a load that falls short.
PROFILER = "py-spy"

#: Where programs are that are meant for root, and not in every user's PATH.
_SBIN = "/usr/local/sbin:/usr/sbin:/sbin"

#: The sizes in bytes of the static files that are asked for, by name.
STATIC_FILES = {"2k.css": 2 << 10, "20k.css": 20 << 10, "1m.css": 1 << 20}
NAMES = ["django-aioserve", "django", "aiohttp", "aiohttp-wsgi", *PEERS, "psycopg"]


class Missing(Exception):
    """Something that cannot be done without is not there; says how to get it."""


def find_program(name):
    """The path of a program; raises Missing, with the remedy, where there is none."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SBIN}")
    if found is None:
        raise Missing(f"{name} is not installed; {_REMEDIES[name]}")
    return found


_REMEDIES = {
    "wrk": "it makes the load, and nothing is measured without it: `apt-get install wrk` on "
    "Debian and Ubuntu, else see https://github.com/wg/wrk",
    "nginx": "it is the limit for static files: `apt-get install nginx-light` on Debian and Ubuntu",
}


def require_programs():
    """Raise Missing where this is no Linux or there is no wrk."""
    if sys.platform != "linux":
        raise Missing("The measurements read /proc: they need Linux.")
    find_program("wrk")


def install():
    """Make the environment with the package, editable, and its peers, unless it is there."""
    packages = [*PEERS, PROFILER, "psycopg[binary]>=3.2"]
    stamp = VENV / ".installed"
    wanted = "\n".join([(ROOT / "pyproject.toml").read_text(), *packages])
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"Installing the peers into {VENV.relative_to(ROOT)} ...", flush=True)
    venv.create(VENV, with_pip=True)
    pip = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    if subprocess.run([*pip, "--editable", str(ROOT), *packages], timeout=600).returncode != 0:
        raise Missing("The peers could not be installed; pip says above why.")
    stamp.write_text(wanted)


def versions():
    """What is compared: the version of each package and program, by name."""
    script = (
        "import json, sys, platform; from importlib.metadata import version; "
        "print(json.dumps({'Python': platform.python_version()} | "
        "{name: version(name) for name in sys.argv[1:]}))"
    )
    found = json.loads(_output([PYTHON, "-c", script, *NAMES]))
    found["wrk"] = _words([find_program("wrk"), "-v"], 1)
    with suppress(Missing):
        found["nginx"] = _words([find_program("nginx"), "-v"], 2).removeprefix("nginx/")
    return found


def variables(work, database_url):
    """The environment variables of everything that runs testproject."""
    ours = ("AIOSERVE_", "GRANIAN_", "GUNICORN_", "WEB_CONCURRENCY")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return kept | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'testproject'}",
        "DJANGO_SETTINGS_MODULE": "tests.benchmarks.settings",
        "DATABASE_URL": database_url,
        "DEBUG": "false",
        "ALLOWED_HOSTS": "*",
        "LOG_LEVEL": "ERROR",
        "MEDIA_ROOT": str(work / "media"),
        "STATIC_ROOT": str(work / "static"),
    }


def prepare_project(env, *, static=False):
    """Migrate and seed the database that `env` names."""
    commands = [["migrate", "--verbosity=0"], ["seed"]]
    if static:
        commands.append(["collectstatic", "--no-input", "--verbosity=0"])
    for command in commands:
        manage = [PYTHON, ROOT / "testproject" / "manage.py", *command]
        subprocess.run(manage, env=env, check=True, stdout=subprocess.DEVNULL, timeout=120)
    if static:
        directory = Path(env["STATIC_ROOT"]) / "bench"
        directory.mkdir()
        for name, size in STATIC_FILES.items():
            (directory / name).write_bytes(b"x" * size)


_DATABASE = """
import sys, psycopg
from psycopg import sql
with psycopg.connect(sys.argv[1], dbname="postgres", autocommit=True, connect_timeout=3) as server:
    name = sql.Identifier(sys.argv[2])
    server.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))
    if sys.argv[3:]:
        server.execute(sql.SQL("CREATE DATABASE {}").format(name))
        print(server.info.parameter_status("server_version"))
"""


@contextmanager
def postgres(url):
    """A database of our own for the time of the block: its URL, and the server's version.

    Raises Missing where `url` leads to no server that lets us create one.
    """
    if urlsplit(url).hostname not in {"127.0.0.1", "localhost", "::1"}:
        raise Missing("only a PostgreSQL server on this machine is measured")
    name = f"aioserve_bench_{os.getpid()}"
    act = [PYTHON, "-c", _DATABASE, url, name]
    made = subprocess.run([*act, "create"], capture_output=True, text=True, timeout=30)
    if made.returncode != 0:
        lines = made.stderr.strip().splitlines() or ["psycopg failed"]
        raise Missing(f"no PostgreSQL at {url}: {lines[-1]}")
    try:
        yield f"{url.rstrip('/')}/{name}", made.stdout.strip()
    finally:
        subprocess.run(act, capture_output=True, timeout=30)


def _output(command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def _words(command, index):
    words = _output(command).split()
    return words[index] if len(words) > index else "unknown"
