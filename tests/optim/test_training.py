"""Training a small convolutional network on real images: schedule, clipping, a checkpoint in the middle."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from metaopt import optim
from metaopt.tasks.digits import convnet, load_digits
from tests.optim.problem import PAIRS

STEPS, CHECKPOINT, IMAGES = 15, 7, 200


def losses(kind: Any, lr: float, **options: Any) -> list[float]:
    """Of a run that is saved after some steps and goes on in new objects."""
    pytest.importorskip("sklearn")
    images, labels = load_digits().train

    def parts() -> tuple[Any, Any, Any]:
        model = convnet(4)
        optimizer = kind(model.parameters(), lr=lr, **options)
        return model, optimizer, CosineAnnealingLR(optimizer, STEPS)

    torch.manual_seed(0)
    model, optimizer, scheduler = parts()
    seen = []
    for step in range(STEPS):
        loss = nn.functional.cross_entropy(model(images[:IMAGES]), labels[:IMAGES])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        seen.append(loss.item())
        if step == CHECKPOINT:
            saved = io.BytesIO()
            torch.save([part.state_dict() for part in (model, scheduler, optimizer)], saved)
            saved.seek(0)
            model, optimizer, scheduler = parts()
            for part, state in zip((model, scheduler, optimizer), torch.load(saved, weights_only=True), strict=True):
                part.load_state_dict(state)
    return seen


@pytest.mark.parametrize("fused", [False, None, True])
@pytest.mark.parametrize(("ours", "theirs", "lr"), [(*PAIRS[0], 4.0), (*PAIRS[1], 0.02)], ids=["RAdam", "Rprop"])
def test_losses_of_a_run_with_a_checkpoint_are_those_of_torch(
    ours: Any, theirs: Any, lr: float, fused: bool | None
) -> None:
    actual, expected = losses(ours, lr, fused=fused), losses(theirs, lr)
    assert min(expected[-3:]) < 0.9 * expected[0]
    if fused and ours is optim.RAdam:
        assert actual == pytest.approx(expected, rel=1e-5)
    else:
        assert actual == expected
