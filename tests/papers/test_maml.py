"""MAML and Meta-SGD: their meta-gradients, the error they report, and that both learn, Meta-SGD faster."""

import pytest
import torch

import metaopt
from experiments.maml import STUDY, Config, score
from experiments.parts.learned_start import FromStart, Start
from metaopt.tasks import Sinusoids, Tasks

LR = 0.03


def by_hand(start, rates, wave):
    """The error on the query points after one step on the support points, for one wave, on the weights themselves."""
    amplitude, phase, support, query = wave

    def error(weights, x):
        hidden = torch.relu(x @ weights["w1"] + weights["b1"])
        hidden = torch.relu(hidden @ weights["w2"] + weights["b2"])
        return ((hidden @ weights["w3"] + weights["b3"] - amplitude * torch.sin(x - phase)) ** 2).mean()

    grads = torch.autograd.grad(error(start, support), list(start.values()), create_graph=True)
    stepped = {name: p - rates[name] * g for (name, p), g in zip(start.items(), grads, strict=True)}
    return error(stepped, query)


def problem(rates: bool, count: int = 4):
    family = Sinusoids(shots=5, queries=7)
    generator = torch.Generator().manual_seed(0)
    hyper = Start(family.initial(generator), LR if rates else None)
    waves = family.sample(count, generator)
    weights = {name: p.detach().clone().requires_grad_() for name, p in hyper.start.items()}
    steps = {name: torch.full_like(p, LR, requires_grad=True) for name, p in weights.items()}
    return family, hyper, waves, weights, steps


@pytest.mark.parametrize("rates", [False, True])
def test_meta_gradient_is_that_of_a_loop_over_tasks_with_the_step_taken_on_the_weights(rates):
    family, hyper, waves, weights, steps = problem(rates)
    tasks = Tasks(FromStart(family, hyper), waves)
    loss = metaopt.metagrad.Unrolled(steps=1).backward(tasks, metaopt.functional.sgd(lr=LR), hyper)

    expected = torch.stack([by_hand(weights, steps, wave) for wave in zip(*waves, strict=True)]).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name in weights:
        torch.testing.assert_close(hyper.start[name].grad, weights[name].grad)
        if rates:
            torch.testing.assert_close(hyper.lr[name].grad, steps[name].grad)


def test_meta_gradient_has_the_second_order_part():
    family, hyper, waves, weights, steps = problem(rates=False)
    tasks = Tasks(FromStart(family, hyper), waves)
    metaopt.metagrad.Unrolled(steps=1).backward(tasks, metaopt.functional.sgd(lr=LR), hyper)
    # Rates of 0 leave the gradient of the error without adaptation.
    torch.stack(
        [by_hand(weights, dict.fromkeys(steps, 0.0), wave) for wave in zip(*waves, strict=True)]
    ).mean().backward()
    assert (hyper.start["w2"].grad - weights["w2"].grad).norm() > 0.1 * weights["w2"].grad.norm()


def test_score_is_the_mean_error_after_one_step_over_the_waves():
    family, hyper, waves, weights, steps = problem(rates=False, count=6)
    errors = torch.stack([by_hand(weights, steps, wave).detach() for wave in zip(*waves, strict=True)])
    found = score(hyper, family, waves, LR)
    assert found.mean == pytest.approx(errors.mean().item(), rel=1e-5)
    assert found.error == pytest.approx(1.96 * errors.std().item() / 6**0.5, rel=1e-4)


@pytest.mark.long
def test_both_learn_and_meta_sgd_learns_faster(tmp_path):
    findings = STUDY.findings(Config(quick=True, out=tmp_path, test_tasks=500))
    assert len(findings) == 3
    assert all(finding.holds for finding in findings), findings
    assert "Meta-SGD" in (tmp_path / "maml.svg").read_text()


@pytest.mark.parametrize("name", ["iterations", "tasks", "shots", "test_tasks", "lr", "meta_lr"])
def test_bad_options_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be .*{name}=0"):
        Config(**{name: 0})
