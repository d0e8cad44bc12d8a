"""The documentation says what the code does."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib

import pytest

from django_aioserve.conf import OPTIONS
from django_aioserve.management.commands.runaio import Command
from tests.support import ROOT

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
CHECKS = DOCS / "reference" / "checks.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

#: Flags in the documentation that are those of another program.
FOREIGN_FLAGS = {"--deploy", "--draw"}


def _name(page):
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=_name)


def _settings_page():
    spec = importlib.util.spec_from_file_location("settings_page", DOCS / "settings_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _runaio_flags():
    return set(Command().create_parser("manage.py", "runaio")._option_string_actions)


# --- settings ---------------------------------------------------------------------------------


def test_the_reference_has_exactly_the_options_of_the_table():
    rendered = _settings_page().reference()
    assert re.findall(r"^### `(AIOSERVE_\w+)`", rendered, re.MULTILINE) == [
        option.setting for option in OPTIONS.values()
    ]


def test_the_reference_has_the_defaults_of_the_table():
    rendered = _settings_page().reference()
    shown = dict(
        re.findall(
            r"^### `(AIOSERVE_\w+)`.*?^- Default: (.*?)$", rendered, re.MULTILINE | re.DOTALL
        )
    )
    assert shown == {
        option.setting: f"`{option.default_text}`"
        if option.default_text not in {"", "{}"}
        else "none"
        for option in OPTIONS.values()
    }


def test_the_page_of_settings_gets_the_reference():
    module = _settings_page()
    page = (DOCS / "reference" / "settings.md").read_text()
    assert module.reference() in module.on_page_markdown(page)


@every_page
def test_each_setting_that_is_named_exists(page):
    named = set(re.findall(r"\bAIOSERVE_[A-Z_]*[A-Z]\b", page.read_text()))
    assert named - {option.setting for option in OPTIONS.values()} == set()


# --- flags ------------------------------------------------------------------------------------


def _flags_shown(text):
    """The flags of ``runaio`` in commands and in text; mistakes that are shown do not count."""
    text = re.sub(r"\\\n\s*", " ", text)
    text = re.sub(r"^.*\n.*did you mean.*$", "", text, flags=re.MULTILINE)
    for command in re.findall(r"\brunaio\b([^\n`]*)", text):
        yield from re.findall(r"(?<!\S)(--[a-z][a-z-]*)", command.partition("#")[0])
    # In tables that compare, other programs' flags stand in the first column.
    text = re.sub(r"^\|[^|]*\|", "", FENCED.sub("", text), flags=re.MULTILINE)
    yield from re.findall(r"`(--[a-z][a-z-]*)", text)


@every_page
def test_each_flag_that_is_shown_exists(page):
    assert set(_flags_shown(page.read_text())) - _runaio_flags() - FOREIGN_FLAGS == set()


# --- checks -----------------------------------------------------------------------------------


def test_the_checks_of_the_code_are_those_of_the_page():
    code = "".join(path.read_text() for path in (ROOT / "django_aioserve").rglob("*.py"))
    in_code = set(re.findall(r"""["'](?:aioserve\.)?([EW]\d{3})["']""", code))
    on_page = re.findall(r"^\| `aioserve\.([EW]\d{3})` \|", CHECKS.read_text(), re.MULTILINE)
    assert sorted(on_page) == sorted(in_code)


# --- pages ------------------------------------------------------------------------------------


@every_page
def test_relative_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text())
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [
        link
        for link in links
        if link.partition("#")[0] and not (page.parent / link.partition("#")[0]).exists()
    ]
    assert missing == []


@every_page
def test_python_in_the_pages_compiles(page):
    for language, code in FENCED.findall(page.read_text()):
        if language == "python":
            ast.parse(code, filename=str(page))


def test_the_public_names_exist():
    text = (DOCS / "reference" / "api.md").read_text()
    sections = re.findall(
        r"^## (django_aioserve[\w.]*)\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL
    )
    missing = [
        f"{module}.{name}"
        for module, section in sections
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`(?:await |@)?(\w+)", row)
        if not hasattr(importlib.import_module(module), name)
    ]
    assert missing == []


def test_the_versions_in_the_readme_are_those_of_the_package():
    readme = (ROOT / "README.md").read_text()
    for name, classifier in (
        ("Python", "Programming Language :: Python"),
        ("Django", "Framework :: Django"),
    ):
        row = re.search(rf"^\| {name} \| (.*) \|$", readme, re.MULTILINE)[1]
        declared = [
            entry.rpartition(" ")[2]
            for entry in PROJECT["classifiers"]
            if re.fullmatch(rf"{classifier} :: \d+\.\d+", entry)
        ]
        assert row.split(", ") == declared


def test_the_changelog_has_the_current_version():
    assert f"\n## {PROJECT['version']} (" in (ROOT / "CHANGELOG.md").read_text()


def test_the_documentation_builds_strictly(tmp_path):
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")
    page = (tmp_path / "reference" / "settings" / "index.html").read_text()
    assert 'id="max_requests"' in page
