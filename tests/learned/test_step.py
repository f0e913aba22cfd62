"""One step: against implementations written another way, and the protocol of a functional optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import metaopt
from metaopt.functional import Optimizer
from metaopt.learned import AdafactorMLPOptimizer, LearnedOptimizer, LSTMOptimizer, MLPOptimizer
from tests.learned.problems import DESIGNS, big_steps, loss, start, unroll

each_design = pytest.mark.parametrize("design", DESIGNS)
SHAPES = ((), (4,), (3, 5), (5, 3), (2, 3, 1, 3))
TIMESCALES = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)


def mlp(opt: LearnedOptimizer, features: list[Tensor], t: int, scales: tuple[float, float]) -> Tensor:
    """The change, from features as matrices of rows, with torch's own layers."""
    columns = [f.reshape(-1) / torch.sqrt(f.square().mean() + 1e-5) for f in features]
    columns += [torch.full_like(columns[0], math.tanh(t / scale - 1)) for scale in TIMESCALES]
    x, w = torch.stack(columns, dim=1), dict(opt.named_parameters())
    x = torch.relu(torch.nn.functional.linear(x, w["weight1"], w["bias1"]))
    x = torch.relu(torch.nn.functional.linear(x, w["weight2"], w["bias2"]))
    d, a = torch.nn.functional.linear(x, w["weight3"], w["bias3"]).unbind(1)
    return (-scales[0] * d * torch.exp(scales[1] * a)).view_as(features[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_mlp_does_what_its_docstring_lists(shape: tuple[int, ...]) -> None:
    opt = MLPOptimizer(step_scale=0.3, magnitude_scale=0.2).double()
    p = expected = torch.randn(shape, dtype=torch.float64)
    state, averages = opt.init(p), [torch.zeros_like(p)] * 6
    for t in range(4):
        g = torch.randn_like(p)
        decays = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
        averages = [decay * m + (1 - decay) * g for decay, m in zip(decays, averages, strict=True)]
        expected = expected + mlp(opt, [g, expected, *averages], t, (0.3, 0.2))
        p, state = opt.step(p, g, state)
        torch.testing.assert_close(p, expected)
        torch.testing.assert_close(state.momenta, torch.stack(averages))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_adafactor_mlp_does_what_its_docstring_lists(shape: tuple[int, ...]) -> None:
    opt = AdafactorMLPOptimizer(step_scale=0.3, magnitude_scale=0.2).double()
    p = expected = torch.randn(shape, dtype=torch.float64)
    state = opt.init(p)
    decays, k = (0.9, 0.99, 0.999), range(3)
    # the second largest dimension and the largest, written out
    small, large = {(3, 5): (0, 1), (5, 3): (1, 0), (2, 3, 1, 3): (1, 3)}.get(shape, (None, None))
    m, v, row, col = [torch.zeros_like(p)] * 3, torch.zeros_like(p), [torch.zeros(())] * 3, [torch.zeros(())] * 3
    for t in range(4):
        g = 30 * torch.randn_like(p)  # beside which the small terms under its roots vanish
        m = [d * x + (1 - d) * g for d, x in zip(decays, m, strict=True)]
        v = 0.999 * v + 0.001 * g**2
        over = [g**2 if dim is None else (g**2).mean(dim, keepdim=True) for dim in (large, small)]
        row = [d * x + (1 - d) * over[0] for d, x in zip(decays, row, strict=True)]
        col = [d * x + (1 - d) * over[1] for d, x in zip(decays, col, strict=True)]
        if small is None:
            factor = [r**-0.5 for r in row]
        else:
            factor = [(r / r.mean(small, keepdim=True) * c) ** -0.5 for r, c in zip(row, col, strict=True)]
        rows, cols = [r.expand(shape) for r in row], [c.expand(shape) for c in col]
        features = [
            *(g, expected, *m, v, *(x * (v + 1e-6) ** -0.5 for x in m), (v + 1e-6) ** -0.5),
            *(*(g * f for f in factor), *rows, *cols),
            *(*((r + 1e-8) ** -0.5 for r in rows), *((c + 1e-8) ** -0.5 for c in cols)),
            *(m[i] * factor[i] for i in k),
        ]
        assert len(features) == 28
        expected = expected + mlp(opt, features, t, (0.3, 0.2))
        p, state = opt.step(p, g, state)
        torch.testing.assert_close(p, expected, rtol=1e-6, atol=1e-6)


def test_the_lstm_is_that_of_torch() -> None:
    opt = LSTMOptimizer().double()
    w = dict(opt.named_parameters())
    reference = torch.nn.LSTM(2, 20, num_layers=2).double()
    with torch.no_grad():
        for layer, inputs in (("1", 2), ("2", 20)):
            getattr(reference, f"weight_ih_l{int(layer) - 1}").copy_(w[f"gates{layer}"][:, :inputs])
            getattr(reference, f"weight_hh_l{int(layer) - 1}").copy_(w[f"gates{layer}"][:, inputs:])
            getattr(reference, f"bias_ih_l{int(layer) - 1}").copy_(w[f"gates{layer}_bias"])
            getattr(reference, f"bias_hh_l{int(layer) - 1}").zero_()
    grads = [torch.randn(3, 2, dtype=torch.float64) * 10.0 ** -(2 * t) for t in range(4)]  # the last are tiny
    p = torch.zeros(3, 2, dtype=torch.float64)
    state, expected, memory = opt.init(p), p, None
    for g in grads:
        rows = [
            [math.log(abs(x)) / 10, math.copysign(1, x)] if abs(x) >= math.exp(-10) else [-1, math.exp(10) * x]
            for x in g.flatten().tolist()
        ]
        out, memory = reference(torch.tensor([rows], dtype=torch.float64), memory)
        expected = expected + 0.1 * (out @ w["output"].T + w["output_bias"]).view(3, 2)
        p, state = opt.step(p, g, state)
        torch.testing.assert_close(p, expected)


@each_design
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_state_keep_shape_and_dtype(
    design: type[LearnedOptimizer], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    opt, p = design(), torch.randn(shape).to(dtype)
    state = before = opt.init(p)
    for _ in range(3):
        new, state = opt.step(p, torch.randn_like(p), state)
        assert new.dtype == dtype
        assert new.shape == p.shape
        assert new.isfinite().all()
    for old, now in zip(before, state, strict=True):
        assert (old.shape, old.dtype) == (now.shape, now.dtype)
    assert all(part.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for part in state[1:])
    assert state.step == 3


@each_design
def test_untrained_steps_are_small_and_not_zero(design: type[LearnedOptimizer]) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        opt, p = design(), torch.randn(20, 10)
        scale = opt.config().get("step_scale", opt.config().get("output_scale"))
        new, _ = opt.step(p, torch.randn_like(p), opt.init(p))
        size = (new - p).square().mean().sqrt() / scale
        assert 1e-3 < size < 1


@each_design
def test_none_leaves_parameter_state_and_counter_alone(design: type[LearnedOptimizer]) -> None:
    opt, params = design(), start(torch.float32)
    state = opt.init(params)
    grads = {**torch.func.grad(loss)(params), "vector": None}
    new, after = opt.step(params, grads, state)
    assert new["vector"] is params["vector"]
    for old, now in zip(state, after, strict=True):
        assert torch.equal(old["vector"], now["vector"])
    assert after.step["layer"]["matrix"] == 1
    alone, _ = opt.step(params["layer"]["matrix"], grads["layer"]["matrix"], opt.init(params["layer"]["matrix"]))
    torch.testing.assert_close(new["layer"]["matrix"], alone, rtol=0, atol=0)


@each_design
def test_a_step_modifies_nothing(design: type[LearnedOptimizer]) -> None:
    opt, params = design(), start()
    _, state = unroll(opt, params, 2)
    given = (params, torch.func.grad(loss)(params), state)
    copies = [leaf.clone() for leaf in pytree.tree_leaves(given)]
    opt.step(*given)
    torch.testing.assert_close(pytree.tree_leaves(given), copies, rtol=0, atol=0)


@each_design
def test_lr_multiplies_the_step(design: type[LearnedOptimizer]) -> None:
    opt, params = design(), start()
    state, grads = opt.init(params), torch.func.grad(loss)(params)
    full = opt.step(params, grads, state)[0]["vector"] - params["vector"]
    steps = torch.tensor([1.0, 0.0, 2.0, 3.0], dtype=torch.float64)
    both, each = {"vector": 0.5, "layer.matrix": 1.0}, {"vector": steps, "layer.matrix": 1.0}
    for lr, factor in ((0.5, 0.5), (torch.tensor(0.5), 0.5), (each, steps), (both, 0.5), (lambda t: 2.0 + t, 2.0)):
        change = opt.step(params, grads, state, lr=lr)[0]["vector"] - params["vector"]
        torch.testing.assert_close(change, factor * full)
    assert opt.step(params, grads, state, lr=0.0)[0]["vector"].equal(params["vector"])


def test_a_learned_optimizer_is_an_optimizer_whose_lr_can_be_learned_alone() -> None:
    opt = MLPOptimizer(hidden=4)
    assert isinstance(opt, Optimizer)
    hyper = metaopt.Hyperparameters(opt, learn=("lr",))
    task = metaopt.tasks.NoisyQuadratic(noise=0.0)
    metaopt.metagrad.Unrolled(steps=3).backward(task, opt, hyper)
    assert hyper.lr.grad != 0
    assert all(p.grad is None for p in opt.parameters())


@each_design
def test_it_can_be_built_again_from_its_config_and_its_weights(design: type[LearnedOptimizer]) -> None:
    opt = design(lr=0.5)
    torch.manual_seed(1)
    other = design(**opt.config())
    assert other.config() == opt.config()
    assert repr(other) == repr(opt)
    params = start()
    assert not unroll(other, params, 2)[0]["vector"].equal(unroll(opt, params, 2)[0]["vector"])
    other.load_state_dict(opt.state_dict())
    assert unroll(other, params, 2)[0]["vector"].equal(unroll(opt, params, 2)[0]["vector"])
    assert opt.hyperparameters == ("lr", "weights")
    assert list(opt.defaults) == ["lr", "weights"]
    assert opt.defaults["weights"].keys() == opt()["weights"].keys() == dict(opt.named_parameters()).keys()
    assert all(given is p for given, p in zip(opt()["weights"].values(), opt.parameters(), strict=True))


def test_the_weights_are_as_many_as_published() -> None:
    counts = {design.architecture: sum(p.numel() for p in design().parameters()) for design in DESIGNS}
    assert counts == {"lstm": 5141, "mlp": 1762, "adafactor_mlp": 197}


@each_design
def test_what_cannot_be_trained_is_named(design: type[LearnedOptimizer]) -> None:
    opt = design()
    for wrong in (torch.ones(2, dtype=torch.complex64), torch.ones(2, dtype=torch.int64), 1.0):
        with pytest.raises(TypeError, match=r"params\['a\.b'\] must be a real floating-point tensor"):
            opt.init({"a": {"b": wrong}})
    params = {"w": torch.ones(2)}
    state = opt.init(params)
    wrongs: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
        (TypeError, "has no hyperparameter 'beta'", (params, params, state), {"beta": 1.0}),
        (ValueError, "lr must be >= 0", (params, params, state), {"lr": -1.0}),
        (ValueError, "lr of shape .* does not broadcast", (params, params, state), {"lr": torch.ones(3)}),
        (ValueError, "lr has no value for parameter 'w'", (params, params, state), {"lr": {"v": 1.0}}),
        (ValueError, "weights must be those of", (params, params, state), {"weights": {}}),
        (ValueError, "grads must have the structure of params", (params, {}, state), {}),
        (ValueError, r"grads\['w'\] must have the shape", (params, {"w": torch.ones(3)}, state), {}),
        (TypeError, r"grads\['w'\] must have a dtype", (params, {"w": torch.ones(2, dtype=torch.int64)}, state), {}),
        (TypeError, "state must be a", (params, params, None), {}),
    ]
    for error, message, args, hyper in wrongs:
        with pytest.raises(error, match=message):
            opt.step(*args, **hyper)
    with pytest.raises(ValueError, match="lr must be >= 0"):
        design(lr=-1.0)
    with pytest.raises(ValueError, match=r"(units|hidden) must be >= 1"):
        design(0)


@each_design
def test_a_large_step_is_what_the_other_tests_take(design: type[LearnedOptimizer]) -> None:
    params, _ = unroll(big_steps(design), start(), 5)
    assert (params["vector"] - start()["vector"]).abs().max() > 1e-2
