"""System checks of the settings.

The ids are stable: E001 unknown name, E002 wrong value, E003 contradiction, E004 a
setting of Gunicorn's; E005 what this machine lacks, W001 DEBUG at a public address, W002
no ALLOWED_HOSTS, W003 everybody trusted as a proxy. Those from 10 on are told where they
are found: `django_aioserve.routes.check`, `django_aioserve.static.check`.

What depends on where it runs is checked with ``--deploy``, and at each start of
``runaio``: ``migrate`` in a build container must not need the certificate.
"""

from __future__ import annotations

import ipaddress
import sys
from typing import TYPE_CHECKING, Any

from django.core import checks

from django_aioserve import conf
from django_aioserve.exceptions import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django_aioserve.conf import Config
    from django_aioserve.exceptions import Problem

__all__ = ["check_deployment", "check_settings", "exposure", "register"]

HINTS = {
    "E001": "Remove it, or correct its name; `manage.py runaio --help` lists all options.",
    "E002": "`manage.py runaio --help` shows each option with its default.",
    "E003": "`manage.py runaio --print-config` shows where each value comes from.",
    "E004": "AIOSERVE_GUNICORN takes what no AIOSERVE_ option covers, by Gunicorn's name.",
    "E005": "`manage.py runaio --check-config` looks again.",
}


def register() -> None:
    """Register the checks with Django."""
    checks.register(check_settings, checks.Tags.compatibility)
    checks.register(check_deployment, checks.Tags.security, deploy=True)


def check_settings(**_: Any) -> list[checks.CheckMessage]:
    """Check what holds on every machine: names, values, contradictions, what is named."""
    from django_aioserve import groups, routes, static

    try:
        config = conf.resolve()
    except ConfigurationError as error:
        return _errors(error.problems)
    found = [
        *_errors(_import_problems(config)),
        *_errors(groups.check(config)),
        *routes.check(config),
        *(message for message in static.check(config) if message.is_serious()),
    ]
    if sys.platform != "win32":  # Gunicorn cannot even be imported there
        found += _gunicorn(config)
    return found


def _gunicorn(config: Config) -> list[checks.CheckMessage]:
    try:
        from django_aioserve.server.launcher import gunicorn_problems

        return _errors(gunicorn_problems(config))
    except ValueError as error:  # it reads them when it is imported, whether they count or not
        names = "WEB_CONCURRENCY, PORT or FORWARDED_ALLOW_IPS"
        return [
            checks.Error(
                f"{names} (environment) is not what Gunicorn expects of it: {error}.",
                hint="Correct or unset it; the options of runaio do not depend on it.",
                id="aioserve.E004",
            )
        ]


def _import_problems(config: Config) -> Iterator[Problem]:
    """Find what is named and not there, of what no other module looks for."""
    if not config.recycle_when:
        return
    try:
        found = config.imported("recycle_when", config.recycle_when)
    except ImportError as error:
        expected = f"the dotted path of a function of a Sample; {error}"
        yield config.problem("recycle_when", expected, id="E002")
        return
    if not conf.can_be_called(found, 1):
        expected = f"the dotted path of a function of a Sample, not {found!r}"
        yield config.problem("recycle_when", expected, id="E002")


def check_deployment(**_: Any) -> list[checks.CheckMessage]:
    """Check what holds where the server runs: files, libraries, who can reach it."""
    if sys.platform == "win32":
        return []
    try:
        config = conf.resolve()
    except ConfigurationError:
        return []  # check_settings tells
    from django_aioserve import static
    from django_aioserve.server.machine import machine_problems

    return [
        *_errors(machine_problems(config)),
        *exposure(config),
        *(message for message in static.check(config) if not message.is_serious()),
    ]


def exposure(config: Config) -> Iterator[checks.CheckMessage]:
    """Give the warnings of what should not be reached by everybody."""
    from django.conf import settings

    public = [address for address in config.bind if _is_public(address)]
    if settings.DEBUG and public:
        yield checks.Warning(
            f"DEBUG is on, and {public[0]} is not an address of this machine alone.",
            hint="Set DEBUG = False, or listen on 127.0.0.1 or a Unix socket.",
            id="aioserve.W001",
        )
    if not settings.DEBUG and not settings.ALLOWED_HOSTS:
        yield checks.Warning(
            "ALLOWED_HOSTS is empty while DEBUG is off: every request will be answered with 400.",
            hint="Name the hosts that this project serves.",
            id="aioserve.W002",
        )
    if public and "*" in config.forwarded_allow_ips:
        source = config.source("forwarded_allow_ips")
        yield checks.Warning(
            f'{source.name} ({source}) is "*", and {public[0]} is not an address of this machine '
            "alone: everybody can claim any client address and HTTPS.",
            hint="Name the proxy's address or network.",
            id="aioserve.W003",
        )


def _is_public(text: str) -> bool:
    address = conf.parse_bind(text)
    if not isinstance(address, tuple):
        return False  # a Unix socket; a descriptor is somebody else's to judge
    host = address[0]
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host != "localhost"


def _errors(problems: Iterable[Problem]) -> list[checks.CheckMessage]:
    return [
        checks.Error(str(problem), hint=HINTS[problem.id], id=f"aioserve.{problem.id}")
        for problem in problems
    ]
