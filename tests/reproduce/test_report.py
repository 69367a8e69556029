"""The paper's tables: its numbers, the measurements that reproduce them, and the pages."""

import json
from dataclasses import replace

import pytest

from dcvae_fast.evaluation import METRICS, Measurement
from dcvae_fast.reproduce.paper import NEGATIVES, TABLES, WITH_OFFICIAL, Key, Table
from dcvae_fast.reproduce.report import Result, as_json, markdown

# By column, from top to bottom, as printed in the paper.
PAPER = {
    "table1": """
        115.8 39.8 240.4 17.9 | 3.8 7.4 1.8 8.2 | 108.4 29.0 242 21.4 | 4.3 7.6 1.9 7.9 | |
        | 21.8 62.7 53.6 45.9 | 21.8 62.7 53.6 45.9 | | 65.8 57.2 104.2 52.9 | 65.8 57.2 104.2 52.9""",
    "table2": """
        6.6 7.8 7.9 8.2 8.3 8.8 8.3 8.6 3.8 7.4 8.2 7.9
        | 24.6 23.5 21.7 26.7 16.2 22.3 12.4 115.8 39.8 95.2 93.1 50.8 2.67 17.9 21.4
        | 8.9 9.1 9.3 9.2 8.1 8.4 | 46.7 40.1 37.6 31.0 41.9 43.6""",
    "table3": "8.3 16.0 13.3 17.13 14.3 | 15.92 10.57 |",
    "table4": "19.21 40.26 24.69 15.81",
    "table5": "29.1 53.9 5.7 7.30 46.2 42 14.3 19.9",
    "table6": """
        2.92±0.12 4.69±0.18 6.07±0.05 1.62±0.07 1.85±0.08 1.47±0.12 1.30±0.035
        | 3.05±0.42 5.26±0.22 6.18±0.20 1.24±0.05 1.60±0.08 1.10±0.03 1.27±0.037
        | 2.98±0.14 5.40±0.33 6.35±0.48 1.32±0.09 1.49±0.06 1.31±0.06 1.29±0.034""",
    "table7": "33.29 40.71 24.66",
    "table8": "| | 0.117 0.072 | 40.40 38.63 | 40.40 38.63",
    "figure7": "| |",
}

# Number of measurements of each run.
NEEDED = {
    "table1": {f"table1/{run}": 11 for run in ("vae", "vae-gan", "vae-contrastive", "dc-vae")},
    "table2": {"table1/vae": 2, "table1/vae-gan": 2, "table1/dc-vae": 6, "table2/dc-vae": 6},
    "table3": {"table3/dc-vae": 3},
    "table4": {"table4/dc-vae": 1},
    "table5": {"table5/dc-vae": 3},
    "table6": {"table6/z16": 1, "table6/z32": 1, "table6/z64": 1},
    "table7": {"table8/dc-vae": 1},
    "table8": {"table8/dc-vae": 5},
    "figure7": {f"figure7/k{k}": 3 for k in NEGATIVES},
}


@pytest.mark.parametrize("name", TABLES)
def test_numbers_are_those_printed_in_the_paper(name):
    columns = list(zip(*(row.paper for row in TABLES[name].rows), strict=True))
    assert [[x for x in column if x] for column in columns] == [part.split() for part in PAPER[name].split("|")]


@pytest.mark.parametrize("name", TABLES)
def test_needed_measurements_are_metrics_of_evaluate(name):
    table = TABLES[name]
    assert all(len(row.paper) == len(table.columns) == len(row.runs or row.paper) for row in table.rows)
    needed = table.needed()
    assert {run: len(keys) for run, keys in needed.items()} == NEEDED[name]
    assert {key.metric.split("_")[0] for keys in needed.values() for key in keys} <= set(METRICS)


def test_columns_that_the_paper_leaves_open_have_a_note():
    for name in ("table1", "table3", "table8"):
        for column in TABLES[name].columns:
            is_open = column.metric.startswith(("pixel", "perceptual")) or column.protocol == "once"
            assert (column.note is not None) == is_open
    page = markdown(TABLES["table1"], {})
    assert "FID of reconstructions, each test image once ↓ [1]" in page and "[1] Each test image at most once" in page
    assert "pixel, sum of squares on [0, 1] ↓ [2]" in page and "[2] The paper states no unit. " in page
    assert "perceptual, Caffe scaling ↓ [3]" in page and "[3] Mean squared difference of VGG16's" in page
    page = markdown(TABLES["table3"], {})
    assert "FID of reconstructions, each validation image once ↓ [1]" in page
    assert "[1] Each validation image at most once, decoded from the posterior mean" in page


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table5"])
def test_each_fid_and_is_of_reconstructions_is_also_measured_with_each_image_once(name):
    """The paper's number is next to 50,000 reconstructions only."""
    table, protocols = TABLES[name], {}
    for row in table.rows:
        for number, run in enumerate(row.runs):
            key = table.key(row, number)
            if run and key.metric in ("fid", "is") and key.subject == "reconstructions":
                protocols.setdefault((run, key.metric), set()).add(key.protocol)
                assert (row.paper[number] != "") == (key.protocol == "paper")
    assert protocols and all(names == {"paper", "once"} for names in protocols.values())
    page = markdown(table, {})
    assert "each test image once" in page or "each validation image once" in page


def test_the_row_of_the_authors_code_is_measured_by_their_protocol():
    plain, table = TABLES["table1"], WITH_OFFICIAL["table1"]
    assert table.rows[:-1] == plain.rows and table.columns == plain.columns
    assert all(len(row.paper) == len(table.columns) == len(row.runs) for row in table.rows)
    needed = table.needed()
    assert {run: keys for run, keys in needed.items() if run != "table1/official"} == plain.needed()
    others = [key for key in plain.needed()["table1/vae"] if key.protocol == "paper"]
    assert needed["table1/official"] == [key._replace(protocol="official") for key in others]
    key = Key("fid", "samples", "official")
    results = {"table1/official": Result((SHORT,), {key: measurement("fid", "samples", 17.65)}, {})}
    rows = [row for row in rows_of(markdown(table, results)) if row[0] == "DC-VAE, authors' code"]
    assert rows == [["DC-VAE, authors' code", "ours", "17.65", *"–––", "", "", *"–––––", SHORT]]
    assert "measured by protocol official" in markdown(table, {}).splitlines()[-3]


def measurement(metric: str, subject: str, value: float, spread: float | None = None) -> Measurement:
    return Measurement(
        metric=metric,
        subject=subject,  # type: ignore[arg-type]
        protocol="paper",
        value=value,
        spread=spread,
        count=10,
        seed=0,
    )


SHORT, CHANGED = "shortened: 20,000 of 6,000,000 images", "changed: model.decoder_width 32"


@pytest.fixture
def results() -> dict[str, Result]:
    """Results of Table 6: a number, a missing number, and a run that has not been trained."""
    key = Key("probe_error", "latents", "paper")
    first = Result((SHORT, CHANGED), {key: measurement(*key[:2], 1.2345678, 0.0456)}, {}, {"device": "cpu"})
    return {"table6/z16": first, "table6/z32": Result((SHORT,), missing={key: "it diverged."})}


def rows_of(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]


def test_a_page_lists_our_numbers_below_the_papers_with_remarks_and_reasons(results):
    page = markdown(TABLES["table6"], results)
    lines = page.splitlines()
    assert lines[0] == f"# Table 6: error of a linear classifier on latents, MNIST ({SHORT}; {CHANGED})"
    rows = rows_of(page)
    assert rows[0] == ["method", "from", "Z = 16, % ↓", "Z = 32, % ↓", "Z = 64, % ↓", "remarks"]
    assert rows[2] == ["VAE", "quoted", "2.92 ± 0.12", "3.05 ± 0.42", "2.98 ± 0.14", ""]
    assert rows[-2] == ["DC-VAE", "paper", "1.30 ± 0.035", "1.27 ± 0.037", "1.29 ± 0.034", ""]
    assert rows[-1] == ["DC-VAE", "ours", "1.235 ± 0.046", "–", "–", f"{SHORT}; {CHANGED}"]
    assert "– DC-VAE, Z = 32, % ↓: it diverged." in lines and "– DC-VAE, Z = 64, % ↓: not trained yet" in lines
    assert len({len(line) for line in lines if line.startswith("|")}) == 1


def test_cells_without_a_run_stay_empty():
    key = Key("fid", "samples", "paper")
    results = {"table1/vae": Result((SHORT,), {key: measurement("fid", "samples", 120.04)}, {})}
    rows = {(row[0], row[1]): row for row in rows_of(markdown(TABLES["table2"], results))}
    assert rows["VAE", "ours"] == ["VAE", "ours", "–", "120", "", "", SHORT]
    assert rows["VAE", "paper"] == ["VAE", "paper", "3.8", "115.8", "", "", ""]
    assert ("NVAE sampling", "ours") not in rows and rows["NVAE sampling", "quoted"][2:4] == ["", "50.8"]


def test_json_has_the_same_numbers_and_remarks(results):
    content = json.loads(json.dumps(as_json(TABLES["table6"], results)))
    assert content["table"] == "table6" and SHORT in content["title"]
    assert content["runs"]["table6/z16"] == {"remarks": [SHORT, CHANGED], "device": "cpu"}
    quoted, ours = content["rows"][0], content["rows"][-1]
    assert quoted["quoted"] and quoted["cells"][0] == {"column": "Z = 16, % ↓", "paper": "2.92±0.12"}
    first, second, third = ours["cells"]
    assert (first["paper"], first["ours"]["value"], first["remarks"]) == ("1.30±0.035", 1.2345678, [SHORT, CHANGED])
    assert (second["missing"], second["remarks"]) == ("it diverged.", [SHORT])
    assert (third["missing"], third["run"], third["remarks"]) == ("not trained yet", "table6/z64", [])


def test_figure_7_has_no_numbers_of_the_paper():
    page = markdown(TABLES["figure7"], {})
    assert " paper " not in "".join(line for line in page.splitlines() if line[:1] == "|" and "method" not in line)
    assert "an axis from 2.0 to 5.0 without a unit, and gives no numbers" in page


def test_a_row_without_a_subject_is_rejected():
    wrong = replace(TABLES["table5"].rows[-1], subject=None)
    table = Table("table5", "", TABLES["table5"].columns, (wrong,))
    with pytest.raises(AssertionError, match="sets `subject`"):
        table.needed()
