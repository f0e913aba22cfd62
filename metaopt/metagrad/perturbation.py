"""Antithetic perturbations of a module's parameters, and the gradient estimates that come of them.

A pair of particles has hyperparameters perturbed by +e and -e, in the unconstrained coordinates of ``hyper``, where
every value lies in its domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor, nn

from metaopt.checks import check_count, check_real
from metaopt.functional import Optimizer
from metaopt.unroll.program import Split, Tensors

Noise = list[Tensor]  # for each parameter that requires grad one tensor, with a leading dimension of pairs (the rows)


class Perturbation:
    """Of the parameters of ``hyper`` that require grad.

    Args:
        opt: completes the values.
        hyper: a module whose call returns a mapping of values.
        std: standard deviation of the perturbations.
        pairs: how many.
        rows: which of them are evaluated; all are drawn.

    Raises:
        ValueError: no parameter requires grad.
    """

    def __init__(self, opt: Optimizer, hyper: nn.Module, std: float, pairs: int, rows: range) -> None:
        self._opt, self._hyper, self._std, self._pairs, self._rows = opt, hyper, std, pairs, rows
        self._named = {name: p for name, p in hyper.named_parameters() if p.requires_grad}
        if not self._named:
            raise ValueError("hyper has nothing to learn: none of its parameters requires grad")

    def zeros(self) -> Noise:
        return [p.new_zeros(len(self._rows), *p.shape) for p in self._named.values()]

    def draw(self, generator: Generator | None) -> Noise:
        """Normal noise, on the generator's device if that is not the parameters'."""
        noise = []
        for p in self._named.values():
            device = p.device if generator is None else generator.device
            sample = torch.randn(self._pairs, *p.shape, generator=generator, dtype=p.dtype, device=device)
            noise.append(self._std * sample[self._rows.start : self._rows.stop].to(p.device))
        return noise

    def values(self, noise: Noise) -> Tensors:
        """The tensors among the values of each particle: first all with +noise, then all with -noise."""

        def of_one(*parameters: Tensor) -> Tensors:
            given = dict(zip(self._named, parameters, strict=True))
            return self._split(torch.func.functional_call(self._hyper, given)).tensors

        shifted = [torch.cat([p + e, p - e]) for p, e in zip(self._named.values(), noise, strict=True)]
        result: Tensors = torch.vmap(of_one)(*shifted)
        if not result:
            raise ValueError(
                "hyper has nothing to learn: none of its values is a tensor; "
                "a function of the step hides what it is made of, a metaopt.Schedule does not"
            )
        return result

    def exact(self) -> dict[str, Any]:
        """All values, without a perturbation."""
        return {**self._opt.defaults, **self._hyper()}

    def _split(self, returned: Mapping[str, Any]) -> Split:
        return Split({**self._opt.defaults, **returned})

    def deliver(self, noise: Noise, losses: Tensor) -> None:
        """Accumulate ``sum_i e_i (L(+e_i) - L(-e_i)) / (2 N std^2)`` into ``.grad`` of the parameters.

        Args:
            noise: e, of the N pairs that are evaluated.
            losses: of the particles, in the order of `values`.
        """
        plus, minus = losses.view(2, -1)
        weight = (plus - minus) / (2.0 * len(plus) * self._std**2)
        for p, e in zip(self._named.values(), noise, strict=True):
            grad = torch.tensordot(weight.to(e), e, dims=1)
            p.grad = grad if p.grad is None else p.grad + grad


def check_perturbation(std: float, pairs: int) -> None:
    """Raise for a standard deviation that is no positive number, or pairs that are no whole number >= 1."""
    check_real("std", std)
    if not std > 0 or std == float("inf"):
        raise ValueError(f"std must be > 0 and finite, got std={std}")
    check_count("pairs", pairs)
