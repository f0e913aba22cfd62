"""Things to train, each with a judgement of the result."""

from metaopt.tasks.digits import Digits, DigitsData, Split, convnet, load_digits, mlp
from metaopt.tasks.quadratic import NoisyQuadratic
from metaopt.tasks.task import Replicas, Task

__all__ = ["Digits", "DigitsData", "NoisyQuadratic", "Replicas", "Split", "Task", "convnet", "load_digits", "mlp"]
