"""One meta-gradient from many processes: torchrun starts them, torch.distributed joins them.

    torchrun --nproc-per-node 4 -m study        # where dist.init_process_group() comes before meta_train

Every process draws the randomness of all runs, or pairs of unrolls, in the order of a single one, and trains its share.
The meta-gradient is the mean over all, summed in float64: 1, 2 and 4 processes give the same to rounding.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.utils import _pytree as pytree

from metaopt.functional import Optimizer
from metaopt.metagrad.estimator import Estimator
from metaopt.metagrad.evolution import Evolution
from metaopt.tasks import Runs, Task, TaskBatch
from metaopt.tasks.share import SomeRuns
from metaopt.unroll.randomness import Snapshot

T = TypeVar("T")
# Parameters that differ by more than this share between processes have not been learned together.
_APART = 1e-6


class Ranks:
    """The processes of the default group of ``torch.distributed``; this one alone where there is none.

    Attributes:
        rank: the number of this process.
        count: how many there are.

    Example:
        >>> import metaopt
        >>> task = metaopt.tasks.Replicas(metaopt.tasks.NoisyQuadratic(), count=4)
        >>> opt = metaopt.functional.sgd(lr=0.1)
        >>> hyper = metaopt.Hyperparameters(opt, learn=("lr",))
        >>> loss = Ranks().backward(metaopt.metagrad.Unrolled(steps=10), task, opt, hyper)
        >>> hyper.lr.grad.item() < 0
        True
    """

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.rank: int = dist.get_rank() if together else 0
        self.count: int = dist.get_world_size() if together else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that tracks, prints and saves."""
        return self.rank == 0

    def rows(self, total: int) -> range:
        """Which of the runs or pairs are this process's: as many as each other's, or one more."""
        return range(self.rank * total // self.count, (self.rank + 1) * total // self.count)

    def check(self, estimator: Estimator, task: Task | TaskBatch) -> None:
        """Raise for what cannot be shared.

        Raises:
            TypeError: a single task, with an estimator that has no pairs.
            ValueError: fewer runs or pairs than processes.
        """
        if self.count == 1:
            return
        if not isinstance(estimator, Evolution) and not isinstance(task, Runs | TaskBatch):
            raise TypeError(
                f"{self.count} processes share the runs of a task, and task={type(task).__name__} is a single one: "
                "wrap it in metaopt.tasks.Replicas, or draw it from a metaopt.tasks.TaskBatch"
            )
        total = _total(estimator, task)
        if total < self.count:
            what = f"pairs={total}" if isinstance(estimator, Evolution) else f"count={total} runs"
            raise ValueError(f"every process needs a run or a pair of its own, got {what} for {self.count} processes")

    def backward(
        self,
        estimator: Estimator,
        task: Task | TaskBatch,
        opt: Optimizer,
        hyper: nn.Module,
        generator: Generator | None = None,
    ) -> Tensor:
        """What ``estimator.backward`` does, shared by the processes, all of which get the same.

        Args:
            estimator: of an `ES` and its kind the pairs are shared, of any other the runs.
            task, opt, hyper, generator: as for the estimator, and the same in every process.

        Raises:
            TypeError, ValueError: what cannot be shared; see `check`.
            RuntimeError: parameters or generators differ between the processes.
        """
        if self.count == 1:
            return estimator.backward(task, opt, hyper, generator)
        self.check(estimator, task)
        total = _total(estimator, task)
        rows = self.rows(total)
        learned = [p for p in hyper.parameters() if p.requires_grad]
        before = [p.grad for p in learned]
        try:
            for p in learned:
                p.grad = None
            if isinstance(estimator, Evolution):
                loss = estimator.backward_share(rows, task, opt, hyper, generator)
            else:
                assert isinstance(task, Runs | TaskBatch)
                loss = estimator.backward(_share(task, rows), opt, hyper, generator)
            own = [p.grad for p in learned]
        finally:
            for p, grad in zip(learned, before, strict=True):
                p.grad = grad
        mean, grads = self._mean(len(rows) / total, loss, learned, own, generator)
        for p, grad in zip(learned, grads, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else p.grad + grad
        return mean

    def _mean(
        self,
        weight: float,
        loss: Tensor,
        learned: Sequence[Tensor],
        own: Sequence[Tensor | None],
        generator: Generator | None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The weighted means over the processes: all that they tell each other about a meta-gradient, at once."""
        flat = [torch.zeros_like(p) if grad is None else grad for p, grad in zip(learned, own, strict=True)]
        there = [float(grad is not None) for grad in own]
        numbers = torch.cat([torch.stack([*map(_double, [loss])]), *(_double(grad).flatten() for grad in flat)])
        marks = torch.zeros(self.count, 2, dtype=torch.float64)  # each process fills in its row
        marks[self.rank] = torch.tensor([_size(learned), _checksum(generator)])
        message = torch.cat([weight * numbers, torch.tensor(there, dtype=torch.float64), marks.flatten()])
        sums = self._reduced(message, dist.ReduceOp.SUM, learned[0].device)
        numbers, got, marks = sums.split([len(numbers), len(there), marks.numel()])
        _refuse_drift(marks.view(self.count, 2))
        parts = numbers[1:].split([p.numel() for p in learned])
        grads = [
            part.view(p.shape).to(p) if any_of_them else None
            for p, part, any_of_them in zip(learned, parts, got.tolist(), strict=True)
        ]
        return numbers[0].to(loss), grads

    def largest(self, numbers: Sequence[float]) -> list[float]:
        """Of each number the largest that a process has."""
        if self.count == 1:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.float64)
        largest: list[float] = self._reduced(message, dist.ReduceOp.MAX, torch.device("cpu")).tolist()
        return largest

    def of_first(self, do: Callable[[], T]) -> T:
        """What the first process gets by doing something, tensors on the CPU; an error is raised by all of them."""
        if self.count == 1:
            return do()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = _on_cpu(do())
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome)
        if outcome[1] is not None:
            raise outcome[1]
        result: T = outcome[0]
        return result

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What an estimator would have as ``state_dict`` in a single process; to be used by the first one alone.

        Args:
            state: of this process. Tensors under ``"rows"`` have a row for each of its runs or pairs, or no dimension;
                all else is the same in every process.
        """
        if self.count == 1 or "rows" not in state:
            return dict(state)
        parts: list[Any] = [None] * self.count
        dist.gather_object(_on_cpu(state["rows"]), parts if self.first else None)
        return {**state, "rows": pytree.tree_map(_joined, *parts)} if self.first else {}

    def own(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """This process's share of such a state, whatever number of processes it is from."""
        if self.count == 1 or "rows" not in state:
            return dict(state)

        def of(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.dim():
                return leaf
            rows = self.rows(len(leaf))
            return leaf[rows.start : rows.stop].clone()

        return {**state, "rows": pytree.tree_map(of, state["rows"])}

    def align(self, hyper: nn.Module, generator: Generator | None) -> None:
        """Let all begin with the parameters and the randomness of the first."""
        if self.count == 1:
            return
        state, randomness = self.of_first(lambda: (dict(hyper.state_dict()), Snapshot(generator).state_dict()))
        if self.first:
            return
        hyper.load_state_dict(state)
        here = Snapshot(generator)
        here.load_state_dict(self.randomness(randomness))
        here.restore()

    def randomness(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state of a `Snapshot` of the first process, whose GPU, number 0, stands for each one's own."""
        gpus = state["gpus"]
        return {**state, "gpus": gpus[:1] * torch.cuda.device_count()} if self.count > 1 and gpus else state

    @staticmethod
    def _reduced(message: Tensor, op: Any, near: torch.device) -> Tensor:
        """All processes' messages reduced to one: on this kind of device, if the group's backend reaches it."""
        reached = [part.split(":")[0] for part in str(dist.get_backend_config()).split(",")]
        kind = near.type if near.type in reached else reached[0]
        message = message.to(near if near.type == kind else kind)  # for NCCL the current device
        dist.all_reduce(message, op)
        return message.cpu()


def _total(estimator: Any, task: Any) -> int:
    """How many pairs or runs there are to share."""
    total: int = estimator.pairs if isinstance(estimator, Evolution) else task.count
    return total


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _size(learned: Sequence[Tensor]) -> float:
    """A number that is another one for other parameters."""
    return float(sum(_double(p).sum() for p in learned))


def _checksum(generator: Generator | None) -> float:
    state = torch.get_rng_state() if generator is None else generator.get_state()
    return float(zlib.crc32(state.numpy().tobytes()))


def _refuse_drift(marks: Tensor) -> None:
    """Raise where processes have what they should share: in all of them alike."""
    sizes, checksums = marks.unbind(1)
    if not torch.allclose(sizes, sizes[0], rtol=_APART, atol=_APART, equal_nan=True):
        raise RuntimeError(
            f"hyper's parameters differ between the processes (sums {sizes.tolist()}): all of them must make the same "
            "meta-optimizer, and nothing else may change the parameters"
        )
    if not bool((checksums == checksums[0]).all()):
        raise RuntimeError(
            "the random generators differ between the processes: init and batch of the task, and sample of its family, "
            "must draw the same in each of them"
        )


def _joined(first: Any, *others: Any) -> Any:
    """The rows of all processes."""
    return torch.cat([first, *others]) if isinstance(first, Tensor) and first.dim() else first


def _on_cpu(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, tree)


def _share(task: Runs | TaskBatch, rows: range) -> Runs | TaskBatch:
    """Some rows of several runs, or of all that is drawn.

    It is the same object every time, so that an estimator with an unroll between two windows knows it again.
    """
    kept = vars(task).get("_share")
    if kept is None or kept.rows != rows:
        if isinstance(task, Runs):
            kept = SomeRuns(task, rows)
        else:
            kept = copy.copy(task)
            kept.rows = rows
        vars(task)["_share"] = kept
    return cast("Runs | TaskBatch", kept)
