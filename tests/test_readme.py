"""The README's examples run as they stand, and print derivatives that are finite."""

import re
import textwrap
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_is_an_example_for_each_way_in():
    ways = ("metaopt.functional", "metaopt.optim", "metaopt.inner_loop", "compare", "tracking.start", "metaopt.learned")
    for name, example in zip(ways, EXAMPLES, strict=True):
        assert name in example


@pytest.mark.parametrize("index", range(len(EXAMPLES)))
def test_example_runs(index, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(textwrap.dedent(EXAMPLES[index]), f"README example {index}", "exec"), {})
    printed = capsys.readouterr().out
    assert printed
    assert "nan" not in printed
    assert "None" not in printed
