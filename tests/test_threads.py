"""The thread pool: one hop there, one back."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import threading
import weakref

import pytest

from django_aioserve.bridge.threads import QueueFull, ThreadPool
from tests.support import wait_until

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")


def run(main):
    """Run `main(pool, ...)` with a pool of its own, and see that the pool ends."""

    async def whole():
        pool = ThreadPool(2, 2, "test")
        try:
            return await main(pool)
        finally:
            pool.close()
            assert await pool.join(10)

    return asyncio.run(whole())


async def until(predicate):
    """Let the loop run until `predicate` holds."""
    async with asyncio.timeout(10):
        while not predicate():
            await asyncio.sleep(0.001)


class Gate:
    """Work that occupies threads until it is opened."""

    def __init__(self):
        self.opened = threading.Event()
        self.entered = []

    def __call__(self):
        self.entered.append(threading.current_thread().name)
        self.opened.wait(10)


def test_run_gives_the_result():
    async def main(pool):
        return await pool.run(max, 3, 7)

    assert run(main) == 7


def test_run_raises_what_the_function_raises():
    async def main(pool):
        with pytest.raises(ZeroDivisionError):
            await pool.run(lambda: 1 / 0)

    run(main)


@pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration, asyncio.CancelledError]
)
def test_an_exception_that_would_disturb_the_loop_comes_as_a_cause(error):
    def fail():
        raise error

    async def main(pool):
        with pytest.raises(RuntimeError, match=error.__name__) as caught:
            await pool.run(fail)
        assert isinstance(caught.value.__cause__, error)
        assert await pool.run(int) == 0
        assert pool.size == 1

    run(main)


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_work_that_raises_is_logged_and_ends_no_thread(error, caplog):
    def fail():
        raise error

    async def main(pool):
        pool.submit(fail)
        await until(lambda: pool.under_way == 0)
        assert await pool.run(int) == 0
        assert pool.size == 1

    with caplog.at_level(logging.ERROR, "django_aioserve"):
        run(main)
    assert [record.exc_info[0] for record in caplog.records] == [error]


def test_what_the_work_returns_runs_on_the_loop():
    names = []

    async def main(pool):
        def here():
            names.append(threading.current_thread() is threading.main_thread())

        pool.submit(lambda: here)
        await until(lambda: names)

    run(main)
    assert names == [True]


def test_a_callback_that_fails_does_not_hold_up_the_others():
    failures = []

    async def main(pool):
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
        done = []

        def fail():
            raise ValueError

        def work():
            pool.call_soon(fail)
            pool.call_soon(lambda: done.append(1))

        pool.submit(work)
        await until(lambda: done)

    run(main)
    assert [type(failure) for failure in failures] == [ValueError]


def test_callbacks_that_wait_share_one_wake_up():
    async def main(pool):
        loop = asyncio.get_running_loop()
        wake_ups = []
        real = loop.call_soon_threadsafe

        def count(*args):
            wake_ups.append(1)
            return real(*args)

        loop.call_soon_threadsafe = count
        done = []

        def work():
            for number in range(100):
                pool.call_soon(lambda number=number: done.append(number))

        # The loop is kept from running: all hundred wait when it comes to it.
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        await until(lambda: len(done) == 100)
        assert done == list(range(100))
        assert len(wake_ups) == 1

    run(main)


def test_no_callback_is_lost_between_many_threads():
    async def main(pool):
        done = []

        def work():
            for _ in range(2000):
                pool.call_soon(lambda: done.append(1))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        await until(lambda: len(done) == 8000)
        for thread in threads:
            thread.join()

    run(main)


def test_threads_are_started_as_they_are_needed():
    async def main(pool):
        gate = Gate()
        assert pool.size == 0
        pool.submit(gate)
        assert pool.size == 1
        pool.submit(gate)
        assert pool.size == 2
        pool.submit(gate)
        assert pool.size == 2
        gate.opened.set()

    run(main)


def test_an_idle_thread_is_preferred_to_a_new_one():
    async def main(pool):
        names = {await pool.run(lambda: threading.current_thread().name) for _ in range(200)}
        assert pool.size == 1
        assert names == {"test-1"}

    run(main)


def test_the_figures_tell_what_goes_on():
    async def main(pool):
        gate = Gate()
        for _ in range(3):
            pool.submit(gate)
        await until(lambda: len(gate.entered) == 2)
        assert (pool.busy, pool.queued, pool.under_way, pool.size) == (2, 1, 3, 2)
        waited = pool.queue_seconds
        gate.opened.set()
        await until(lambda: pool.under_way == 0)
        assert (pool.busy, pool.queued) == (0, 0)
        assert pool.queue_seconds > waited

    run(main)


def test_a_full_queue_refuses_and_recovers():
    async def main(pool):
        gate = Gate()
        for _ in range(4):
            pool.submit(gate)
        with pytest.raises(QueueFull):
            pool.submit(gate)
        gate.opened.set()
        await until(lambda: pool.under_way == 0)
        assert await pool.run(int) == 0

    run(main)


def test_run_has_the_callers_context_and_leaves_no_trace():
    def look_and_set():
        seen = variable.get()
        variable.set("changed")
        return seen

    async def main(pool):
        variable.set("mine")
        assert await pool.run(look_and_set) == "mine"
        assert variable.get() == "mine"
        seen = []
        pool.submit(lambda: seen.append(variable.get()))
        await until(lambda: seen)
        assert seen == ["none"]

    run(main)


def test_cancelling_run_leaves_the_thread_to_finish():
    async def main(pool):
        gate = Gate()
        task = asyncio.create_task(pool.run(gate))
        await until(lambda: gate.entered)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pool.busy == 1
        gate.opened.set()
        await until(lambda: pool.busy == 0)

    run(main)


def test_a_closed_pool_finishes_what_it_has_and_takes_no_more():
    async def main():
        pool = ThreadPool(1, 10)
        done = []
        gate = Gate()
        pool.submit(gate)
        for number in range(3):
            pool.submit(lambda number=number: done.append(number))
        pool.close()
        pool.close()
        with pytest.raises(QueueFull):
            pool.submit(lambda: None)
        gate.opened.set()
        assert await pool.join(10)
        assert done == [0, 1, 2]
        assert pool.size == 0

    asyncio.run(main())


def test_join_tells_of_a_thread_that_does_not_end():
    async def main():
        pool = ThreadPool(1, 10)
        gate = Gate()
        pool.submit(gate)
        pool.close()
        assert not await pool.join(0.01)
        gate.opened.set()
        assert await pool.join(10)

    asyncio.run(main())


def test_a_pool_without_threads_is_joined_at_once():
    async def main():
        pool = ThreadPool(1, 10)
        pool.close()
        assert await pool.join(0)

    asyncio.run(main())


def test_threads_do_not_hold_up_the_end_of_the_process():
    async def main(pool):
        await pool.run(int)
        return [thread for thread in threading.enumerate() if thread.name == "test-1"]

    assert [thread.daemon for thread in run(main)] == [True]


def test_a_thread_that_outlives_the_loop_has_nobody_left_to_tell(caplog):
    gate = Gate()

    async def main():
        pool = ThreadPool(1, 10, "survivor")
        pool.submit(lambda: gate() or (lambda: None))
        await until(lambda: gate.entered)

    asyncio.run(main())
    gate.opened.set()
    wait_until(lambda: gate.entered)
    assert not caplog.records


def test_an_idle_thread_keeps_nothing_alive():
    class Thing:
        pass

    async def main(pool):
        thing = Thing()
        gone = weakref.ref(thing)
        await pool.run(lambda thing=thing: None)
        del thing
        await until(lambda: gc.collect() is not None and gone() is None)

    run(main)


def test_a_system_without_threads_to_give_is_a_full_queue(monkeypatch):
    async def main(pool):
        with monkeypatch.context() as patch:

            def refuse(self):
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(QueueFull):
                pool.submit(lambda: None)
        assert pool.under_way == 0
        gate = Gate()
        pool.submit(gate)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            done = []
            pool.submit(lambda: done.append(1))
            gate.opened.set()
            await until(lambda: done)
        assert pool.size == 1

    run(main)


def test_a_pool_needs_a_running_loop():
    with pytest.raises(RuntimeError):
        ThreadPool(1, 1)
