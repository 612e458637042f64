"""Which layers torch.compile takes, as one graph or in pieces, and what stands in the way of the others.

The eager backend captures the graph as the others do, but generates no code: that would take minutes for each layer.
"""
import pytest
import torch
from layer_laws import LAYERS, build, points

# Why a layer's forward is captured in pieces: Python has to look at a number before it knows how to go on.
IN_PIECES = {
    "act_norm": "whether the first batch has been seen",
    "iaf": "its forward is MAF's inverse, coordinate by coordinate in the order that a buffer holds",
    "inverse": "its forward is an inverse by bisection, which stops when the root is found",
    "compose": "whether all that came out is finite",
    "cnf": "the solver's steps",
    "residual": "whether the power iteration has converged",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_layer_does_the_same(name):
    torch._dynamo.reset()
    layer, x = build(name, 4), points(4)
    compiled = torch.compile(layer.forward, backend="eager", fullgraph=name not in IN_PIECES)
    for got, want in zip(compiled(x), layer(x)):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_PIECES)
@pytest.mark.filterwarnings("ignore")
def test_the_exceptions_are_none_too_many(name):
    torch._dynamo.reset()
    layer, x = build(name, 4), points(4)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        torch.compile(layer.forward, backend="eager", fullgraph=True)(x)
