"""The benchmark of training speed: what it counts, and the table that is made of its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import fit_speed


def test_operations_are_counted_forward_and_back() -> None:
    case = fit_speed.Case(network=lambda: linear(), dataset="digits", shape=(1, 4, 4), augment="none")
    bare = fit_speed.BarePasses(linear(), case)
    # Forward and the weights' gradient: 2 · 16 · 10 each. The inputs are data, which need no gradient.
    assert bare.flops_per_image() == 2 * 2 * 16 * 10


def test_the_peak_is_a_rate() -> None:
    assert fit_speed.peak_flops(0.0) > 1e8


def test_the_table_is_made_of_medians(tmp_path: Path) -> None:
    case = {
        "images_per_second": {"fit": [900.0, 1000.0, 5000.0], "plain, no workers": [400.0, 500.0, 600.0]},
        "ratios": {
            "fit / bare passes": [0.7, 0.8, 0.9],
            "fit / plain, no workers": [2.0, 2.5, 3.0],
            "fit / plain, 2 workers": [1.0, 1.5, 9.0],
            "fit, float32 / plain, no workers": [1.2, 1.2, 1.2],
        },
        "flops_per_image": 5e8,
    }
    content = {"threads": 2, "batch_size": 128, "bfloat16": True, "peak_flops": 2e12, "cases": {"cnn": case}}
    (tmp_path / "fit_speed.json").write_text(json.dumps(content))
    table = fit_speed.tables(tmp_path)["fit-speed"]
    assert "medians of 3 rounds" in table
    assert "2.00 TFLOP/s" in table
    assert table.splitlines()[-1] == "| cnn | 1,000 | 80 % | 25 % | 500 | 2.50× | 1.50× | 1.20× |"


@pytest.mark.parametrize("bad", [["--seconds", "0"], ["--repeats", "0"], ["--threads", "0"]])
def test_numbers_that_mean_nothing_are_refused(bad: list[str]) -> None:
    with pytest.raises(SystemExit):
        fit_speed.main(bad)


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 10))
