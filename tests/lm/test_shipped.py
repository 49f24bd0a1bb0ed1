"""The shipped twins are as good as the README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from taylor_attention.cli.app import app


@pytest.mark.slow
def test_the_shipped_models_have_the_losses_of_the_readme():
    """The corpus is the library of Python 3.11; others are a few pages longer or shorter."""
    result = CliRunner().invoke(app, ["eval", "--json"])
    taylor, softmax = (model["nats_per_byte"] for model in json.loads(result.stdout)["models"])
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert "1.324 against 1.256 nats per byte, so at this size and budget degree 2 costs 5%" in readme
    assert taylor == pytest.approx(1.324, abs=0.02)
    assert softmax == pytest.approx(1.256, abs=0.02)
    assert taylor / softmax == pytest.approx(1.05, abs=0.005)
