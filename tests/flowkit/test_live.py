"""Batches that carry a bar and a picture into anybody's loop."""
import pytest
import torch

from flowkit import live


def test_batches_are_fresh_and_counted():
    got = list(live.batches(lambda n: torch.randn(n, 2), 5, 7))
    assert [b.shape for b in got] == [(7, 2)] * 5 and not torch.equal(got[0], got[1])


def test_the_picture_is_drawn_at_the_start_now_and_then_and_at_the_end(monkeypatch):
    clock, drawn = iter(range(100)), []
    monkeypatch.setattr(live.time, "monotonic", lambda: next(clock) / 4)  # every look at the clock is a quarter of a second later
    list(live.batches(lambda n: n, 12, 1, draw=drawn.append, pause=1.0))
    assert drawn[0] == 0 and drawn[-1] == 12 and 3 <= len(drawn) <= 6


def test_a_picture_replaces_the_one_before(monkeypatch):
    import IPython
    import IPython.display

    shown = []

    class Handle:
        def update(self, figure):
            shown.append(("again", figure))

    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", lambda figure, display_id: shown.append(("new", figure)) or Handle())
    canvas = live.Canvas()
    canvas.show(1), canvas.show(2)
    assert shown == [("new", 1), ("again", 2)]


def test_the_stop_button_ends_a_training_without_an_error(capsys):
    seen = []
    with live.interruptible():
        for i in range(10):
            seen.append(i)
            if i == 3:
                raise KeyboardInterrupt
    assert seen == [0, 1, 2, 3] and "keeps what it has learnt" in capsys.readouterr().out
    with pytest.raises(ValueError):
        with live.interruptible():
            raise ValueError
