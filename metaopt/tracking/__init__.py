"""Where the measurements of a run go: a JSONL file, wandb, both, nowhere.

    with metaopt.tracking.start("runs/first", config, name="first") as run:    # record.jsonl, and wandb where installed
        metaopt.meta_train(task, opt, hyper, estimator, meta_optimizer, tracker=run.scope(optimizer="radam"))
        run.artifact("hyperparameters", hyper.numbers())

`Tracker` is all that `metaopt.meta_train` demands of one: ``log``. `Run` is what these here can do, and `complete`
makes the one out of the other. Nothing in this package knows what is measured.
"""

from metaopt.tracking.completing import complete
from metaopt.tracking.jsonl import JSONL
from metaopt.tracking.nothing import Nothing
from metaopt.tracking.several import Several
from metaopt.tracking.starting import start
from metaopt.tracking.tracker import Run, Tracker
from metaopt.tracking.weights_and_biases import WandB

__all__ = ["JSONL", "Nothing", "Run", "Several", "Tracker", "WandB", "complete", "start"]
