"""What workers tell about themselves, in memory that they share."""

from __future__ import annotations

import os
import signal

import pytest

from django_aioserve.server.scoreboard import COUNTERS, FIELDS, Scoreboard, State
from tests.support import wait_until


@pytest.fixture
def board() -> Scoreboard:
    return Scoreboard(3)


def in_a_child(work) -> int:
    """Run `work` in a forked process and wait for it; its pid."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return pid


def test_a_new_board_is_free_and_zero(board):
    assert [slot.state for slot in board.slots] == [State.FREE] * 3
    assert {slot[name] for slot in board.slots for name in FIELDS} == {0}
    assert (board.stopping, board.degraded, board.closer) == (False, False, 0)


def test_a_slot_that_is_taken_is_booting(board):
    slot = board.take()
    assert slot is not None
    assert slot.state is State.BOOTING


def test_each_worker_gets_a_slot_of_its_own_until_there_are_none(board):
    taken = [board.take() for _ in range(4)]
    assert [slot and slot.index for slot in taken] == [0, 1, 2, None]


def test_a_slot_that_was_given_back_is_taken_again(board):
    first, second = board.take(), board.take()
    first["state"] = State.FREE
    again = board.take()
    assert again.index == first.index
    assert second.state is State.BOOTING


def test_counters_survive_the_worker_and_nothing_else_does(board):
    slot = board.take()
    for number, name in enumerate(FIELDS, start=1):
        if name != "state":
            slot[name] = number
    slot.text = "max_requests: its limit is 100 requests"
    before = {name: slot[name] for name in COUNTERS}
    slot["state"] = State.FREE
    again = board.take()
    assert {name: again[name] for name in COUNTERS} == before
    assert {again[name] for name in FIELDS if name not in (*COUNTERS, "state")} == {0}
    assert again.text == ""


def test_what_a_child_writes_its_parent_reads(board):
    slot = board.take()

    def work():
        slot["served"] = 7
        slot.add("requests", 5)
        slot.add("requests", 2)
        slot.text = "boot: no such table"
        slot["state"] = State.READY

    in_a_child(work)
    assert (slot["served"], slot["requests"], slot.text) == (7, 7, "boot: no such table")
    assert slot.state is State.READY


def test_two_children_read_each_other(board):
    one, two = board.take(), board.take()
    in_a_child(lambda: one.add("requests", 3))
    in_a_child(lambda: two.add("requests", one["requests"] + 1))
    assert board.total("requests") == 7


def test_what_the_arbiter_says_after_the_fork_its_workers_see(board):
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(write)
        os.read(read, 1)  # the parent has spoken, or is gone
        os._exit(0 if board.stopping and board.degraded and board.closer == 2 else 1)
    os.close(read)
    board.stopping = board.degraded = True
    board.closer = 2
    os.close(write)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_reader_sees_the_old_value_or_the_new_one(board):
    """A writer that is killed at any moment leaves one of its two values."""
    slot = board.take()
    low, high = 0x0101010101010101, 0x7F7F7F7F7F7F7F7F
    slot["rss"] = low
    pid = os.fork()
    if not pid:
        while True:
            slot["rss"] = high
            slot["rss"] = low
    try:
        wait_until(lambda: slot["rss"] == high)
        seen = {slot["rss"] for _ in range(200_000)}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert seen <= {low, high}
    assert slot["rss"] in {low, high}


def test_slots_do_not_overlap(board):
    slots = [board.take() for _ in range(3)]
    for slot in slots:
        for name in FIELDS:
            slot[name] = slot.index + 1
        slot.text = str(slot.index) * 5000
    for slot in slots:
        assert {slot[name] for name in FIELDS} == {slot.index + 1}
        assert set(slot.text) == {str(slot.index)}
    assert (board.stopping, board.degraded, board.closer) == (False, False, 0)


def test_a_text_that_is_too_long_is_cut(board):
    slot = board.take()
    slot.text = "ä" * 2000
    assert 400 < len(slot.text) < 2000
    assert set(slot.text) <= {"ä", "\N{REPLACEMENT CHARACTER}"}


def test_a_shorter_text_leaves_nothing_of_the_longer(board):
    slot = board.take()
    slot.text = "a long reason"
    slot.text = "short"
    assert slot.text == "short"


def test_a_text_with_surrogates_is_taken(board):
    slot = board.take()
    slot.text = "no file \udcff"
    assert slot.text.startswith("no file ")


def test_flags_are_taken_back(board):
    board.stopping = board.degraded = True
    board.stopping = board.degraded = False
    assert (board.stopping, board.degraded) == (False, False)
