"""Django signals of the server."""

from __future__ import annotations

from django.dispatch import Signal

__all__ = ["worker_replaced"]

worker_replaced = Signal()
"""Sent in a worker at the end of its drain, on a thread of its pool.

Receivers get ``event``: a dictionary with ``pid``, ``reason``, ``text``, ``served``
(requests), ``age``, ``boot`` and ``drain`` (seconds), ``in_flight`` (requests when the
drain began), ``rss`` (bytes) and ``lost`` (requests given up).

.. versionadded:: 0.1
"""
