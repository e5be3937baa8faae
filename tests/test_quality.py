import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["colours"], "no table is called 'colours'"), (["gan", "--only", "colours"], "no setting has 'colours'")],
    ids=["table", "setting"],
)
def test_an_unknown_table_or_setting_is_named(arguments, message):
    finished = subprocess.run([sys.executable, str(QUALITY), *arguments], capture_output=True, text=True, timeout=300)
    assert finished.returncode == 2
    assert message in finished.stderr


def test_every_column_is_explained_on_a_page_that_has_it_and_on_no_other(tables):
    setting = {
        "table": "gan",
        **dataclasses.asdict(tables.Setting("one", weight="30.0")),
        "data": "bundled",
        "epochs": 3,
        "seed": 0,
    }
    report = {"command": "c", "machine": "m", "torch": "2", "results": [{**setting, "test_cost": 1.0, "spread": 1.0}]}
    page = tables.page(report)
    assert set(tables.LEGEND) == set(tables.COLUMNS)
    assert "- *spread*: " in page
    assert "fitted afterwards" not in page


@pytest.mark.parametrize(("name", "count"), [("shallow", 0), ("deep", 2), ("deeper", 6)])
def test_nets_differ_in_their_residual_blocks_alone(tables, name, count):
    quality = importlib.import_module("quality")
    x = torch.zeros(2, 1, 28, 28)
    encoder, decoder = quality.make_nets(
        tables.Setting("one", nets=name), quality.Data(x, x, x, torch.nn.Identity(), 1)
    )
    assert decoder(encoder(x)).shape == x.shape
    for net, other in ((encoder, quality.digit_encoder(8)), (decoder, quality.digit_decoder(8))):
        kinds = [type(part) for part in net]
        assert kinds.count(quality.Residual) == count
        assert [kind for kind in kinds if kind is not quality.Residual] == [
            type(part) for part in other if not isinstance(part, quality.Residual)
        ]
        blocks = [part for part in net if isinstance(part, quality.Residual)]
        assert len(set(map(id, blocks))) == count


def test_settings_of_a_table_have_names_of_their_own(tables):
    for table, settings in tables.TABLES.items():
        named = [tuple(dataclasses.asdict(setting)[key] for key in tables.ROW.values()) for setting in settings()]
        assert len(set(named)) == len(named), table


def test_a_page_has_the_numbers_of_every_seed_and_says_how_many_failed(tables):
    setting = {
        "table": "gan",
        **dataclasses.asdict(tables.Setting("one", weight="30.0")),
        "data": "bundled",
        "epochs": 3,
    }
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


@pytest.mark.parametrize(("weight", "is_shown"), [("0.6", False), ("Constraint()", True)])
def test_the_weight_of_the_last_step_is_shown_where_it_moves(tables, weight, is_shown):
    setting = dataclasses.asdict(tables.Setting("one", weight=weight, data="bars"))
    row = {"table": "gan", **setting, "epochs": 3, "seed": 0, "test_cost": 1.0, "weight_at_end": 0.6}
    page = tables.page({"command": "c", "machine": "m", "torch": "t", "results": [row]})
    assert ("at the end" in page) is is_shown


def test_the_page_of_the_kernels_begins_with_their_means_side_by_side(tables):
    setting = {**dataclasses.asdict(tables.Setting("one", weight="30.0", data="bars")), "table": "kernels", "epochs": 3}
    row = {**setting, "test_cost": 1.0, "samples": 2.0, "p_values": [0.06, 0.5], "seed": 0}
    told = {**row, "seed": 1, "samples": 4.0, "p_values": [0.05, 0.04]}
    rows = [row, told, {**row, "name": "other"}, {**row, "name": "other", "zdim": 2}, {**row, "failure": "NaN"}]
    report = {"command": "c", "machine": "m", "torch": "t", "results": rows}
    first, _, d8, d2, *rest = tables.page(report).splitlines()
    assert first == "| data | d | batch | weight | one | other |"
    assert d8 == "| bars | 8 | 100 | 30 | 1.00, 3.00 | **1.00, 2.00** |"
    assert d2 == "| bars | 2 | 100 | 30 | - | **1.00, 2.00** |"
    assert tables.EVERY_ROW in rest
    elsewhere = {**report, "results": [{**row, "table": "gan"} for row in rows]}
    assert tables.EVERY_ROW not in tables.page(elsewhere)
