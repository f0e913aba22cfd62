"""Reading what a program has logged, while it writes and after it was killed."""

from __future__ import annotations

import json
import math
from contextlib import closing

from metaopt.sweeps.metric import RECORD, Metric


def write(folder, *rows):
    with (folder / RECORD).open("a") as file:
        for row in rows:
            file.write(row if isinstance(row, str) else json.dumps(row) + "\n")


def test_history_grows_with_the_file_and_leaves_half_a_line_for_later(tmp_path):
    with closing(Metric(tmp_path, "loss")) as metric:
        assert metric.history() == []
        write(tmp_path, {"loss": 3}, {"other": 1}, '{"los')
        assert metric.history() == [3]
        write(tmp_path, 's": 2}\n', {"loss": math.nan})
        assert metric.history()[:2] == [3, 2]
        assert math.isnan(metric.history()[2])


def test_a_step_that_is_logged_again_replaces_all_from_there_on(tmp_path):
    write(tmp_path, *({"step": step, "loss": step} for step in range(6)))
    write(tmp_path, *({"step": step, "loss": 10 * step} for step in range(4, 8)))  # went on from a checkpoint at 4
    with closing(Metric(tmp_path, "loss")) as metric:
        assert metric.history() == [0, 1, 2, 3, 40, 50, 60, 70]


def test_the_final_value_is_the_last_one_and_a_damaged_line_is_passed_over(tmp_path):
    assert Metric(tmp_path, "validation.loss").final() is None
    write(tmp_path, {"validation": {"loss": 3}}, {"validation": {"loss": 2}}, {"seconds": 9}, '{"validation": {"lo')
    assert Metric(tmp_path, "validation.loss").final() == 2
