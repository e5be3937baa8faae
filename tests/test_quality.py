import json
import subprocess
import sys
from pathlib import Path

import pytest

QUALITY = Path(__file__).parents[1] / "benchmarks" / "quality.py"


@pytest.mark.slow
def test_a_quick_run_measures_samples_and_codes_and_writes_the_command(tmp_path):
    command = [sys.executable, str(QUALITY), "gan", "--only", "one step", "--smoke", "--out", str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "quality.json").read_text())
    assert [row["nets"] for row in report["results"]] == ["deep", "shallow"]
    for row in report["results"]:
        assert "failure" not in row
        assert all(row[key] >= 0 for key in ("test_cost", "samples", "reconstructions", "ms"))
        assert all(0 < p <= 1 for p in (row["p_for_choosing"], *row["p_values"]))
    assert "python benchmarks/quality.py gan --only" in (tmp_path / "quality.md").read_text()


def test_an_unknown_table_is_named(tmp_path):
    finished = subprocess.run([sys.executable, str(QUALITY), "colours"], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert "no table is called 'colours'" in finished.stderr


@pytest.mark.parametrize("table", ["kernels", "constraint", "gan", "priors", "normal"])
def test_settings_of_a_table_have_names_of_their_own(table):
    sys.path.insert(0, str(QUALITY.parent))
    import quality

    settings = list(quality.TABLES[table]())
    assert len({(setting.key, setting.penalty) for setting in settings}) == len(settings)
