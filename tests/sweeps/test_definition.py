"""What sweep files say: files in the format of wandb's documentation, and one error for every mistake."""

import subprocess
import sys
from pathlib import Path

import pytest

from metaopt.sweeps import Sweep, SweepError, parse, read
from metaopt.sweeps.definition import Hyperband, Metric
from metaopt.sweeps.distributions import Categorical, Constant, IntUniform, LogUniformValues, QNormal, Uniform

FILES = Path(__file__).parent / "files"


def test_a_file_for_bayes() -> None:
    sweep = read(FILES / "bayes.yaml")
    assert sweep == Sweep(
        method="bayes",
        metric=Metric("validation_loss", "minimize", 0.01),
        parameters={
            "batch_size": Categorical((16, 32, 64)),
            "epochs": Categorical((5, 10, 15)),
            "learning_rate": Uniform(0.0001, 0.1),
            "optimizer": Categorical(("adam", "sgd")),
        },
        paths={name: (name,) for name in ("batch_size", "epochs", "learning_rate", "optimizer")},
        early_terminate=Hyperband(min_iter=3, eta=3, strict=False),
        run_cap=30,
        program="train.py",
        command=(),
        name="sweepdemo",
        description="the learning rate and how long",
        project="demo",
        entity="team",
        text=(FILES / "bayes.yaml").read_text(),
    )


def test_a_file_with_nested_parameters() -> None:
    sweep = read(FILES / "nested.yaml")
    assert sweep.parameters == {
        "optimizer.lr": LogUniformValues(1e-5, 0.1),
        "optimizer.nested_category_1.momentum": Uniform(0.0, 0.9),
        "optimizer.nested_category_1.weight_decay": Categorical((0.0001, 0.0005, 0.001)),
        "top_level_param": IntUniform(0, 5),
    }
    assert sweep.paths["optimizer.nested_category_1.momentum"] == ("optimizer", "nested_category_1", "momentum")
    assert sweep.metric == Metric("val_accuracy", "maximize")
    assert sweep.early_terminate == Hyperband(max_iter=27, s=2, eta=3, strict=True)
    assert sweep.command == ("${env}", "python3", "${program}", "-b", "your-training-config", "${args}")


def test_a_grid_has_every_point_with_the_last_name_changing_fastest() -> None:
    points = read(FILES / "grid.yaml").grid()
    assert [tuple(point) for point in points] == [("dropout", "epochs", "fc_layer_size", "learning_rate")] * 12
    # wandb leaves out the upper end of q_uniform.
    assert [tuple(point.values()) for point in points] == [
        *[
            (0.3, 1, 128, 0),
            (0.3, 1, 128, 0.1),
            (0.3, 1, 129, 0),
            (0.3, 1, 129, 0.1),
            (0.3, 1, 130, 0),
            (0.3, 1, 130, 0.1),
        ],
        *[
            (0.4, 1, 128, 0),
            (0.4, 1, 128, 0.1),
            (0.4, 1, 129, 0),
            (0.4, 1, 129, 0.1),
            (0.4, 1, 130, 0),
            (0.4, 1, 130, 0.1),
        ],
    ]


def test_a_grid_takes_a_value_that_is_listed_twice_once() -> None:
    sweep = parse("{program: a, method: grid, parameters: {a: {values: [x, y, x, [1], [1]]}, b: {values: [1, true]}}}")
    assert [list(point.values()) for point in sweep.grid()] == [
        *[["x", 1], ["x", True], ["y", 1], ["y", True], [[1], 1], [[1], True]]
    ]


@pytest.mark.parametrize(
    ("parameter", "distribution"),
    [
        ("{value: 3}", Constant(3)),
        ("{value: null}", Constant(None)),
        ("{values: [[1, 2], {a: 1}, null]}", Categorical(([1, 2], {"a": 1}, None))),
        ("{min: 1, max: 2}", IntUniform(1, 2)),
        ("{min: 1, max: 2.0}", Uniform(1, 2.0)),
        ("{min: 1.0, max: 2}", Uniform(1.0, 2)),
        ("{distribution: uniform, min: 1, max: 2}", Uniform(1, 2)),
        ("{distribution: q_normal}", QNormal(0.0, 1.0, 1)),
        ("{distribution: q_normal, sigma: 0, q: 0.5}", QNormal(0.0, 0, 0.5)),
    ],
)
def test_a_distribution_that_is_not_named_follows_from_the_keys(parameter: str, distribution: object) -> None:
    assert parse(f"{{program: a, method: random, parameters: {{p: {parameter}}}}}").parameters == {"p": distribution}


@pytest.mark.parametrize(
    "extra",
    [
        "controller: {type: local}",
        "apiVersion: v1\nkind: sweep",
        "metric: {name: loss, impute: latest, impute_while_running: best}",
        "metric: {name: loss}\nearly_terminate: {type: hyperband, min_iter: 3, s: 2}",
        "metric: {name: loss}\nearly_terminate: {type: hyperband, min_iter: 1, max_iter: 9, s: 2}",
        "description: ''",
    ],
)
def test_what_wandb_accepts_is_accepted(extra: str) -> None:
    parse(f"program: a\nmethod: random\nparameters: {{a: {{value: 1}}}}\n{extra}")


BASE = "program: a, parameters: {a: {value: 1}}"


def with_parameter(parameter: str, method: str = "random") -> str:
    return f"{{program: a, method: {method}, parameters: {{lr: {parameter}}}}}"


def with_rule(rule: str) -> str:
    return f"{{{BASE}, method: grid, metric: {{name: loss}}, early_terminate: {rule}}}"


MISTAKES = {
    # the file
    "": "sweep.yaml: a sweep is a mapping (program:, method:, parameters:), got an empty file",
    "[1]": "sweep.yaml: a sweep is a mapping (program:, method:, parameters:), got list",
    "{a: [1, }": "sweep.yaml: line 1, column 9: expected the node content, but found '}'",
    f"{{{BASE}, method: grid, run_cap: 2, 'run_cap': 3}}": (
        "sweep.yaml: line 1, column 69: the key 'run_cap' stands here a second time"
    ),
    "program: a\nparameters:\n  lr: {value: 1}\n  lr: {value: 2}\n": (
        "sweep.yaml: line 4, column 3: the key 'lr' stands here a second time"
    ),
    # its keys
    "{program: a}": "sweep.yaml: method is missing: grid, random, bayes",
    f"{{{BASE}, method: gird}}": (
        "sweep.yaml: method must be one of grid, random, bayes, got 'gird'; did you mean 'grid'?"
    ),
    f"{{{BASE}, method: custom}}": "sweep.yaml: method must be one of grid, random, bayes, got 'custom'",
    f"{{{BASE}, method: grid, runcap: 3}}": "sweep.yaml: unknown key 'runcap'; did you mean 'run_cap'?",
    f"{{{BASE}, method: grid, 3: 3}}": "sweep.yaml: unknown key 3",
    f"{{{BASE}, method: grid, name: 3}}": "sweep.yaml: name must be a text, got 3",
    f"{{{BASE}, method: grid, run_cap: 0}}": "sweep.yaml: run_cap must be >= 1, got 0",
    f"{{{BASE}, method: grid, run_cap: 2.5}}": "sweep.yaml: run_cap must be a whole number, got 2.5",
    f"{{{BASE}, method: grid, run_cap: true}}": "sweep.yaml: run_cap must be a whole number, got True",
    f"{{{BASE}, method: grid, job: x}}": (
        "sweep.yaml: job needs wandb's servers; a sweep that is run here has a program and a metric"
    ),
    f"{{{BASE}, method: grid, metrics: {{name: loss}}}}": (
        "sweep.yaml: metrics; did you mean 'metric'? "
        "(metrics needs wandb's servers; a sweep that is run here has a program and a metric)"
    ),
    "{method: grid, parameters: {a: {value: 1}}}": (
        "sweep.yaml: program is missing: the script to run, such as program: train.py"
    ),
    "{method: grid, command: [x, '${program}'], parameters: {a: {value: 1}}}": (
        "sweep.yaml: program is missing: the script to run, such as program: train.py"
    ),
    f"{{{BASE}, method: grid, command: python a.py}}": (
        "sweep.yaml: command must be a list of words, such as [python, '${program}', '${args}'], got 'python a.py'"
    ),
    f"{{{BASE}, method: grid, command: ['${{arg}}']}}": (
        "sweep.yaml: command: unknown macro ${arg}; did you mean 'args'?"
    ),
    # metric
    f"{{{BASE}, method: bayes}}": (
        "sweep.yaml: method bayes needs a metric, such as metric: {name: loss, goal: minimize}"
    ),
    f"{{{BASE}, method: grid, metric: loss}}": "sweep.yaml: metric must be a mapping, got metric: 'loss'",
    f"{{{BASE}, method: grid, metric: {{goal: minimize}}}}": "sweep.yaml: metric: name is missing",
    f"{{{BASE}, method: grid, metric: {{name: a, goal: min}}}}": (
        "sweep.yaml: metric: goal must be one of minimize, maximize, got 'min'"
    ),
    f"{{{BASE}, method: grid, metric: {{name: a, gaol: minimize}}}}": (
        "sweep.yaml: metric: unknown key 'gaol'; did you mean 'goal'?"
    ),
    f"{{{BASE}, method: grid, metric: {{name: a, target: low}}}}": (
        "sweep.yaml: metric: target must be a number, got 'low'"
    ),
    # early_terminate
    f"{{{BASE}, method: grid, early_terminate: {{type: hyperband, min_iter: 3}}}}": (
        "sweep.yaml: early_terminate needs a metric, such as metric: {name: loss, goal: minimize}"
    ),
    with_rule("hyperband"): "sweep.yaml: early_terminate must be a mapping, got early_terminate: 'hyperband'",
    with_rule("{min_iter: 3}"): "sweep.yaml: early_terminate: type is missing: hyperband",
    with_rule("{type: median}"): "sweep.yaml: early_terminate: type must be one of hyperband, got 'median'",
    with_rule("{type: hyperband}"): "sweep.yaml: early_terminate: hyperband needs min_iter, or max_iter and s",
    with_rule("{type: hyperband, max_iter: 9}"): (
        "sweep.yaml: early_terminate: max_iter needs s, the number of brackets, got max_iter=9 alone"
    ),
    with_rule("{type: hyperband, max_iter: 2, s: 1}"): (
        "sweep.yaml: early_terminate: max_iter / eta must be >= 1, the first bracket, got 2 / 3"
    ),
    with_rule("{type: hyperband, min_iter: 0}"): "sweep.yaml: early_terminate: min_iter must be >= 1, got 0",
    with_rule("{type: hyperband, min_iter: 1, eta: 1}"): "sweep.yaml: early_terminate: eta must be > 1, got 1",
    with_rule("{type: hyperband, min_iter: 1, eta: .nan}"): (
        "sweep.yaml: early_terminate: eta must be a finite number, got nan"
    ),
    with_rule("{type: hyperband, min_iter: 1, strict: 1}"): (
        "sweep.yaml: early_terminate: strict must be true or false, got 1"
    ),
    with_rule("{type: hyperband, miniter: 1}"): (
        "sweep.yaml: early_terminate: unknown key 'miniter'; did you mean 'min_iter'?"
    ),
    # parameters
    "{program: a, method: grid}": "sweep.yaml: parameters is missing",
    "{program: a, method: grid, parameters: {}}": "sweep.yaml: parameters is empty",
    "{program: a, method: grid, parameters: [lr]}": "sweep.yaml: parameters must be a mapping, got parameters: ['lr']",
    "{program: a, method: grid, parameters: {on: {value: 1}}}": (
        "sweep.yaml: parameters: a name starts with a letter and has letters, digits and _ . - in it, got True "
        "(YAML reads on, off, yes and no so: put quotes around the name)"
    ),
    "{program: a, method: grid, parameters: {a b: {value: 1}}}": (
        "sweep.yaml: parameters: a name starts with a letter and has letters, digits and _ . - in it, got 'a b'"
    ),
    "{program: a, method: grid, parameters: {a.b: {value: 1}, a: {parameters: {b: {value: 1}}}}}": (
        "sweep.yaml: two parameters are called a.b: one with a dot in its name, one nested"
    ),
    with_parameter("0.1"): "sweep.yaml: parameters: lr must be a mapping, such as lr: {value: 0.1}",
    with_parameter("{}"): (
        "sweep.yaml: parameters.lr: empty: it needs value, values, min and max, distribution or parameters"
    ),
    with_parameter("{parameters: {}}"): "sweep.yaml: parameters.lr: parameters is empty",
    with_parameter("{parameters: {x: {value: 1}}, min: 1}"): (
        "sweep.yaml: parameters.lr: unknown key 'min' of a parameter with others nested in it, which takes parameters"
    ),
    with_parameter("{parameters: {x: {vaule: 1}}}"): (
        "sweep.yaml: parameters.lr.parameters.x: unknown key 'vaule'; did you mean 'value'?"
    ),
    with_parameter("{vaules: [1]}"): "sweep.yaml: parameters.lr: unknown key 'vaules'; did you mean 'values'?",
    with_parameter("{values: []}"): "sweep.yaml: parameters.lr: values is empty",
    with_parameter("{values: adam}"): "sweep.yaml: parameters.lr: values must be a list, got values: 'adam'",
    with_parameter("{value: 2020-01-01}"): (
        "sweep.yaml: parameters.lr: JSON, in which values are kept, has no datetime.date(2020, 1, 1): "
        "a text needs quotes around it"
    ),
    with_parameter("{value: 1, min: 0}"): (
        "sweep.yaml: parameters.lr: unknown key 'min' of constant, which takes distribution, value"
    ),
    with_parameter("{min: 0.1}"): "sweep.yaml: parameters.lr: min needs max",
    with_parameter("{max: 1}"): "sweep.yaml: parameters.lr: max needs min",
    with_parameter("{min: 0.1, max: 1, q: 0.1}"): (
        "sweep.yaml: parameters.lr: max, min, q: which distribution? Such as distribution: q_uniform"
    ),
    with_parameter("{mu: 0.1}"): "sweep.yaml: parameters.lr: mu: which distribution? Such as distribution: normal",
    with_parameter("{min: 1, max: 0}"): "sweep.yaml: parameters.lr: min must be < max, got min=1, max=0",
    with_parameter("{min: 1.5, max: 1.5}"): (
        "sweep.yaml: parameters.lr: min must be < max, got min=1.5, max=1.5 (a single number is value:)"
    ),
    with_parameter("{min: 1e-5, max: 0.1}"): (
        "sweep.yaml: parameters.lr: min must be a finite number, got '1e-5' (text to YAML; write 1.0e-05)"
    ),
    with_parameter("{min: 0, max: .inf}"): "sweep.yaml: parameters.lr: max must be a finite number, got inf",
    with_parameter("{min: 0, max: true}"): "sweep.yaml: parameters.lr: max must be a finite number, got True",
    with_parameter("{distribution: normall}"): "did you mean 'normal'?",
    with_parameter("{distribution: log_uniform_values, min: 0.1}"): (
        "sweep.yaml: parameters.lr: log_uniform_values needs max"
    ),
    with_parameter("{distribution: log_uniform_values, min: 0, max: 1}"): (
        "sweep.yaml: parameters.lr: min must be > 0, got 0"
    ),
    with_parameter("{distribution: log_uniform, min: 1, max: 1000}"): (
        "sweep.yaml: parameters.lr: max is an exponent of e, got 1000: "
        "distributions in *_values take the values themselves"
    ),
    with_parameter("{distribution: int_uniform, min: 0, max: 1.5}"): (
        "sweep.yaml: parameters.lr: max must be a whole number, got 1.5"
    ),
    with_parameter(
        "{distribution: q_uniform, min: 0, max: 1, q: 0}"
    ): "sweep.yaml: parameters.lr: q must be > 0, got 0",
    with_parameter("{distribution: q_uniform, min: 2, max: 1}"): (
        "sweep.yaml: parameters.lr: min must be < max, got min=2, max=1"
    ),
    with_parameter("{distribution: normal, sigma: -1}"): "sweep.yaml: parameters.lr: sigma must be >= 0, got -1",
    with_parameter("{distribution: normal, min: 0, max: 1}"): (
        "sweep.yaml: parameters.lr: unknown key 'min' of normal, which takes distribution, mu, sigma"
    ),
    with_parameter("{distribution: log_normal, mu: 2000}"): (
        "sweep.yaml: parameters.lr: exp(mu + 6 sigma) is no float: mu=2000, sigma=1.0 belong to log X"
    ),
    with_parameter("{distribution: beta, a: 0}"): "sweep.yaml: parameters.lr: a must be > 0, got 0",
    with_parameter("{values: [1, 2], probabilities: [0.5, 0.6]}"): (
        "sweep.yaml: parameters.lr: probabilities must sum to 1, got 1.1"
    ),
    with_parameter("{values: [1, 2], probabilities: [1]}"): "sweep.yaml: parameters.lr: 1 probabilities for 2 values",
    with_parameter("{values: [1, 2], probabilities: [1.5, -0.5]}"): (
        "sweep.yaml: parameters.lr: probabilities must be >= 0, got -0.5"
    ),
    with_parameter("{distribution: categorical, values: [1], probabilities: [1]}"): (
        "sweep.yaml: parameters.lr: unknown key 'probabilities' of categorical, which takes distribution, values"
    ),
    # grids
    with_parameter("{min: 0.0, max: 1.0}", "grid"): (
        "sweep.yaml: parameters.lr: a grid cannot list uniform: "
        "it takes value, values, int_uniform (whole min and max) and q_uniform"
    ),
    with_parameter("{distribution: q_normal}", "grid"): (
        "sweep.yaml: parameters.lr: a grid cannot list q_normal: give its values"
    ),
    with_parameter("{values: [1, 2], probabilities: [0.5, 0.5]}", "grid"): (
        "sweep.yaml: parameters.lr: a grid takes every value once: leave the probabilities out"
    ),
    with_parameter("{min: 0, max: 1000000000}", "grid"): (
        "sweep.yaml: the grid has 1,000,000,001 points, more than 1,000,000: sample it with method: random"
    ),
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_was_meant(text: str) -> None:
    with pytest.raises(SweepError) as error:
        parse(text, "sweep.yaml")
    assert str(error.value).endswith(MISTAKES[text])
    assert str(error.value).startswith("sweep.yaml: ")
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match=r"none\.yaml: No such file or directory"):
        read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SweepError, match=r"binary\.yaml: not UTF-8 text"):
        read(tmp_path / "binary.yaml")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"pip install 'metaopt\[sweeps\]'"):
        parse("{}")


def test_reading_needs_neither_optuna_nor_scipy_nor_wandb() -> None:
    program = (
        "import sys; from metaopt import sweeps; "
        f"sweeps.read({str(FILES / 'nested.yaml')!r}); "
        "print({'optuna', 'scipy', 'wandb'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
