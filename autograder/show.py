"""Experiments of a lesson that run on the student's own answers, solved or not.

    @show
    def _():
        layer = Coupling(make_net())     # raises NotImplementedError as long as the exercise is not solved
        ...
        return figure

The function runs at once and what it returns is displayed; while an exercise that it needs is unsolved, a frame that
says which one stands in the picture's place, so "Run All" goes through.
"""


def show(draw):
    """Run `draw` now and display what it returns; an unsolved exercise gives a placeholder. Returns nothing."""
    try:
        result = draw()
    except NotImplementedError as e:
        result = placeholder(str(e) or "an exercise")
    if result is not None:
        from IPython.display import display

        display(result)


def placeholder(message):
    """An empty frame: yours, not solved yet, and the exercise that is missing."""
    from autograder.pictures import empty
    from flowkit import plotting

    figure = plotting.Picture(figsize=(7, 2.2), layout="constrained")
    empty(figure.subplots(), f"yours: not solved yet\n({message})")
    return figure
