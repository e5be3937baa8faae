import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.fixture
def tables(monkeypatch):
    """The benchmark's settings and page."""
    monkeypatch.syspath_prepend(QUALITY.parent)
    return importlib.import_module("quality_tables")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("table", "only", "rows"), [("gan", "one step", 2), ("penalties", "", 12), ("priors", "VampPrior", 2)], ids=str
)
def test_a_quick_run_measures_samples_and_codes_and_writes_the_command(tmp_path, table, only, rows):
    pytest.importorskip("geomloss")
    command = [sys.executable, str(QUALITY), table, "--only", only, "--smoke", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / f"quality_{table}.json").read_text())
    page = (tmp_path / f"quality_{table}.md").read_text()
    assert len(report["results"]) == rows
    for row in report["results"]:
        assert "failure" not in row
        assert f"| {row['name']} |" in page
        assert all(row[key] >= 0 for key in ("test_cost", "samples", "reconstructions", "ms"))
        assert all(0 < p <= 1 for p in (row["p_for_choosing"], *row["p_values"]))
    assert f"python benchmarks/quality.py {table} --only" in page


def test_an_unknown_table_is_named():
    finished = subprocess.run([sys.executable, str(QUALITY), "colours"], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert "no table is called 'colours'" in finished.stderr


def test_settings_of_a_table_have_names_of_their_own(tables):
    for table, settings in tables.TABLES.items():
        named = [tuple(dataclasses.asdict(setting)[key] for key in tables.ROW.values()) for setting in settings()]
        assert len(set(named)) == len(named), table


def test_a_page_has_the_numbers_of_every_seed_and_says_how_many_failed(tables):
    setting = {**dataclasses.asdict(tables.Setting("one", weight="30.0")), "data": "bundled", "epochs": 3}
    measured = {"test_cost": 1.0, "samples": 2.5, "p_values": [0.25, 0.5]}
    other = {**setting, "name": "other"}
    rows = [
        {**setting, "seed": 1, **measured, "samples": 3.5},
        {**setting, "seed": 0, **measured},
        {**other, "seed": 0, **measured},
        {**other, "seed": 1, "failure": "ValueError: NaN"},
    ]
    page = tables.page({"command": "c", "machine": "m", "torch": "t", "results": rows})
    assert page.splitlines()[0] == "| setting | weight | test cost | samples | p |"
    assert "| one | 30 | 1.00, 1.00 | 2.50, 3.50 | 0.250 0.500, 0.250 0.500 |" in page
    assert "| other (1 of 2 failed) | 30 | 1.00 | 2.50 | 0.250 0.500 |" in page
    assert "nets deep, data bundled, d 8, batch 100, epochs 3, seeds 0 1" in page
