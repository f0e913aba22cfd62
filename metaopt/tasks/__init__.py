"""Things to train, each with a judgement of the result; alone, or in families from which tasks are drawn."""

from metaopt.tasks.classification import Classification, Split, Splits
from metaopt.tasks.digits import Digits, convnet, load_digits, mlp
from metaopt.tasks.family import TaskBatch, TaskFamily, Tasks
from metaopt.tasks.few_shot import Episode, Examples, FewShot
from metaopt.tasks.glyphs import Glyphs, load_glyphs
from metaopt.tasks.idx import load_idx
from metaopt.tasks.mnist1d import MNIST1D, load_mnist1d, mlp1d
from metaopt.tasks.mnist1d_subsets import MNIST1DSubsets
from metaopt.tasks.network import Conv, Dense
from metaopt.tasks.quadratic import NoisyQuadratic
from metaopt.tasks.quadratics import Quadratic, RandomQuadratics
from metaopt.tasks.runs import Replicas, Runs
from metaopt.tasks.sinusoid import Sinusoids, Wave
from metaopt.tasks.task import Task

__all__ = [
    "MNIST1D",
    "Classification",
    "Conv",
    "Dense",
    "Digits",
    "Episode",
    "Examples",
    "FewShot",
    "Glyphs",
    "MNIST1DSubsets",
    "NoisyQuadratic",
    "Quadratic",
    "RandomQuadratics",
    "Replicas",
    "Runs",
    "Sinusoids",
    "Split",
    "Splits",
    "Task",
    "TaskBatch",
    "TaskFamily",
    "Tasks",
    "Wave",
    "convnet",
    "load_digits",
    "load_glyphs",
    "load_idx",
    "load_mnist1d",
    "mlp",
    "mlp1d",
]
