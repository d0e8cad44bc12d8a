"""The settings table: kinds, precedence, provenance, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.test import override_settings

from django_aioserve import conf
from django_aioserve.conf import OPTIONS, Config, Source
from django_aioserve.exceptions import ConfigurationError, Problem


def resolve(
    flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None, **settings: Any
) -> Config:
    return conf.resolve(
        flags or {}, settings=SimpleNamespace(**settings), environment=environment or {}
    )


def problems(*args: Any, **kwargs: Any) -> list[Problem]:
    with pytest.raises(ConfigurationError) as caught:
        resolve(*args, **kwargs)
    return list(caught.value.problems)


# --- precedence -------------------------------------------------------------------------------

#: option, and what is written and meant as Django setting, in the environment, as a flag.
SOURCES = [
    ("workers", (2, 2), ("3", 3), ("4", 4)),
    ("keepalive", ("15m", 900.0), ("250ms", 0.25), ("90", 90.0)),
    ("max_body_size", (512, 512), ("512K", 512 << 10), ("1.5G", 3 << 29)),
    ("preload", (True, True), ("yes", True), ("false", False)),
    ("log_level", ("debug", "debug"), ("ERROR", "error"), ("warning", "warning")),
    ("bind", ([8001], ("8001",)), ("8002,unix:/x", ("8002", "unix:/x")), (["8003"], ("8003",))),
    ("access_log", (True, "-"), ("off", ""), ("/var/log/access", "/var/log/access")),
    ("pidfile", (Path("/run/a"), "/run/a"), ("/run/b", "/run/b"), ("/run/c", "/run/c")),
    ("routes", (["a.b"], ("a.b",)), ("a.c, a.d", ("a.c", "a.d")), ("a.e", ("a.e",))),
]


@pytest.mark.parametrize(
    ("name", "setting", "variable", "flag"), SOURCES, ids=[row[0] for row in SOURCES]
)
def test_flag_before_environment_before_setting_before_default(
    name: str, setting: tuple[Any, Any], variable: tuple[str, Any], flag: tuple[Any, Any]
) -> None:
    option = OPTIONS[name]
    settings = {option.setting: setting[0]}
    environment = {option.setting: variable[0]}
    found = [
        resolve({name: flag[0]}, environment, **settings),
        resolve({}, environment, **settings),
        resolve({}, {}, **settings),
        resolve(),
    ]
    assert [getattr(config, name) for config in found] == [
        flag[1],
        variable[1],
        setting[1],
        option.default,
    ]
    assert [config.source(name) for config in found] == [
        Source("flag", option.flag_name),
        Source("environment", option.setting),
        Source("setting", option.setting),
        Source("default", option.setting),
    ]


def test_a_repeated_flag_gives_all_its_values() -> None:
    assert resolve({"bind": ["8001", "unix:/x"]}).bind == ("8001", "unix:/x")


def test_settings_are_read_anew_each_time(django_ready: None) -> None:
    with override_settings(AIOSERVE_THREADS=3):
        assert conf.resolve().threads == 3
    assert conf.resolve().threads == 8


def test_the_environment_is_read_anew_each_time(
    django_ready: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIOSERVE_THREADS", "5")
    assert conf.resolve().threads == 5
    monkeypatch.delenv("AIOSERVE_THREADS")
    assert conf.resolve().threads == 8


def test_the_flags_of_the_process_count_where_none_are_given() -> None:
    conf.set_flags({"threads": "3"})
    try:
        assert conf.resolve(settings=SimpleNamespace(), environment={}).threads == 3
        assert resolve({}).threads == 8
    finally:
        conf.set_flags({})


def test_an_environment_variable_may_refer_to_another() -> None:
    environment = {"AIOSERVE_WORKERS": "$WEB_CONCURRENCY", "WEB_CONCURRENCY": "3"}
    assert resolve({}, environment).workers == 3


def test_an_environment_variable_that_refers_to_nothing_is_a_problem() -> None:
    (problem,) = problems({}, {"AIOSERVE_GROUPS_URL": "$REDIS_URL"})
    assert (problem.where, problem.value) == ("AIOSERVE_GROUPS_URL", "$REDIS_URL")


# --- kinds ------------------------------------------------------------------------------------

GOOD = [
    ("workers", " 12 ", 12),
    ("backlog", 65535, 65535),
    ("keepalive", 0.5, 0.5),
    ("keepalive", "0", 0.0),
    ("keepalive", "1.5m", 90.0),
    ("keepalive", "1h", 3600.0),
    ("keepalive", "2 d", 172800.0),
    ("websocket_max_size", "0", 0),
    (
        "websocket_origins",
        "*,https://a.example,app://localhost:8080",
        ("*", "https://a.example", "app://localhost:8080"),
    ),
    ("websocket_origins", ["https://*.a.example/"], ("https://*.a.example/",)),
    ("max_body_size", "1k", 1024),
    ("max_body_size", "2MiB", 2 << 20),
    ("max_body_size", "3GB", 3 << 30),
    ("max_rss", "100%", conf.memory_limit()),
    ("max_rss", "64M", 64 << 20),
    ("preload", "On", True),
    ("preload", "0", False),
    ("access_log", "-", "-"),
    ("access_log", False, ""),
    ("access_log_format", "%(h)s %({x-id}i)s 100%%", "%(h)s %({x-id}i)s 100%%"),
    ("bind", 8000, ("8000",)),
    ("bind", "[::1]:0", ("[::1]:0",)),
    ("bind", ["unix:@name", "fd://3"], ("unix:@name", "fd://3")),
    ("forwarded_allow_ips", "10.0.0.0/8, unix", ("10.0.0.0/8", "unix")),
    ("forwarded_allow_ips", (), ()),
    ("recycle_when", os.path.join, f"{os.path.__name__}.join"),
    ("warmup", ["/", "/a?b=c"], ("/", "/a?b=c")),
    ("gunicorn", {"umask": 7}, {"umask": 7}),
    ("gunicorn", {"on_exit": os.getcwd}, {"on_exit": f"{os.name}.getcwd"}),
    ("gunicorn", {"errorlog": Path("/x")}, {"errorlog": "/x"}),
]


@pytest.mark.parametrize(("name", "value", "expected"), GOOD)
def test_a_good_value_has_one_form(name: str, value: Any, expected: Any) -> None:
    config = resolve(**{OPTIONS[name].setting: value})
    assert getattr(config, name) == expected
    assert type(getattr(config, name)) is type(expected)


BAD = [
    ("workers", "many"),
    ("workers", 0),
    ("workers", True),
    ("workers", 2.0),
    ("workers", "\N{ARABIC-INDIC DIGIT TWO}"),
    ("workers", None),
    ("threads", "-1"),
    ("backlog", 65536),
    ("keepalive", "soon"),
    ("keepalive", -1),
    ("keepalive", float("nan")),
    ("keepalive", float("inf")),
    ("keepalive", True),
    ("keepalive", "1 week"),
    ("graceful_timeout", 0),
    ("max_body_size", 0),
    ("max_body_size", "1.5"),
    ("websocket_origins", "a.example"),
    ("websocket_origins", ["https://"]),
    ("websocket_origins", ["https://a.example/b"]),
    ("websocket_origins", ["https://a.example:port"]),
    ("max_body_size", -1),
    ("max_body_size", "5 apples"),
    ("max_rss", "0%"),
    ("max_rss", "101%"),
    ("preload", "maybe"),
    ("preload", 1),
    ("preload", ""),
    ("loop", "trio"),
    ("loop", None),
    ("access_log", 3),
    ("access_log_format", "%(h)"),
    ("access_log_format", ""),
    ("bind", "localhost"),
    ("bind", "127.0.0.1:65536"),
    ("bind", "[::1:8000"),
    ("bind", "[127.0.0.1]:8000"),
    ("bind", "http://127.0.0.1:8000"),
    ("bind", "unix:"),
    ("bind", "fd://stdin"),
    ("bind", {"127.0.0.1": 8000}),
    ("bind", b"127.0.0.1:8000"),
    ("bind", []),
    ("pidfile", "a\0b"),
    ("pidfile", 3),
    ("forwarded_allow_ips", "proxy.example.com"),
    ("forwarded_allow_ips", "10.0.0.1/8"),
    ("routes", "routes"),
    ("routes", "a..b"),
    ("routes", [lambda app: None]),
    ("warmup", "health"),
    ("gunicorn", ["umask"]),
    ("gunicorn", {1: 2}),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_named_with_its_source_and_what_is_expected(name: str, value: Any) -> None:
    (problem,) = problems(**{OPTIONS[name].setting: value})
    assert problem.where == OPTIONS[name].setting
    assert problem.source == "Django settings"
    assert problem.id == ("E003" if value == [] else "E002")
    assert str(problem).startswith(f"{problem.where} (Django settings) is ")
    assert "; expected " in str(problem)
    assert "\n" not in str(problem)


def test_a_problem_names_the_flag_as_it_was_given() -> None:
    (problem,) = problems({"max_requests": "x"})
    assert str(problem) == (
        '--max-requests (command line) is "x"; expected a whole number of at least 0.'
    )


def test_all_problems_are_told_together() -> None:
    found = problems({"workers": "x"}, {"AIOSERVE_THREADS": "y"}, AIOSERVE_LOOP="z", AIOSERVE_X=1)
    assert {problem.where for problem in found} == {
        "--workers",
        "AIOSERVE_THREADS",
        "AIOSERVE_LOOP",
        "AIOSERVE_X",
    }


@pytest.mark.parametrize("option", OPTIONS.values(), ids=lambda option: option.name)
def test_a_default_is_of_its_kind_and_can_be_written_as_a_flag(option: conf.Option) -> None:
    assert option.kind.clean(option.default) == option.default
    if option.flag:
        assert option.kind.parse(option.default_text) == option.default


@pytest.mark.parametrize(
    ("name", "value"), [("keepalive", 1_500_000.0), ("keepalive", 0.001), ("max_rss", 3 << 29)]
)
def test_what_is_shown_can_be_given(name: str, value: Any) -> None:
    kind = OPTIONS[name].kind
    assert kind.parse(kind.show(value)) == value


# --- names ------------------------------------------------------------------------------------


def test_an_unknown_setting_is_an_error_that_suggests_the_nearest() -> None:
    (problem,) = problems(AIOSERVE_MAX_REQUEST=5)
    assert problem.id == "E001"
    assert str(problem) == (
        "AIOSERVE_MAX_REQUEST (Django settings) is 5; "
        "expected a known option; did you mean AIOSERVE_MAX_REQUESTS?"
    )


def test_an_unknown_environment_variable_is_an_error_that_suggests_the_nearest() -> None:
    (problem,) = problems({}, {"AIOSERVE_TREADS": "5"})
    assert (problem.id, problem.source) == ("E001", "environment")
    assert str(problem).endswith("did you mean AIOSERVE_THREADS?")


def test_a_name_that_is_near_to_none_gets_no_suggestion() -> None:
    (problem,) = problems(AIOSERVE_QQQQQQQQQQQQ=5)
    assert str(problem).endswith("expected a known option.")


def test_gunicorns_dictionary_is_not_taken_from_the_environment() -> None:
    (problem,) = problems({}, {"AIOSERVE_GUNICORN": "{}"})
    assert str(problem).endswith("in the Django settings, for it is a dictionary.")


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"AIOSERVE_KEYFILE": "/k"}, "AIOSERVE_KEYFILE"),
        ({"AIOSERVE_MAX_REQUESTS_JITTER": 5}, "AIOSERVE_MAX_REQUESTS_JITTER"),
        ({"AIOSERVE_MAX_LIFETIME_JITTER": 5}, "AIOSERVE_MAX_LIFETIME_JITTER"),
        ({"AIOSERVE_MAX_RSS": "2M", "AIOSERVE_MAX_RSS_TOTAL": "1M"}, "AIOSERVE_MAX_RSS_TOTAL"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], where: str
) -> None:
    (problem,) = problems(**settings)
    assert (problem.id, problem.where) == ("E003", where)


def test_every_option_is_documented() -> None:
    for option in OPTIONS.values():
        assert option.help.endswith("."), option.name
        assert option.group, option.name
        assert option.kind.expected, option.name


# --- travelling -------------------------------------------------------------------------------


def test_a_configuration_survives_the_way_through_json() -> None:
    config = resolve(
        {"workers": "2", "bind": ["8001", "8002"]},
        {"AIOSERVE_KEEPALIVE": "1m"},
        AIOSERVE_GUNICORN={"umask": 7, "logconfig_dict": {"a": [1]}},
    )
    loaded = Config.load(json.loads(json.dumps(config.dump())))
    assert loaded == config
    assert loaded.sources == config.sources


def test_a_configuration_made_by_hand_is_of_defaults() -> None:
    config = Config(threads=3)
    assert (config.threads, config.workers) == (3, 1)
    assert config.source("threads").kind == "default"


# --- helpers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("8000", ("127.0.0.1", 8000)),
        (":8000", ("0.0.0.0", 8000)),
        ("0:8000", ("0", 8000)),
        ("example.com:80", ("example.com", 80)),
        ("[::]:80", ("::", 80)),
        ("[fe80::1%eth0]:80", ("fe80::1%eth0", 80)),
        ("unix:run/x", "run/x"),
        ("unix:/run/x", "/run/x"),
        ("unix:///run/x", "/run/x"),
        ("unix:@x", "\0x"),
        ("fd://3", 3),
    ],
)
def test_addresses_are_read(text: str, address: Any) -> None:
    assert conf.parse_bind(text) == address


def test_import_dotted_finds_attributes_of_attributes() -> None:
    assert conf.import_dotted("pathlib.Path.cwd")() == Path.cwd()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere_at_all.x", 'there is no module "nowhere_at_all"'),
        ("json.nothing", 'there is no "nothing" in json'),
        ("json.nothing.x", 'there is no "nothing" in json'),
    ],
)
def test_import_dotted_names_the_part_that_is_missing(path: str, message: str) -> None:
    with pytest.raises(ImportError, match=message):
        conf.import_dotted(path)


def test_import_dotted_lets_an_import_inside_the_module_fail_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_broken.py").write_text("import nowhere_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError) as caught:
        conf.import_dotted("half_broken.application")
    assert caught.value.name == "nowhere_at_all"


def cgroup(directory: Path, **files: str) -> str:
    for name, text in files.items():
        path = directory / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return str(directory)


CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu_DOT_max": "50000 100000\n"}, 1),
        ({"cpu_DOT_max": "150000 100000\n"}, min(2, CPUS)),
        ({"cpu_DOT_max": "max 100000\n"}, CPUS),
        ({"cpu__cpu_DOT_cfs_quota_us": "50000", "cpu__cpu_DOT_cfs_period_us": "100000"}, 1),
        ({"cpu__cpu_DOT_cfs_quota_us": "-1", "cpu__cpu_DOT_cfs_period_us": "100000"}, CPUS),
        ({}, CPUS),
    ],
    ids=["half", "one and a half", "max", "v1 half", "v1 none", "no cgroup"],
)
def test_cpus_respect_the_quota_of_the_cgroup(
    tmp_path: Path, files: dict[str, str], cpus: int
) -> None:
    assert conf.available_cpus(cgroup(tmp_path, **files)) == cpus


def test_workers_auto_is_one_for_each_cpu() -> None:
    assert resolve({"workers": "auto"}).workers == conf.available_cpus()


@pytest.mark.parametrize(
    "files", [{"memory_DOT_max": "1048576\n"}, {"memory__memory_DOT_limit_in_bytes": "1048576"}]
)
def test_the_memory_limit_is_that_of_the_cgroup(tmp_path: Path, files: dict[str, str]) -> None:
    assert conf.memory_limit(cgroup(tmp_path, **files)) == 1 << 20


def test_the_memory_limit_is_that_of_the_host_where_the_cgroup_has_none(tmp_path: Path) -> None:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert conf.memory_limit(cgroup(tmp_path, memory_DOT_max="max\n")) == host


def test_the_room_in_memory_counts_the_page_cache(tmp_path: Path) -> None:
    place = cgroup(
        tmp_path,
        memory_DOT_max="1000\n",
        memory_DOT_current="700\n",
        memory_DOT_stat="active_file 7\ninactive_file 50\n",
    )
    assert conf.memory_room(place) == 350


def test_there_is_no_room_to_speak_of_without_a_limit(tmp_path: Path) -> None:
    place = cgroup(tmp_path, memory_DOT_max="max\n", memory_DOT_current="700\n")
    assert conf.memory_room(place) is None


def test_the_room_in_memory_without_statistics(tmp_path: Path) -> None:
    place = cgroup(tmp_path, memory_DOT_max="1000\n", memory_DOT_current="700\n")
    assert conf.memory_room(place) == 300
