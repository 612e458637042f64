"""Who does the work: processes on this machine, or Dask workers anywhere. Both call one function with one order, and hand back what it
returns or the exception that it raised, in the order in which they finish.

A student's code never runs in a worker, but in a child of the warm parent that each worker keeps (runner.Parent). A worker that
is lost (out of memory, a machine that went away) costs nothing: its orders are given to another one, twice at most. What a worker
on another machine is and can do is asked there: the version of the course, and the layers of confinement.
"""
import asyncio
import atexit
import dataclasses
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import connection

from autograder import runner, sandbox

TRIES = 3
PATIENCE = 20       # seconds to wait for a scheduler
TICK = 1.0          # seconds between two looks at a silent pool

_parents = {}       # process id -> its warm parent: a forked worker must not talk to the one of the process it came from
_alone = threading.Lock()


class Lost(Exception):
    """A worker ended while it worked on this order, each time it was tried."""


class Unusable(ValueError):
    """A cluster, or a worker of it, that cannot be asked to grade, in one sentence."""


def parent(without):
    """The warm parent of this worker, started when it is first needed."""
    mine = _parents.get(os.getpid())
    if mine is None or mine.without != tuple(without):
        if mine is not None:
            mine.close()
        mine = _parents[os.getpid()] = runner.Parent(without)
        atexit.register(mine.close)
    return mine


# --- this machine ----------------------------------------------------------------------------------------------------

def begin(grader):
    """The first thing in a forked worker: the grader alone hears an interrupt, and its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # the grader hears it and stops the workers
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    sandbox.die_with_parent()
    if os.getppid() != grader:                      # it ended before the line above
        os._exit(1)


class Here:
    """`number` processes on this machine, forked, so that what the grader has loaded and computed is theirs too."""

    def __init__(self, number):
        self.number = self.forked = number
        self.pool = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def _start(self):
        self.pool = ProcessPoolExecutor(self.number, multiprocessing.get_context("fork"), begin, (os.getpid(),))

    def _stop(self):
        if self.pool is not None:
            processes, results = self._processes(), self.pool._result_queue
            for process in processes:   # the one thing that ends a worker which is waiting for a student's cell
                process.terminate()
            self.pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                process.join()
            if results is not None:
                results._writer.close()     # the pool's own thread may be reading what a dead worker never sent to its end
            self.pool = None

    def _processes(self):
        return list((self.pool._processes or {}).values())

    def _dead(self):
        """Whether a worker has ended and the pool has not noticed: one that is killed while it sends a result has it wait for the rest."""
        return bool(connection.wait([process.sentinel for process in self._processes()], 0))

    def run(self, function, orders, tick=lambda: None):
        """Yield (order, result or exception) for each of the orders, as they are done. `orders` may be a generator: it is asked for one
        only when a worker is nearly free. `tick` is called about once a second while nothing comes.
        """
        waiting, tries, flying, orders = [], {}, {}, iter(orders)
        while True:
            lost = []
            while len(flying) < 2 * self.number:
                order = waiting.pop() if waiting else next(orders, None)
                if order is None:
                    break
                # After a loss one at a time, so that it is known whose order it was.
                if tries.get(id(order)) and flying:
                    waiting.append(order)
                    break
                if self.pool is None:
                    self._start()   # not before there is something to do: what the orders' source has computed by now is the workers' too
                try:
                    flying[self.pool.submit(function, order)] = order
                except BrokenProcessPool:   # a worker ended while there was nothing to do
                    lost.append(order)
                    break
                if tries.get(id(order)):
                    break
            if not flying and not lost:
                return
            ready = wait(flying, TICK, FIRST_COMPLETED)[0] if not lost else []
            if not ready:
                if self._dead() and not lost:
                    lost, flying = list(flying.values()), {}
                tick()
            for future in ready:
                order, error = flying.pop(future), future.exception()
                if isinstance(error, BrokenProcessPool):
                    lost.append(order)
                else:
                    yield order, error if error is not None else future.result()
            if lost:
                lost += flying.values()
                flying.clear()
                self._stop()
                for order in lost:
                    tries[id(order)] = tries.get(id(order), 0) + 1
                    if tries[id(order)] >= TRIES:
                        yield order, Lost(f"the worker process ended {TRIES} times while it graded this")
                    else:
                        waiting.append(order)


# --- other machines --------------------------------------------------------------------------------------------------

@cache
def lacking():
    """{layer: why it cannot be had}: sandbox.missing() of the machine this is called on, tried in a process without threads."""
    program = "import json; from autograder import sandbox; print(json.dumps(sandbox.missing()))"
    run = subprocess.run([sys.executable, "-c", program], cwd=runner.ROOT, capture_output=True, text=True, timeout=120)
    if run.returncode:
        raise runner.RunnerError(f"confinement could not be tried: {run.stderr.strip().splitlines()[-1:]}")
    return json.loads(run.stdout)


def fault(version, unconfined):
    """Why this process cannot be a worker of a run of that version of the course, or "". Runs on the worker."""
    from autograder.grade import version as mine    # which imports this module
    if mine() != version:
        return f"has another version of the course ({mine()}, here {version}); all machines need the same files"
    if lacking() and not unconfined:
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in lacking().items())
        return f"cannot confine students' code ({reasons})"
    return ""


async def fault_of_worker(version, unconfined):
    return await asyncio.to_thread(fault, version, unconfined)     # the worker's own loop must go on: torch takes seconds to load


def on_worker(function, order, release, version, unconfined):
    """One order on a Dask worker: one at a time in a process, whatever its number of threads, for pictures and warnings are global."""
    with _alone:
        if why := fault(version, unconfined):
            raise Unusable(f"a worker {why}")
        return function(dataclasses.replace(order, release=release, without=tuple(lacking())))


def same(value):
    """A task whose result is its argument: kept once in the scheduler, and so never lost with a worker."""
    return value


class Cluster:
    """The workers of a Dask scheduler at `address`, all of the course's `version`; `unconfined`: also those that cannot confine code."""

    forked = 0      # none that inherits what this process has computed

    def __init__(self, address, version, unconfined=False):
        try:
            from distributed import Client
        except ImportError:
            raise Unusable("--cluster needs the packages dask and distributed: pip install 'flowkit-course[cluster]'") from None
        self.address, self.version, self.unconfined, self.releases = address, version, unconfined, {}
        try:
            self.client = Client(address, timeout=PATIENCE, set_as_default=False)
        except (OSError, ValueError) as e:
            raise Unusable(f"--cluster {address}: no scheduler answers there ({type(e).__name__}: {e})") from None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.client.close(timeout=PATIENCE)

    def _ask_workers(self):
        if not self.client.nthreads():
            raise Unusable(f"--cluster {self.address}: the scheduler has no workers yet; start some")
        for worker, why in self.client.run(fault_of_worker, self.version, self.unconfined, on_error="return").items():
            if isinstance(why, OSError):        # it has gone meanwhile
                continue
            if isinstance(why, Exception):
                why = f"cannot grade: autograder cannot be loaded there ({type(why).__name__}: {why})"
            if why:
                raise Unusable(f"the worker at {worker} {why}")

    def _release(self, release):
        if release.hash not in self.releases:
            self.releases[release.hash] = self.client.submit(same, release, key=f"release-{release.hash}")
        return self.releases[release.hash]

    def run(self, function, orders, tick=lambda: None):
        """As Here.run; a worker that is lost is Dask's own affair, which gives its orders to the others."""
        flying, ready, orders = {}, queue.SimpleQueue(), iter(orders)

        def more():
            try:
                capacity = 2 * max(1, len(self.client.nthreads()))
            except OSError:
                raise Unusable(f"--cluster {self.address}: the scheduler is gone") from None
            while len(flying) < capacity and (order := next(orders, None)) is not None:
                future = self.client.submit(on_worker, function, dataclasses.replace(order, release=None), self._release(order.release),
                                            self.version, self.unconfined, pure=False, retries=TRIES - 1)
                flying[future.key] = order
                future.add_done_callback(ready.put)

        self._ask_workers()
        more()
        while flying:
            try:
                future = ready.get(timeout=TICK)
            except queue.Empty:
                tick()
            else:
                if future.status == "cancelled":
                    raise Unusable(f"--cluster {self.address}: the scheduler is gone")
                order, error = flying.pop(future.key), future.exception()
                if isinstance(error, Unusable):
                    raise error
                yield order, error if error is not None else future.result()
                del future
                more()
            if self.client.status not in ("running", "connecting"):
                raise Unusable(f"--cluster {self.address}: the scheduler is gone")
