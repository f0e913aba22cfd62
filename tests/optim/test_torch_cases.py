"""The optimizer cases of torch's own test suite, for the drop-ins next to torch's classes.

With ``TRITON_INTERPRET=1`` the fused updates are the Triton kernels, in Triton's interpreter.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metaopt import optim
from tests.optim.problem import F64, PAIRS
from tests.optim.test_dropin import assert_same

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ImportWarning)  # it looks for hypothesis, for other tests
    from torch.testing._internal import common_optimizers as cases

STEPS = 12
FUSED = [False, None, True]
SUITES: list[tuple[Any, Any, Any, Any]] = [
    (*PAIRS[0], cases.optim_inputs_func_radam, cases.optim_error_inputs_func_radam),
    (*PAIRS[1], cases.optim_inputs_func_rprop, cases.optim_error_inputs_func_rprop),
]


def configurations() -> Iterator[Any]:
    """Those for a GPU, which include those for a CPU; ``capturable`` is for a GPU alone."""
    for ours, theirs, inputs, _ in SUITES:
        on_gpu = inputs(device="cuda")
        assert [case.desc for case in on_gpu][: len(inputs(device="cpu"))] == [case.desc for case in inputs("cpu")]
        for case in on_gpu:
            kwargs = {name: value for name, value in case.kwargs.items() if name != "capturable"}
            yield pytest.param(ours, theirs, kwargs, id=f"{ours.__name__}: {case.desc}")
    for betas in ((0.9, 0.9999), (0.0, 0.9), (0.3, 0.5)):  # the last never rectifies
        yield pytest.param(*PAIRS[0], {"betas": betas}, id=f"RAdam: betas={betas}")


def trained(kind: Any, dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor], Any]:
    """Losses, parameters and optimizer after some steps of a small model from a fixed start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    x, y = torch.randn(8, 3, dtype=dtype), torch.randn(8, 1, dtype=dtype)
    sign = -1 if options.get("maximize") else 1
    optimizer = kind(model.parameters(), **options)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = sign * nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses, list(model.parameters()), optimizer


def assert_rounded_alike(actual: Tensor, expected: Tensor, lr: float) -> None:
    """The same but for the rounding of a few operations a step, whose size is about lr."""
    unit = 1.0 if expected.dtype == torch.float32 else 1e-4  # torch's rectification loses some ten of float64's bits
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert ((actual - expected).abs() <= unit * (3e-7 * expected.abs() + 1e-6 * lr)).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(("ours", "theirs", "kwargs"), list(configurations()))
def test_training_is_that_of_torch(
    ours: Any, theirs: Any, kwargs: dict[str, Any], fused: bool | None, dtype: torch.dtype
) -> None:
    losses, params, optimizer = trained(ours, dtype, fused=fused, **kwargs)
    if fused:  # torch computes 1 - lr weight_decay in the precision of a tensor lr, a fused step in float64
        kwargs = {name: value.item() if isinstance(value, Tensor) else value for name, value in kwargs.items()}
    expected_losses, expected_params, expected = trained(theirs, dtype, foreach=False, **kwargs)
    assert (expected_losses[-1] < expected_losses[0]) != bool(kwargs.get("maximize"))
    states, expected_states = ([o.state[p] for p in ps] for o, ps in ((optimizer, params), (expected, expected_params)))
    if fused and ours is optim.RAdam:
        lr = expected.defaults["lr"]
        for actual, right in zip([*losses, *params], [*expected_losses, *expected_params], strict=True):
            assert_rounded_alike(actual, right, lr)
        for state, right in zip(states, expected_states, strict=True):
            assert list(state) == list(right)
            assert_same(state["step"], right["step"])
            for key in ("exp_avg", "exp_avg_sq"):
                assert_rounded_alike(state[key], right[key], float(right[key].abs().max()))
    else:
        assert_same(losses, expected_losses)
        assert_same(params, expected_params)
        assert_same(states, expected_states)


def errors() -> Iterator[Any]:
    for ours, theirs, _, inputs in SUITES:
        for case in inputs(device="cpu", dtype=torch.float32):
            yield pytest.param(ours, theirs, case, id=f"{ours.__name__}: {case.optimizer_error_input.desc}")


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize(("ours", "theirs", "case"), list(errors()))
def test_bad_input_is_refused_in_the_words_of_torch(ours: Any, theirs: Any, case: Any, fused: bool | None) -> None:
    assert case.error_on is cases.OptimizerErrorEnum.CONSTRUCTION_ERROR
    given = case.optimizer_error_input
    caught = []
    for kind, options in ((theirs, {}), (ours, {"fused": fused})):
        params = [torch.zeros(2)] if given.params is None else given.params
        with pytest.raises(case.error_type, match=case.error_regex) as error:
            kind(params, **given.kwargs, **options)
        caught.append((type(error.value), str(error.value)))
    assert caught[0] == caught[1]
