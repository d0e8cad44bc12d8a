"""What the samples say: medians, ratios, claims; as a dictionary, as text, as a page."""

from statistics import median

from tests.benchmarks.loads import CLAIMS, COST, LOADS, OURS, Load
from tests.benchmarks.servers import SERVERS

#: The part of its answers up to which a server may err and still count.
_TOLERATED = 0.01

#: The part of its own core from which on wrk is what limits a run.
_CLIENT_BOUND = 0.9


class Results:
    """All samples: by load and server, one for each round, or a text that tells why not."""

    def __init__(self, machine, versions, options):
        self.facts = {"machine": machine, "versions": versions, "options": options}
        self.samples = {}
        self.crowds = {}
        self.profiles = {}
        #: Why a server did not pass under a load, and why it did not start at all.
        self.failures = {}
        self.absent = {}
        #: Loads that were left out, and why.
        self.skipped = {}

    def add(self, load, server, sample):
        """Take note of a Sample."""
        self.samples.setdefault((load, server), []).append(sample)

    def fail(self, load, server, reason):
        """Take note that a server did not pass."""
        self.failures[load, server] = reason

    # What they say.

    def row(self, load, server):
        """The medians of one server under one load, or None."""
        samples = self.samples.get((load, server))
        if not samples:
            return None
        requests = sum(sample.requests for sample in samples)
        errors = sum(sample.errors for sample in samples)
        cpu = [sample.cpu for sample in samples if sample.cpu is not None]
        kernel = [sample.kernel for sample in samples if sample.kernel is not None]
        return {
            "server": server,
            "title": SERVERS[server].title,
            "per_second": median(sample.per_second for sample in samples),
            "cpu": median(cpu) if cpu else None,
            "kernel": median(kernel) if kernel else None,
            "p99": median(sample.p99 for sample in samples),
            "requests": requests,
            "errors": errors,
            "ratio": None if server.startswith("aioserve") else self.ratio(load, server),
            "counts": bool(requests) and errors <= requests * _TOLERATED,
            "client": median(sample.client for sample in samples),
            "rounds": [sample.as_dict() for sample in samples],
        }

    def ours(self, load):
        """The name of this project's server that is compared with the peers under a load."""
        return next((name for name in OURS if (load, name) in self.samples), None)

    def ratios(self, load, peer):
        """This project's requests a second to those of `peer`, for each round."""
        ours = self.samples.get((load, self.ours(load)), [])
        theirs = self.samples.get((load, peer), [])
        both = [(a.per_second, b.per_second) for a, b in zip(ours, theirs, strict=False)]
        return [mine / other for mine, other in both if other]

    def ratio(self, load, peer):
        """The median of `ratios`, or None."""
        ratios = self.ratios(load, peer)
        return median(ratios) if ratios else None

    def cpu_ratio(self, load, peer):
        """The median, over the rounds, of the processor time of `peer` to this project's."""
        ours = self.samples.get((load, self.ours(load)), [])
        theirs = self.samples.get((load, peer), [])
        both = [(a.cpu, b.cpu) for a, b in zip(ours, theirs, strict=False)]
        ratios = [other / mine for mine, other in both if mine and other]
        return median(ratios) if ratios else None

    def rows(self, load):
        """The rows of a load, the fastest server first."""
        found = [self.row(load.name, server) for server in load.servers]
        return sorted((row for row in found if row), key=lambda row: -row["per_second"])

    def claims(self):
        """Each claim with what was measured."""
        found = []
        for claim in CLAIMS:
            rows = [self.row(claim.load, peer) for peer in claim.peers]
            rows = [row for row in rows if row and row["counts"] and row["ratio"] is not None]
            best = max(rows, key=lambda row: row["per_second"], default=None)
            ours = self.row(claim.load, self.ours(claim.load))
            known = best is not None and ours is not None
            failed = any((claim.load, name) in self.failures for name in OURS)
            met = ours["counts"] and best["ratio"] >= claim.at_least if known else None
            ratios = self.ratios(claim.load, best["server"]) if known else []
            found.append(
                {
                    "load": claim.load,
                    "title": _TITLES[claim.load],
                    "against": claim.against,
                    "target": claim.at_least,
                    "best": best["title"] if known else None,
                    "measured": best["ratio"] if known else None,
                    "range": [min(ratios), max(ratios)] if known else None,
                    "by_cpu": self.cpu_ratio(claim.load, best["server"]) if known else None,
                    "met": False if failed else met,
                }
            )
        return found

    def short(self):
        """The names of the loads that fall short of a claim."""
        return list(
            dict.fromkeys(claim["load"] for claim in self.claims() if claim["met"] is False)
        )

    def foreign(self):
        """The part of the server's core that others have used: the median and the most."""
        # PostgreSQL's own processes are others, too.
        found = [
            sample.foreign
            for (load, _), samples in self.samples.items()
            if not load.startswith("pg-")
            for sample in samples
        ]
        return (median(found), max(found)) if found else (0.0, 0.0)

    def as_dict(self, date):
        """All of it, for JSON."""
        usual, most = self.foreign()
        return {
            "date": date,
            **self.facts,
            "foreign": {"median": usual, "most": most},
            "claims": self.claims(),
            "loads": [
                {"name": load.name, "title": load.title, "clients": load.clients,
                 "results": self.rows(load)}
                for load in LOADS if isinstance(load, Load)
            ],
            "profiles": {load: found.as_dict() for load, found in self.profiles.items()},
            "streams": [
                {"load": load, "server": server, **crowd.as_dict()}
                for (load, server), crowd in self.crowds.items()
            ],
            "failures": [
                {"load": load, "server": server, "reason": reason}
                for (load, server), reason in self.failures.items()
            ],
            "absent": self.absent,
            "skipped": self.skipped,
        }  # fmt: skip

    # As text and as a page.

    def page(self, date):
        """The page of the documentation."""
        versions = ", ".join(f"{name} {text}" for name, text in self.facts["versions"].items())
        usual, most = self.foreign()
        options = self.facts["options"]
        parts = [
            "# Benchmarks",
            "This page is written by `make bench`; the data is in "
            "[benchmarks.json](benchmarks.json).",
            f"- Date: {date}; it took {options['minutes']:.0f} minutes\n"
            f"- Machine: {self.facts['machine']}; other processes used {usual:.0%} of the server's "
            f"core in the median, {most:.0%} at most\n- Versions: {versions}",
            _REPEAT,
            "## What is asked",
            _ASKED,
            self._asked(),
            "## What falls short",
            *self._shortfalls(),
            "## CPU as the work grows",
            "Microseconds of processor time for one request of a trivial view.",
            self._cost(),
            "## Open connections",
            _CROWDS,
            self._crowds(),
            "## Loads",
            "Ratio: requests per second of django-aioserve to those of the peer; below 1 the peer "
            "is faster.",
        ]  # fmt: skip
        for load in LOADS:
            if isinstance(load, Load):
                parts += [f"### {load.title}", self.table(load)]
        if self.absent:
            parts.append("## What did not start")
            parts += [f"- {SERVERS[name].title}: {reason}" for name, reason in self.absent.items()]
        parts += [
            "## How it is measured",
            _HOW.format(
                rounds=options["rounds"],
                seconds=options["seconds"],
                cores="the same core" if options["shared_core"] else "another core",
            ),
        ]
        return "\n\n".join(filter(None, parts)) + "\n"

    def summary(self):
        """What is asked and what was found, for the end of a run."""
        parts = ["## What is asked", self._asked(), "## CPU µs for one request", self._cost()]
        if self.crowds:
            parts += ["## Open connections", self._crowds()]
        return "\n\n".join(filter(None, parts))

    def table(self, load):
        """The table of one load, in Markdown."""
        rows = [
            [
                row["title"],
                f"{row['per_second']:,.0f}",
                _number(row["cpu"], 0),
                _number(row["p99"], 1),
                _number(row["ratio"], 2),
                _notes(row),
            ]
            for row in self.rows(load)
        ]
        rows += [
            [SERVERS[server].title, "", "", "", "", reason]
            for (name, server), reason in self.failures.items()
            if name == load.name
        ]
        skipped = self.skipped.get(load.name)
        if skipped is not None or not rows:
            part = "Not measured in full" if rows else "Not measured"
            skipped = f"{part}: {skipped or 'it was not asked for'}."
        head = ["server", "requests/s", "CPU µs", "p99 ms", "ratio", "notes"]
        return "\n\n".join(filter(None, [_table(head, rows), skipped]))

    def profile(self, load):
        """Where the time went under a load, in Markdown."""
        found = self.profiles[load]
        packages = ", ".join(f"{name} {part:.0%}" for name, part in found.packages if part >= 0.01)
        rows = [[f"`{name}`", f"{part:.1%}"] for name, part in found.functions]
        kernel = self.row(load, self.ours(load))["kernel"] or 0
        return (
            f"Of all its processor time {kernel:.0%} is the kernel's, and {found.loop:.0%} is that "
            f"of the event loop's thread. By package: {packages}.\n\n"
            + _table(["function", "time"], rows)
        )

    def _asked(self):
        return _table(
            ["load", "against", "asked", "measured", "from – to", "", "by CPU"],
            [
                [claim["title"], _against(claim), f"{claim['target']:.1f}",
                 _number(claim["measured"], 2), _range(claim["range"]), _VERDICTS[claim["met"]],
                 _number(claim["by_cpu"], 2)]
                for claim in self.claims()
            ],
        )  # fmt: skip

    def _shortfalls(self):
        short = [claim for claim in self.claims() if claim["met"] is False]
        if not short:
            yield "Nothing of what is asked above fell short in this run."
        if self.profiles:
            yield _PROFILE
        for load in self.short():
            yield f"### {_TITLES[load]}: short"
            yield "\n".join(
                f"- Against {_against(claim)}: {claim['target']:.1f} asked, "
                f"{_number(claim['measured'], 2) or 'nothing'} measured"
                for claim in short
                if claim["load"] == load
            )
            if load in self.profiles:
                yield self.profile(load)

    def _cost(self):
        rows = []
        for view, loads in COST.items():
            for server in ("aioserve-1", "aioserve", "aioserve-64", "granian-wsgi-8"):
                cells = [self.row(load, server) for load in loads.values()]
                if any(cells):
                    costs = [_number(cell and cell["cpu"], 0) for cell in cells]
                    rows.append([view, SERVERS[server].title, *costs])
        return _table(["view", "server", "1 client", "32 clients", "256 clients"], rows)

    def _crowds(self):
        rows = []
        for (load, server), crowd in self.crowds.items():
            samples = (crowd.alone, crowd.meanwhile)
            notes = [f"{crowd.lost:,} closed early"] if crowd.lost else []
            errors = sum(sample.errors for sample in samples)
            notes += [f"{errors:,} errors"] if errors else []
            rows.append(
                [_TITLES[load], SERVERS[server].title, f"{crowd.memory / 1024:.1f} KiB",
                 " → ".join(f"{sample.p50:.2f}" for sample in samples),
                 " → ".join(f"{sample.p99:.2f}" for sample in samples), ", ".join(notes)]
            )  # fmt: skip
        rows += [
            [_TITLES[load], SERVERS[server].title, "", "", "", reason]
            for (load, server), reason in self.failures.items()
            if load in _STREAMS
        ]
        rows += [
            [_TITLES[load], "", "", "", "", f"not measured in full: {reason}"]
            for load, reason in self.skipped.items()
            if load in _STREAMS
        ]
        return _table(["connections", "server", "memory for each", "p50 ms", "p99 ms", ""], rows)


_TITLES = {load.name: load.title for load in LOADS}
_STREAMS = {load.name for load in LOADS if not isinstance(load, Load)}
_VERDICTS = {True: "pass", False: "**short**", None: "not measured"}

_REPEAT = """\
To repeat it on Linux with two cores or more, [wrk](https://github.com/wg/wrk) installed and little
else running:

```console
$ make bench                                          # all of it, and this page
$ make bench OPTIONS="--quick"                        # two or three minutes, into build/bench
$ make bench OPTIONS="--loads sync,json --rounds 10"  # some of it, with more rounds
```

nginx is measured where it is installed, PostgreSQL where one listens on this machine. How each
server is started is in `tests/benchmarks/servers.py`, what is asked of it in
`tests/benchmarks/loads.py`."""

_ASKED = """\
Ratios of this project's requests per second to the peer's, in one interleaved run. What is asked
is what the project has set itself. By CPU: the peer's processor time for one request to this
project's, which a busy machine disturbs less."""

_CROWDS = """\
Memory of the server's processes for each connection, without what the kernel holds; and the
latency of a trivial request from one more client, before they were opened → while they are open.
The view is a sync one of Django's; with aiohttp alone there is no Django, and a native handler is
asked. Each connection gets an event every 5 seconds; as they are opened one right after the other,
these come in bursts."""

_PROFILE = """\
Where django-aioserve's time goes under this load, by py-spy: samples of the thread that holds the
interpreter's lock, taken while it runs on. Code in C counts for the Python function that called it;
what is done without the lock (sending, hashing, most of a database's work) is not in it."""

_HOW = """\
One worker process for each server, on one core, and wrk on {cores}; 32 keep-alive connections
unless said. {rounds} rounds of {seconds} s, twice that for those that wait 50 ms, interleaved:
every server has its turn before the first has its second. Before each turn one answer is compared
with what it should be; statuses other than 2xx and 3xx, broken connections and answers that do not
come are errors, and a server with more than 1% of them does not count. Requests per second,
processor time and p99 are medians of the rounds, ratios the median of the ratios of each round;
their least and greatest stand beside it. p99 is as wrk has it, which waits for an answer before it
asks again. Processor time is user and system of all the server's processes for one request. No
access log, DEBUG off, Django's seven default middlewares. Servers that speak ASGI run with
CONN_MAX_AGE=0, as Django's documentation says they should; all others with 60. PostgreSQL's own
processes run on any core."""


def _against(claim):
    best = claim["best"]
    return claim["against"] + (f": {best}" if best and best != claim["against"] else "")


def _range(values):
    return "" if values is None else f"{values[0]:.2f} – {values[1]:.2f}"


def _notes(row):
    if not row["requests"]:
        return "no answer in time"
    notes = []
    if row["errors"]:
        notes.append(f"{row['errors']:,} errors ({row['errors'] / row['requests']:.1%})")
    if not row["counts"]:
        notes.append("does not count")
    if row["client"] > _CLIENT_BOUND:
        notes.append("wrk was the limit")
    return ", ".join(notes)


def _number(value, digits):
    return "" if value is None else f"{value:,.{digits}f}"


def _table(head, rows):
    """A table in Markdown whose columns are aligned for a terminal, too."""
    if not rows:
        return ""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    texts = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    texts.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(texts)
