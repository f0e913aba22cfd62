"""A learned optimizer learns: random quadratics, by truncated unrolls."""

from __future__ import annotations

import torch
from torch import Generator

from metaopt.learned import MLPOptimizer
from metaopt.metagrad import Unrolled
from metaopt.tasks import RandomQuadratics, TaskBatch, Tasks
from metaopt.unroll.plain import InnerStep


@torch.no_grad()
def final_loss(opt: MLPOptimizer, steps: int) -> float:
    """The mean over tasks that it has not seen."""
    family = RandomQuadratics(10, start=0.3)
    tasks = Tasks(family, family.sample(256, Generator().manual_seed(99)))
    step, carry = InnerStep(tasks, opt), InnerStep(tasks, opt).init(opt(), Generator().manual_seed(98))
    for t in range(steps):
        carry, _ = step(carry, tasks.batch(t, None), opt(), t)
    return tasks.meta_loss(carry.params, {}).item()


def test_some_meta_steps_on_random_quadratics_teach_the_mlp_to_minimise_them() -> None:
    opt = MLPOptimizer(step_scale=0.1, magnitude_scale=0.1)
    tasks, estimator = TaskBatch(RandomQuadratics(10, start=0.3), 32), Unrolled(50, "mean", truncation=20)
    meta_optimizer = torch.optim.Adam(opt.parameters(), lr=5e-3)
    generator = Generator().manual_seed(0)
    assert final_loss(opt, 0) > 18  # 10 from the targets, 9 from the starts
    assert final_loss(opt, 50) > 2
    for _ in range(20):
        meta_optimizer.zero_grad()
        estimator.backward(tasks, opt, opt, generator)
        torch.nn.utils.clip_grad_norm_(opt.parameters(), 1.0)
        meta_optimizer.step()
    assert final_loss(opt, 50) < 1.2
