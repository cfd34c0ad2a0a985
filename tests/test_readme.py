"""The README's examples run, and its commands are where `.ci/run` looks for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import integration

README = Path(__file__).parents[1] / "README.md"


def examples():
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.skipif(not README.exists(), reason="tests run outside a checkout")
def test_example_runs_and_learns(capsys):
    example = examples()[0]
    assert len(example.strip().splitlines()) <= 13
    exec(compile(example, "README.md", "exec"), {})
    loss = float(capsys.readouterr().out.split()[-1])
    assert loss < 2.0  # ln 10 = 2.3 is chance


@pytest.mark.skipif(not README.exists(), reason="tests run outside a checkout")
@pytest.mark.parametrize("library", ["torch", "autograd", "sklearn", "thinc"])
def test_example_of_an_integration_runs(library):
    integration(library)
    (example,) = [each for each in examples() if f"fastnorm.integrations.{library}" in each]
    exec(compile(example, "README.md", "exec"), {})


@pytest.mark.skipif(not README.exists(), reason="tests run outside a checkout")
def test_commands_are_marked():
    text = README.read_text(encoding="utf-8")
    for mark, part in (("main-job", "python -m fastnorm train"), ("tests", "python -m pytest")):
        (command,) = re.findall(rf"<!-- ci: {mark} -->\n```sh\n(.*)\n```", text)
        assert part in command
