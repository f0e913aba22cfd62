"""Things to train, each with a judgement of the result."""

from metaopt.tasks.digits import Digits, DigitsData, Split, convnet, load_digits, mlp
from metaopt.tasks.family import TaskBatch, TaskFamily, Tasks
from metaopt.tasks.quadratic import NoisyQuadratic
from metaopt.tasks.runs import Replicas, Runs
from metaopt.tasks.task import Task

__all__ = [
    "Digits",
    "DigitsData",
    "NoisyQuadratic",
    "Replicas",
    "Runs",
    "Split",
    "Task",
    "TaskBatch",
    "TaskFamily",
    "Tasks",
    "convnet",
    "load_digits",
    "mlp",
]
