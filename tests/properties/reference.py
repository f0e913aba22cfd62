"""The algorithms once more, as their papers write them, for any kind of number in `arithmetic`.

Independent of metaopt and of torch.optim: no protection against cancellation or 0, which exact numbers do not need.
Coefficients are Decimals throughout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from tests.properties.arithmetic import ROUNDING

Options = Mapping[str, Any]


def trajectory(
    name: str, options: Options, numbers: Any, param: Any, zero: Any, grads: Iterable[Any]
) -> Iterator[tuple[Any, ...]]:
    """The parameter and its state, without the step, after each step.

    Args:
        options: hyperparameters, each a Decimal or a pair of them, and flags.
        numbers: `Exact` or `Rounded`.
        zero: of the kind of ``param``.
    """
    step = {"rprop": rprop, "sgd": sgd}.get(name, moments)
    state: tuple[Any, ...]
    if name == "rprop":
        state = (zero, zero + numbers.coefficient(options["lr"]))
    else:
        state = (zero,) if name == "sgd" else (zero, zero)
    for count, grad in enumerate(grads, start=1):
        descent = -grad if options["maximize"] else grad
        param, *state = step(name, options, numbers, count, param, descent, *state)  # type: ignore[assignment]
        yield (param, *state)


def moments(name: str, options: Options, numbers: Any, t: int, p: Any, g: Any, m: Any, v: Any) -> tuple[Any, ...]:
    """Adam (Kingma & Ba 2015, algorithm 1), AdamW (Loshchilov & Hutter 2019) and RAdam (Liu et al. 2020)."""
    lr, (b1, b2), eps, decay = (options[key] for key in ("lr", "betas", "eps", "weight_decay"))
    coefficient = numbers.coefficient
    if decay and options["decoupled_weight_decay"]:
        shrink = -(lr * decay) + 1  # rounded in the size of its terms, unlike 1 - beta
        p = coefficient(shrink, absolute=2 * ROUNDING * float(lr * decay)) * p
    elif decay:
        g = g + coefficient(decay) * p
    m = numbers.average(m, g, b1)
    v = coefficient(b2) * v + (coefficient(1 - b2) * g) * g
    correction1, correction2 = 1 - b1**t, 1 - b2**t
    relative = 3 * ROUNDING + numbers.correction(b1**t)
    if name != "radam":
        denominator = v.sqrt() / coefficient(correction2.sqrt(), numbers.correction(b2**t)) + coefficient(eps)
        return p - numbers.step(coefficient(lr / correction1, relative), m, denominator), m, v
    squared, error = rectification(b2, t, numbers)
    if squared is None:
        size = coefficient(lr / correction1, relative)
        return p - size * m if error == 0 else (p - size * m).wider(error), m, v
    size = coefficient(lr * (correction2 * squared).sqrt() / correction1, relative + error + numbers.correction(b2**t))
    return p - numbers.step(size, m, v.sqrt() + coefficient(eps)), m, v


def rectification(b2: Decimal, t: int, numbers: Any) -> tuple[Decimal | None, float]:
    """The square of RAdam's factor, or None where a step is not rectified; and the factor's relative error.

    The error is infinite where rounding decides whether the step is rectified.
    """
    rho_inf = 2 / (1 - b2) - 1
    ratio = 2 * t / (1 - b2**t)
    rho = rho_inf - ratio * b2**t
    # rho is a difference; b2^t, which it subtracts, is known no better than its complement 1 - b2^t.
    relative = numbers.correction(b2**t)
    absolute = relative * float(rho_inf + ratio * (1 + b2**t)) if relative else 0.0
    if abs(rho - 5) <= absolute:
        return None, float("inf")
    if rho < 5:
        return None, 0.0
    squared = (rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)
    return squared, 2 * absolute / float(rho - 4) + 2 * relative * float(rho_inf / (rho_inf - 4))


def rprop(name: str, options: Options, numbers: Any, t: int, p: Any, g: Any, prev: Any, size: Any) -> tuple[Any, ...]:
    """iRprop- (Igel & Huesken 2000), for Exact numbers: the comparison with torch's is to the last bit."""
    agreement = numbers.sign(g) * numbers.sign(prev)
    size = size * {1: options["etas"][1], -1: options["etas"][0], 0: 1}[agreement]
    size = numbers.clamp(size, *options["step_sizes"])
    g = 0 * g if agreement < 0 else g
    return p - numbers.sign(g) * size, g, size


def sgd(name: str, options: Options, numbers: Any, t: int, p: Any, g: Any, buffer: Any) -> tuple[Any, ...]:
    """With momentum as in torch (Sutskever et al. 2013), which dampens no first gradient."""
    momentum, coefficient = options["momentum"], numbers.coefficient
    if options["weight_decay"]:
        g = g + coefficient(options["weight_decay"]) * p
    dampened = t > 1 and momentum and options["dampening"]
    buffer = coefficient(momentum) * buffer + (coefficient(1 - options["dampening"]) * g if dampened else g)
    along = g + coefficient(momentum) * buffer if options["nesterov"] else buffer
    return p - coefficient(options["lr"]) * along, buffer
