"""A bar for work that several workers do: what is done, how long it took, and how long the rest will take.

The time left is the mean time between two results so far, times what is left. It counts from the first result on, since before that the
workers start, and it is said only once there are a few: an estimate from the first one or two is mostly wrong by a factor.
"""
import threading
import time

from tqdm import tqdm

FEW = 5             # results before the time left is said
LONGER = 3.0        # seconds since the first result, likewise


class Progress:
    """`total` pieces of work; `clock` in seconds."""

    def __init__(self, total, what, unit, clock=time.monotonic, **more):
        tqdm.monitor_interval = 0   # its thread would be forked with the workers
        tqdm.set_lock(threading.RLock())    # its own is shared with forked processes, and stays taken for ever if one is killed with it
        self.clock, self.first, self.results = clock, None, 0
        form = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} " + unit + " in {elapsed}{postfix}"
        self.bar = tqdm(total=total, desc=what, bar_format=form, **more)

    def skip(self):
        """One that was done before."""
        self.bar.update()

    def done(self):
        self.results += 1
        if self.first is None:
            self.first = self.clock()
        self.bar.update()
        self.tick()

    def tick(self):
        seconds = self.left()
        self.bar.set_postfix_str("" if seconds is None else f"{rounded(seconds)} left", refresh=False)
        self.bar.refresh()

    def left(self):
        """Seconds until all is done, or None as long as nobody can tell."""
        rest = self.bar.total - self.bar.n
        if rest == 0 or self.results < FEW or self.clock() - self.first < LONGER:
            return None
        return rest * (self.clock() - self.first) / (self.results - 1)

    def close(self):
        self.bar.close()


def rounded(seconds):
    """As exact as an estimate is: 40 s, 5 min, 2 h 10 min."""
    if seconds < 55:
        return f"{max(5, 5 * round(seconds / 5))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{max(1, minutes)} min"
    minutes = 10 * round(minutes / 10)
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
