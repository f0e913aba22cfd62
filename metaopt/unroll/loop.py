"""A live module and a live optimizer, unrolled in place of the user's training loop.

    with metaopt.inner_loop(model, optimizer, hyper()) as (fmodel, fopt):
        for x, y in batches:
            fopt.step(loss_fn(fmodel(x), y))
        loss_fn(fmodel(x_val), y_val).backward()     # into hyper, and into model.parameters()

The model and the optimizer are read once, at the start; the loop works on copies, so that nothing of the user's is
touched, whatever happens in the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.functional.values import at_step
from metaopt.tracking import Tracker
from metaopt.unroll.live import groups_of, load_state, save_state
from metaopt.unroll.plain import cut


@contextmanager
def inner_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    hyper: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    *,
    first_order: bool = False,
    tracker: Tracker | None = None,
) -> Iterator[tuple[InnerModel, InnerOptimizer]]:
    """Train differentiably, from where a live model and a live optimizer stand.

    Args:
        model: any module. Its parameters that the optimizer holds are unrolled; buffers (BatchNorm's) are carried.
        optimizer: torch.optim's or metaopt.optim's RAdam or Rprop, or torch.optim's Adam, AdamW or SGD; its groups and
            their state are the starting point.
        hyper: hyperparameter values for every group, or a list with one mapping per group; what they leave out comes
            from the groups. Values may be tensors, mappings by parameter name, or callables of the step, which counts
            from 0 at the start of the loop.
        first_order: take gradients as constants: cheaper, and exact for Rprop alone, which does so anyway.
        tracker: gets the loss of each step as ``train/loss``, by the number of the step; see `metaopt.tracking`.

    Yields:
        ``(fmodel, fopt)``: call the one in place of the model, and ``fopt.step(loss)`` in place of zero_grad, backward
        and step. The graph is kept from the start, for ``backward`` into hyper and into ``model.parameters()``; under
        ``torch.no_grad()`` around the block it is not.

    Raises:
        TypeError: an optimizer of another type, or a hyperparameter that it does not have.
        ValueError: a hyperparameter outside its domain, a parameter of the optimizer that is not the model's, amsgrad.

    Example:
        >>> import metaopt
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> lr = torch.tensor(0.1, requires_grad=True)
        >>> x, y = torch.ones(4, 2), torch.ones(4, 1)
        >>> with metaopt.inner_loop(model, optimizer, {"lr": lr}) as (fmodel, fopt):
        ...     for _ in range(3):
        ...         fopt.step(nn.functional.mse_loss(fmodel(x), y))
        ...     nn.functional.mse_loss(fmodel(x), y).backward()
        >>> bool(lr.grad < 0), model.weight.grad.shape
        (True, torch.Size([1, 2]))
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError("inner_loop takes gradients, which torch.inference_mode() rules out; use torch.no_grad()")
    keep_graph = torch.is_grad_enabled()
    fmodel = InnerModel(model)
    fopt = InnerOptimizer(fmodel, optimizer, hyper, keep_graph=keep_graph, first_order=first_order, tracker=tracker)
    try:
        # Gradients of the inner loss are needed all the same where no graph is to be kept.
        with torch.enable_grad():
            yield fmodel, fopt
    finally:
        fmodel.release()


class InnerModel:
    """The model with the inner loop's parameters and buffers.

    Attributes:
        params: the unrolled parameters as they stand now, by name.
        buffers: the buffers as they stand now, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._training: bool | None = None
        self.params: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {name: buffer.clone() for name, buffer in model.named_buffers()}
        self._attributes = [(module, _tensor_attributes(module)) for module in model.modules()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Fresh copies, because a module updates its buffers in place, and the graph of an earlier call may hold them.
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        tensors = {**self.params, **buffers}
        with _mode(self._model, self._training):
            result = torch.func.functional_call(self._model, tensors, args, kwargs)
        self.buffers = {name: tensors[name] for name in buffers}
        return result

    def train(self, mode: bool = True) -> InnerModel:
        """Run in training mode from here on, whatever the live model's mode, which stays as it is."""
        self._training = mode
        return self

    def eval(self) -> InnerModel:
        """Run in evaluation mode from here on, whatever the live model's mode, which stays as it is."""
        return self.train(False)

    def release(self) -> None:
        """Let go of what a module has cached of the inner loop's parameters."""
        for module, before in self._attributes:
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
            for name in _tensor_attributes(module).keys() - before.keys():
                delattr(module, name)
            vars(module).update(before)


def _tensor_attributes(module: nn.Module) -> dict[str, Tensor]:
    """Tensors that are neither parameters nor buffers: the normalized weight of torch.nn.utils.spectral_norm."""
    return {name: value for name, value in vars(module).items() if isinstance(value, Tensor)}


@contextmanager
def _mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    if training is None:
        yield
        return
    before = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in before:
            module.training = mode


class InnerOptimizer:
    """The optimizer of an inner loop; made by `inner_loop`."""

    def __init__(
        self,
        model: InnerModel,
        optimizer: torch.optim.Optimizer,
        hyper: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None,
        *,
        keep_graph: bool,
        first_order: bool,
        tracker: Tracker | None,
    ) -> None:
        self._fmodel = model
        self._optimizer = optimizer
        self._keep_graph = keep_graph
        self._first_order = first_order
        self._tracker = tracker
        self._count = 0
        self._groups = groups_of(model._model, optimizer, hyper)
        self._states = []
        for group in self._groups:
            # A copy, through which the graph leads back to the live parameter: apply() may then overwrite that one.
            params = {name: self._root(p) for name, p in group.live.items()}
            model.params.update(params)
            self._states.append(load_state(optimizer, group, params, at_step(group.hyper, 0)))

    def _root(self, p: Tensor) -> Tensor:
        return p.clone() if self._keep_graph else p.detach().clone().requires_grad_()

    def step(self, loss: Tensor) -> None:
        """Differentiate the inner loss and step; parameters that it does not depend on are left alone.

        Args:
            loss: a scalar computed with ``fmodel``.

        Raises:
            ValueError: the loss is not a scalar, or depends on none of the parameters; the parameters are unchanged.
        """
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"loss must be a scalar tensor, got {tuple(loss.shape) if isinstance(loss, Tensor) else loss!r}"
            )
        params = self._fmodel.params
        if not params:
            raise ValueError("there is nothing to step: the optimizer holds no parameter that requires grad")
        keep_graph = self._keep_graph and torch.is_grad_enabled()
        second_order = (
            keep_graph and not self._first_order and any(group.opt.differentiates_gradients for group in self._groups)
        )
        if not loss.requires_grad:
            raise ValueError("loss has no graph: compute it from fmodel, with gradients enabled")
        gradients = torch.autograd.grad(
            loss,
            list(params.values()),
            create_graph=second_order,
            # The caller may still want the inner loss in the meta-loss; its graph goes when the caller drops it.
            retain_graph=keep_graph,
            allow_unused=True,
        )
        if all(gradient is None for gradient in gradients):
            raise ValueError("loss depends on no parameter of fmodel: was it computed with the live model?")
        grads = dict(zip(params, gradients, strict=True))
        new_params, new_states = {}, []
        with torch.set_grad_enabled(keep_graph):
            for group, state in zip(self._groups, self._states, strict=True):
                stepped, new_state = group.opt.step(
                    {name: params[name] for name in group.live},
                    {name: grads[name] for name in group.live},
                    state,
                    **at_step(group.hyper, self._count),
                )
                new_params.update(stepped)
                new_states.append(new_state)
        self._fmodel.params.update(new_params)
        self._states = new_states
        self._count += 1
        if not keep_graph:
            self.detach()
        if self._tracker is not None:
            self._tracker.log({"train": {"loss": loss.item()}}, self._count - 1)

    def detach(self) -> None:
        """Cut the graph here: later steps see parameters, buffers and state as constants (truncation)."""
        fmodel = self._fmodel
        fmodel.params = {name: p.detach().requires_grad_() for name, p in fmodel.params.items()}
        fmodel.buffers = {name: buffer.detach() for name, buffer in fmodel.buffers.items()}
        self._states = [cut(state) for state in self._states]

    @torch.no_grad()
    def apply(self) -> None:
        """Write parameters, buffers and optimizer state back into the live model and the live optimizer."""
        for group, state in zip(self._groups, self._states, strict=True):
            for name, p in group.live.items():
                p.copy_(self._fmodel.params[name])
            save_state(self._optimizer, group, state)
        for name, buffer in self._fmodel._model.named_buffers():
            buffer.copy_(self._fmodel.buffers[name])
