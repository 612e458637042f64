"""What lies in data/ is read as it stands there."""
import pytest
import torch

from flowkit import datasets


@pytest.mark.parametrize("name, shape, first, mean", [
    # Means from the tables' own descriptions: iris sepal length 5.84, wine's alcohol 13.0, mean radius 14.127.
    ("iris", (150, 4), 5.1, 5.84), ("wine", (178, 13), 14.23, 13.00), ("breast_cancer", (569, 10), 17.99, 14.127)])
def test_tables_have_their_shape_and_their_documented_mean(name, shape, first, mean):
    header, x = datasets.table(name)
    assert len(header) == shape[1] and x.shape == shape and x.dtype == torch.float64
    assert x[0, 0].item() == first and x[:, 0].mean().item() == pytest.approx(mean, abs=6e-3)
    assert torch.isfinite(x).all() and (x.std(0) > 0).all()


def test_published_log_likelihoods_have_their_signs():
    rows = datasets.published("density_estimation")
    assert len(rows) == 45
    by = {(r["model"], r["dataset"], r["split"]): r for r in rows}
    assert by["MAF-DDSF (5)", "POWER", "test"]["log_likelihood"] == 0.62
    # Test and validation of one model lie near each other, except on BSDS300, where they differ by 15 nats in the paper.
    for (model, data, split), r in by.items():
        if split == "validation" and data != "BSDS300":
            assert abs(r["log_likelihood"] - by[model, data, "test"]["log_likelihood"]) < 1
    assert [r["printed"] for r in rows if r["printed"] is not None] == [15.10, 15.34]


def test_an_unknown_name_is_answered_by_those_there_are():
    with pytest.raises(ValueError, match="breast_cancer, iris, wine"):
        datasets.table("boston")
    with pytest.raises(ValueError, match="density_estimation"):
        datasets.published("table 1")


def test_the_tale_is_in_27_characters_and_long_enough_to_learn_from():
    tale = datasets.text("mill")
    assert tale.startswith("the mill and the river there was a mill by the river") and len(tale) > 5000
    assert set(tale) <= set("abcdefghijklmnopqrstuvwxyz ") and "  " not in tale
    with pytest.raises(ValueError, match="mill"):
        datasets.text("bible")
