"""``manage.py runaio``: serve this project."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import os
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import connections

from django_aioserve import checks, conf
from django_aioserve.exceptions import ConfigurationError, Problem

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.core.checks import CheckMessage

    from django_aioserve.conf import Config, Flags, Option


class Command(BaseCommand):
    """Serves this project by aiohttp, in Gunicorn's workers.

    Every option of ``conf.OPTIONS`` is a flag. A mistake ends with one line for each, and
    exit status 1.
    """

    help = (
        "Serves this project by aiohttp in worker processes that Gunicorn keeps alive. Each option "
        "is also a Django setting and an environment variable, both by the name in brackets."
    )

    def create_parser(self, prog_name: str, subcommand: str, **kwargs: Any) -> CommandParser:
        """Make the parser; its errors are one line that suggests the flag that was meant."""
        parser = super().create_parser(
            prog_name,
            subcommand,
            usage="%(prog)s [[ADDRESS:]PORT] [options]",
            epilog="A size is in bytes or has a unit: 512K, 512M, 2G. A duration is in seconds or "
            "has a unit: 500ms, 90s, 15m, 1h. Commas separate several values of one option.",
            allow_abbrev=False,
            **kwargs,
        )

        def error(message: str) -> NoReturn:
            word = message.removeprefix("unrecognized arguments: ").split("=")[0].split()[0]
            near = difflib.get_close_matches(word, parser._option_string_actions, 1)  # noqa: SLF001
            if word.startswith("-") and near:
                message += f"; did you mean {near[0]}?"
            if getattr(self, "_called_from_command_line", False):
                parser.exit(2, f"{parser.prog}: {message}\n")
            raise CommandError(message)

        parser.error = error  # type: ignore[method-assign]
        return parser

    def add_arguments(self, parser: CommandParser) -> None:
        """Make a flag of each option."""
        parser.add_argument(
            "address",
            nargs="?",
            metavar="[ADDRESS:]PORT",
            help="Address to listen on, as runserver takes it; also unix:PATH and fd://N.",
        )
        parser.add_argument(
            "--print-config",
            nargs="?",
            const="text",
            choices=("text", "json"),
            help="Print each option with its value and where that came from, and exit.",
        )
        parser.add_argument(
            "--check-config",
            action="store_true",
            help="Check what a start would check, but for what a server that runs already holds "
            "(addresses, pidfile); import the application, and exit.",
        )
        groups: dict[str, Any] = {}
        for option in conf.OPTIONS.values():
            if option.flag:
                if option.group not in groups:
                    groups[option.group] = parser.add_argument_group(option.group)
                _add_flag(groups[option.group], option)

    def execute(self, *args: Any, **options: Any) -> str | None:
        """Resolve the options, so that Django's checks, which come first, know the flags."""
        if sys.platform == "win32":
            raise CommandError("runaio needs Linux, macOS or another Unix; use WSL on Windows.")
        for name in ("stdout", "stderr"):
            if (
                getattr(sys, name) is None
            ):  # closed: a warning must not keep the server from starting
                options.setdefault(name, io.StringIO())
        conf.set_flags(_flags(options))
        try:
            # What is wrong with them is said in one line each, where Django's checks make a page.
            _resolve()
            if options["print_config"]:
                options["skip_checks"] = True
            else:
                with _in_one_line("The system checks"):
                    messages = checks.check_settings()
                _raise(messages)
            return super().execute(*args, **options)
        except KeyboardInterrupt:
            if getattr(self, "_called_from_command_line", False):
                sys.exit(130)
            raise
        finally:
            conf.set_flags({})

    def check(self, *args: Any, **kwargs: Any) -> None:
        """Run Django's checks; these import the URLs, the models and the database's engine."""
        with _in_one_line("The system checks"):
            super().check(*args, **kwargs)

    def handle(self, *_: Any, **options: Any) -> None:
        """Print, check, or serve."""
        from django_aioserve.server.launcher import is_there, launch

        config = _resolve()
        if options["print_config"]:
            self._print(config, options["print_config"])
            return
        messages = checks.check_deployment()
        _raise(messages)
        for message in messages:
            if not message.is_silenced():
                text = f"WARNING: {message.msg} {message.hint} ({message.id})"
                self.stderr.write(text, self.style.WARNING)
        application = _application_path(config)
        if options["check_config"] or not is_there(application):
            self._check(config, application)
        if options["check_config"]:
            self.stdout.write("No mistakes were found.")
            return
        if "DJANGO_SETTINGS_MODULE" not in os.environ:
            raise CommandError("DJANGO_SETTINGS_MODULE is not set; the workers need it.")
        connections.close_all()
        try:
            launch(config, _flags(options), application)
        except ConfigurationError as error:
            raise CommandError(error) from error

    def _print(self, config: Config, form: str) -> None:
        if form == "json":
            self.stdout.write(json.dumps(config.dump(), indent=2, default=repr))
            return
        for option in conf.OPTIONS.values():
            source = config.source(option.name)
            value = option.kind.show(getattr(config, option.name))
            value = re.sub(r"://\S*@", "://***@", value)  # this is what people paste
            name = "" if source.kind == "default" else f" {source.name}"
            self.stdout.write(f"{option.name:<24}{value:<28}  {source}{name}".rstrip())

    def _check(self, config: Config, application: str) -> None:
        from django_aioserve.server.launcher import load_application

        setting = f"{config.interface.upper()}_APPLICATION (Django settings)"
        with _in_one_line(f'{setting} is "{application}"; its import'):
            try:
                load_application(config.interface, application)
            except ConfigurationError as error:
                raise CommandError(error) from error


def _add_flag(group: Any, option: Option) -> None:
    default = option.default_text or "none"
    text = f"{option.help} Default: {default}. [{option.setting}]".replace("%", "%%")
    if isinstance(option.kind, conf.Boolean):
        group.add_argument(
            option.flag_name, dest=option.name, action="store_const", const="true", help=text
        )
        group.add_argument(
            option.flag_name.replace("--", "--no-"),
            dest=option.name,
            action="store_const",
            const="false",
            help=f"The opposite of {option.flag_name}.",
        )
    elif option.name == "bind":
        group.add_argument(
            option.flag_name, action="append", metavar=option.kind.metavar, help=text
        )
    else:
        group.add_argument(option.flag_name, metavar=option.kind.metavar, help=text)


def _flags(options: dict[str, Any]) -> Flags:
    """Take from what the parser gave what was said on the command line."""
    flags: dict[str, str | list[str]] = {
        option.name: options[option.name]
        for option in conf.OPTIONS.values()
        if option.flag and options.get(option.name) is not None
    }
    if options.get("address"):
        flags["bind"] = [options["address"], *flags.get("bind", [])]
    return flags


def _resolve() -> Config:
    try:
        return conf.resolve()
    except ConfigurationError as error:
        raise CommandError(error) from error


def _raise(messages: list[CheckMessage]) -> None:
    """Raise what would keep the server from starting; silenced or not, it does not start."""
    lines = [str(message.msg) for message in messages if message.is_serious()]
    if lines:
        raise CommandError("\n".join(lines))


@contextlib.contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Turn what the project's code raises into one line; ``--traceback`` shows the rest."""
    try:
        yield
    except CommandError:
        raise
    except (Exception, SystemExit) as error:
        notes = getattr(error, "__notes__", [])
        said = " ".join("; ".join([str(error), *notes]).split()).rstrip(".")
        text = f"{what} raised {type(error).__name__}: {said}"
        raise CommandError(f"{text}{_place(error)}. --traceback shows more.") from error


def _place(error: BaseException) -> str:
    """Name the last line of the project's own code that led to ``error``, if there is one."""
    others = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    others += [str(Path(__file__).parents[2]), "<"]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(tuple(others))
    ]
    return f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""


def _application_path(config: Config) -> str:
    from django.conf import settings

    name = f"{config.interface.upper()}_APPLICATION"
    path = getattr(settings, name, None) or ""
    if isinstance(path, str):
        return path
    raise CommandError(str(Problem(name, "Django settings", path, "a dotted path")))
