"""Hyper-cleaning flags the wrong labels, by the gradient of the validation loss in each example's weight."""

import struct

import pytest
import torch
from torch import nn
from torch.distributions import constraints

import metaopt
from experiments.hyper_cleaning import STUDY, Config, SoftmaxRegression, f1, load
from metaopt.metagrad import Implicit, Unrolled
from metaopt.tasks import load_digits


@pytest.mark.long
def test_wrong_labels_are_flagged_and_training_without_them_nears_the_oracle_by_both_estimators(tmp_path):
    findings = STUDY.findings(Config(quick=True, out=tmp_path))
    assert len(findings) == 4
    assert all(finding.holds for finding in findings), findings
    assert "implicit" in (tmp_path / "hyper_cleaning.svg").read_text()


def hypergradient(estimator, opt, found):
    task = SoftmaxRegression(found.data.train, found.data.validation)
    start = torch.full((len(found.wrong),), 0.3)
    hyper = metaopt.Hyperparameters(opt, learn={"weights": (start, constraints.unit_interval)})
    estimator.backward(task, opt, hyper)
    return hyper.weights.grad


def test_gradient_of_the_weights_is_that_of_gradient_descent_in_plain_torch():
    found = load(Config())
    (x, y), (x_val, y_val) = found.data.train, found.data.validation
    logits = torch.logit(torch.full((len(y),), 0.3, dtype=torch.float64)).requires_grad_()
    weight = torch.zeros(64, 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    for _ in range(4):
        losses = nn.functional.cross_entropy(x @ weight + bias, y, reduction="none")
        loss = (logits.sigmoid().float() * losses).sum() / len(y)
        grads = torch.autograd.grad(loss, (weight, bias), create_graph=True)
        weight, bias = (p - 2.0 * (g + 0.01 * p) for p, g in zip((weight, bias), grads, strict=True))
    nn.functional.cross_entropy(x_val @ weight + bias, y_val).backward()

    opt = metaopt.functional.sgd(lr=2.0, weight_decay=0.01)
    torch.testing.assert_close(hypergradient(Unrolled(4), opt, found), logits.grad, rtol=1e-3, atol=1e-9)


def test_both_estimators_agree_where_training_has_converged_and_lower_the_weights_of_wrong_labels():
    found = load(Config())
    opt = metaopt.functional.sgd(lr=10.0, momentum=0.9, weight_decay=0.01)
    unrolled, implicit = (hypergradient(make(200), opt, found) for make in (Unrolled, Implicit))
    torch.testing.assert_close(unrolled, implicit, rtol=1e-2, atol=1e-2 * implicit.abs().max().item())
    assert f1(implicit > 0, found.wrong) > 0.75  # at once; to flag everything gives 2 / 3


def test_the_given_share_of_labels_is_changed_to_other_classes():
    found, right = load(Config(flipped=0.3, seed=2)), load_digits().train.labels
    assert found.wrong.sum() == 300
    assert torch.equal(found.data.train.labels != right, found.wrong)
    assert set(found.data.train.labels.tolist()) == set(range(10))
    assert len(set(((found.data.train.labels - right) % 10)[found.wrong].tolist())) == 9


def test_f1_is_the_harmonic_mean_of_precision_and_recall():
    wrong = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0]).bool()
    flagged = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0]).bool()
    assert f1(flagged, wrong) == pytest.approx(2 / (3 / 2 + 4 / 2))


def write_idx(folder, name, images, labels):
    header = struct.pack(">4B3I", 0, 0, 8, 3, *images.shape)
    (folder / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
    header = struct.pack(">4BI", 0, 0, 8, 1, len(labels))
    (folder / f"{name}-labels-idx1-ubyte").write_bytes(header + labels.numpy().tobytes())


def test_a_folder_of_idx_files_takes_the_place_of_the_digits(tmp_path):
    data = load_digits()
    for name, split in (("train", data.train), ("t10k", data.test)):
        write_idx(tmp_path, name, (split.images[:, 0] * 16).byte(), split.labels.byte())
    found = load(Config(data=tmp_path, examples=300))
    assert [part.images.shape for part in found.data] == [(300, 64), (300, 64), (400, 64)]
    assert found.data.train.images.square().sum(1).mean().item() == pytest.approx(1)
    assert found.wrong.sum() == 150
    with pytest.raises(ValueError, match="examples must be <= 500 for this data, got examples=501"):
        load(Config(data=tmp_path, examples=501))


@pytest.mark.parametrize("name", ["examples", "steps", "meta_steps", "flipped", "meta_lr"])
def test_bad_options_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*{name}=0"):
        Config(**{name: 0})
