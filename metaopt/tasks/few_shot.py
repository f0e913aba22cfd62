"""Few-shot classification: each task is to tell a few classes apart from a few examples of each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from metaopt.tasks.network import Network, Params
from metaopt.tasks.task import Values


class Examples(NamedTuple):
    """Inputs of shape (n, ...) and labels of shape (n,)."""

    images: Tensor
    labels: Tensor


class Episode(NamedTuple):
    """What a task is trained on, and what it is judged by; with a leading dimension of ``count``."""

    support: Examples
    query: Examples


class FewShot:
    """Tasks of ``ways`` classes drawn from a bank, with ``shots`` support and ``queries`` query examples of each.

    Args:
        bank: examples, of shape (classes, examples of each, ...).
        network: from an example to ``ways`` numbers.
        ways: classes of a task, labelled 0 to ``ways - 1`` in the order they were drawn.
        shots: examples of each class for the inner loss.
        queries: other examples of each class, for the meta-loss.
        batch_size: support examples per inner step, drawn with replacement; None for all of them.
        permute: each task sees the numbers of its inputs in an order of its own.

    Raises:
        ValueError: an argument below 1, ``ways`` above the number of classes, ``shots + queries`` above the number of
            examples.

    Example:
        >>> from metaopt.tasks.network import Dense
        >>> family = FewShot(torch.randn(30, 8, 4), Dense(4, 2), ways=2, shots=1, queries=3)
        >>> episodes = family.sample(10, None)
        >>> episodes.support.images.shape, episodes.query.labels.shape
        (torch.Size([10, 2, 4]), torch.Size([10, 6]))

    References:
        Vinyals et al., Matching Networks for One Shot Learning, NeurIPS 2016, section 4.
    """

    def __init__(
        self,
        bank: Tensor,
        network: Network,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        batch_size: int | None = None,
        permute: bool = False,
    ) -> None:
        classes, examples = bank.shape[:2]
        if not 1 <= ways <= classes:
            raise ValueError(f"ways must be in 1..{classes}, the number of classes, got ways={ways}")
        if shots < 1 or queries < 1 or shots + queries > examples:
            raise ValueError(
                f"shots and queries must be >= 1 and together at most {examples}, the examples of a class, "
                f"got shots={shots} and queries={queries}"
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1 or None, got batch_size={batch_size}")
        self.bank = bank
        self.network = network
        self.ways = ways
        self.shots = shots
        self.queries = queries
        self.batch_size = batch_size
        self.permute = permute

    def sample(self, count: int, generator: Generator | None) -> Episode:
        """Support of shape (count, ways * shots, ...) and query of shape (count, ways * queries, ...)."""
        classes, examples, *shape = self.bank.shape
        per_class = self.shots + self.queries
        # The order of random numbers is a random order: the first few are a draw without replacement.
        which = torch.rand(count, classes, generator=generator).argsort(-1)[:, : self.ways, None]
        rows = torch.rand(count, self.ways, examples, generator=generator).argsort(-1)[..., :per_class]
        images = self.bank[which, rows]
        if self.permute:
            flat = images.flatten(3)
            order = torch.rand(count, flat.shape[-1], generator=generator).argsort(-1)
            images = flat.gather(-1, order[:, None, None].expand_as(flat)).unflatten(-1, shape)
        labels = torch.arange(self.ways)[:, None].expand(count, self.ways, per_class)
        parts = zip(*(x.split([self.shots, self.queries], 2) for x in (images, labels)), strict=True)
        return Episode(*(Examples(x.flatten(1, 2), y.flatten(1, 2)) for x, y in parts))

    def task(self, config: Episode) -> FewShotTask:
        """The task of one episode."""
        return FewShotTask(self, config)

    def initial(self, generator: Generator | None) -> Params:
        """Fresh weights: where a task starts, and what MAML learns."""
        return self.network.init(generator)

    def predict(self, params: Params, images: Tensor) -> Tensor:
        """Logits of shape (n, ways) for inputs of shape (n, ...)."""
        return self.network(params, images)


class FewShotTask:
    """One task of `FewShot`."""

    def __init__(self, family: FewShot, config: Episode) -> None:
        self.family = family
        self.config = config

    def init(self, generator: Generator | None) -> Params:
        return self.family.initial(generator)

    def batch(self, step: int, generator: Generator | None) -> Examples:
        images, labels = self.config.support
        if self.family.batch_size is None:
            return self.config.support
        index = torch.randint(len(labels), (self.family.batch_size,), generator=generator)
        return Examples(images[index], labels[index])

    def loss(self, params: Params, batch: Examples, hyper: Values) -> Tensor:
        return nn.functional.cross_entropy(self.family.predict(params, batch.images), batch.labels)

    def meta_loss(self, params: Params, hyper: Values) -> Tensor:
        return self.loss(params, self.config.query, hyper)

    @torch.no_grad()
    def test(self, params: Params) -> dict[str, Tensor]:
        """``loss`` and ``accuracy`` on the query examples, both 0-d: what generalises is judged on other tasks."""
        images, labels = self.config.query
        logits = self.family.predict(params, images)
        accuracy = (logits.argmax(-1) == labels).float().mean()
        return {"loss": nn.functional.cross_entropy(logits, labels), "accuracy": accuracy}
