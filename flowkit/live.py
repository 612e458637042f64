"""Watch a training while it runs: batches that carry a progress bar and a live picture into anybody's loop.

The loop that trains needs to know nothing of it: it iterates over `batches(...)`, and between two batches the bar
moves and the picture is drawn anew.
"""
import contextlib
import time

from tqdm.auto import tqdm


def batches(sample, steps, size, draw=None, pause=1.0, label="training"):
    """Yield `steps` fresh batches `sample(size)`, with a progress bar.

    `draw(step) -> Figure`, if given, is shown at the start, at most every `pause` seconds after that, and at the end.
    Without IPython there is no picture, only the bar.
    """
    picture = Canvas() if draw is not None else None
    last = -float("inf")
    for step in bar(range(steps), label):
        if picture and time.monotonic() - last > pause:
            picture.show(draw(step))
            last = time.monotonic()
        yield sample(size)
    if picture:
        picture.show(draw(steps))


def bar(items, label):
    """`items` with a progress bar that goes away when it is done."""
    return tqdm(items, desc=label, leave=False)


class Canvas:
    """One place in a notebook's output where a picture is replaced by the next."""

    def __init__(self):
        self.handle = None

    def show(self, figure):
        """Put the figure in the place of the one before; outside IPython nothing is shown."""
        try:
            from IPython import get_ipython
            from IPython.display import display
        except ImportError:
            return
        if get_ipython() is None:
            return
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        else:
            self.handle.update(figure)


@contextlib.contextmanager
def interruptible():
    """Let the stop button end a training without an error: what has been learnt so far is kept."""
    try:
        yield
    except KeyboardInterrupt:
        print("Stopped early; the flow keeps what it has learnt so far.")
