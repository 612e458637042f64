"""Experiments of a lesson that run on the student's own answers, solved or not.

    @show
    def _():
        layer = Coupling(make_net())     # raises NotImplementedError as long as the exercise is not solved
        ...
        return figure

The function runs at once and what it returns is displayed. While an exercise that it needs is unsolved, a frame that
says which one stands in the picture's place, so "Run All" goes through; the same if a flow's numbers overflow.
"""


def show(draw):
    """Run `draw` now and display what it returns; an unsolved exercise gives a placeholder. Returns nothing."""
    try:
        result = draw()
    except NotImplementedError as e:
        if "not implemented for" in str(e):     # torch's own, of a type of numbers: the answer is there, and fails
            result = placeholder(f"PyTorch cannot do this with such numbers:\n{str(e).splitlines()[0][:90]}")
        else:
            result = placeholder(f"yours: not solved yet\n({e or 'an exercise is missing'})")
    except FloatingPointError as e:
        # A flow whose numbers ran away is an experience worth having, not a reason to stop the notebook.
        result = placeholder(f"the numbers ran away:\n{e}")
    if result is not None:
        from IPython.display import display

        display(result)


def placeholder(message):
    """An empty frame with a message, in a picture's place."""
    from autograder.pictures import empty
    from flowkit import plotting

    figure = plotting.Picture(figsize=(7, 2.2), layout="constrained")
    empty(figure.subplots(), message)
    return figure
