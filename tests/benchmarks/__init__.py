"""This project and its peers side by side: ``make bench``, or ``python -m tests.benchmarks``."""
