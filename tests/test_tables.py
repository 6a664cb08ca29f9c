"""README.md and results/README.md: every measured number is in results/, and what they name is there."""

import json
import re
import shutil
import statistics
import subprocess

import pytest
import torch
from matplotlib import pyplot

from results import make_tables
from utils import files
from utils.files import ROOT
from utils.options import read_options

in_clone = (ROOT / ".git").exists() and shutil.which("git")
pytestmark = pytest.mark.skipif(not in_clone, reason="needs git and a clone of the repository")
README, RESULTS = (ROOT / page for page in make_tables.PAGES)


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages and results; figures and weights are empty."""
    for path in [ROOT / ".gitignore", README, RESULTS, *make_tables.reported_files(ROOT)]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"" if path.suffix in (".png", ".pdf", ".gif", ".pt") else path.read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_pages_say_what_results_hold():
    weights = ["git", "diff", "--name-only", "HEAD", "--", "results/*model.pt"]
    if subprocess.run(weights, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        pytest.skip("models were trained anew here")
    assert not make_tables.outdated(ROOT), "python results/make_tables.py brings the pages up to date"


@pytest.mark.parametrize("page", make_tables.PAGES)
def test_a_changed_digit_of_a_page_is_found(copy, page):
    whole = (copy / page).read_text(encoding="utf-8")
    digits = [match.start() for match in re.finditer(r"\d[\d.,]* ±", whole)]
    for position in digits[:: len(digits) // 8]:
        other = str((int(whole[position]) + 1) % 10)
        (copy / page).write_text(whole[:position] + other + whole[position + 1 :], encoding="utf-8")
        assert [*make_tables.outdated(copy)] == [page]


@pytest.mark.parametrize("page", [README, RESULTS])
def test_no_measured_number_stands_outside_the_tables(page):
    left_out = r"<!-- table: .*?<!-- end -->|```.*?```|`[^`]*`|\]\([^)]*\)"
    prose = re.sub(left_out, "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert set(re.findall(r"\d+\.\d+", prose)) <= {"3.9", "0.5", "3.0"}  # versions and a threshold
    assert not re.search(r"\d\s*(nats|min|minutes|seconds|s|%)\b", prose)


def test_numbers_are_rounded_to_their_error():
    assert make_tables.shown(80.0057, 0.0213) == "80.01 ± 0.02"
    assert make_tables.shown(80.0057, 0.0148) == "80.006 ± 0.015"
    assert [*map(make_tables.shown, (55.5979, -7.374, 2.0, None))] == ["55.60", "-7.374", "2", ""]


def test_missing_results_are_left_out(copy):
    shutil.rmtree(copy / "results" / "step1_gan")
    readme, page = make_tables.outdated(copy).values()
    assert "`python hw2_step1_main.py` |" not in readme
    assert "(step1_gan)" not in page and "(step2_pixelcnn)" in page and "no such run" in page


def test_new_runs_appear_and_experiments_do_not(copy):
    folder = copy / "results" / "step3_vae"
    names = ("long-99", "kl-4")  # .gitignore lets the first one in
    for name in names:
        (folder / "variants" / name).mkdir()
        for file in ("config.json", "metrics.json"):
            shutil.copy(folder / file, folder / "variants" / name)
    page = make_tables.outdated(copy)["results/README.md"]
    assert [f"step3_vae/variants/{name}" in page for name in names] == [True, False]


def test_check_names_what_differs_and_writes_nothing(copy, monkeypatch, capsys):
    monkeypatch.setattr(make_tables, "ROOT", copy)
    page = copy / "README.md"
    page.write_text(page.read_text(encoding="utf-8").replace("GAN |", "GAM |"), encoding="utf-8")
    assert make_tables.main(["--check"]) == make_tables.main(["--check"]) == 2
    assert "README.md: out of date" in capsys.readouterr().err
    assert make_tables.main() == 0 and make_tables.main(["--check"]) == 0
    shutil.rmtree(copy / ".git")
    assert make_tables.main() == 2 and "work in a clone" in capsys.readouterr().err


def test_every_figure_of_a_reported_run_and_every_model_is_shown():
    page = RESULTS.read_text(encoding="utf-8")
    for path in make_tables.reported_files(ROOT):
        name = path.relative_to(ROOT / "results")
        default = len(name.parts) == 2 and name.parts[0] != "classifier"
        assert not (default and path.suffix in (".png", ".gif")) or f'src="{name.as_posix()}"' in page
        assert name.name != "model.pt" or f"**`{name.parts[0]}/model.pt`**" in page


def test_commands_of_the_readme_are_accepted(capsys):
    found = re.findall(r"hw2_(step\d)_main\.py([^#&`|\n]*)", README.read_text(encoding="utf-8"))
    assert len(found) > 15
    for step, flags in found:
        if "narrow" not in flags:  # which the reader adds
            code = make_tables.SCRIPTS[step].main([*flags.split(), "--list-variants"])
            assert code == 0, capsys.readouterr().err


def test_the_lines_from_python_do_what_they_say(monkeypatch):
    """They plot ten digits above their reconstructions, complete one, rate ten in nats and judge samples."""
    monkeypatch.chdir(ROOT)
    shown, names = [], {}
    monkeypatch.setattr(pyplot, "imshow", lambda image, **_: shown.append(image))
    monkeypatch.setattr(pyplot, "show", lambda: None)
    page = RESULTS.read_text(encoding="utf-8")
    exec(re.search(r"## From Python\n.*?```python\n(.*?)```\n", page, re.DOTALL)[1], names)
    assert shown[0].shape == (56, 280) and torch.equal(shown[0][:28, :28], names["images"][0, 0] / 255)
    assert torch.equal(names["completed"][:, :, :14], names["binary"][:1, :, :14])
    assert 0 < names["completed"][:, :, 14:].sum() < 14 * 28
    assert names["nats"].shape == (10,) and 30 < names["nats"].mean() < 70
    assert names["quality"]["frechet_distance"]["samples"] == 1000


def test_the_map_names_what_is_there():
    page = README.read_text(encoding="utf-8")
    section = re.search(r"## The map of the assignment\n(.*?)\n## ", page, re.DOTALL)[1]
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    rows = [row.split("|")[1:4] for row in section.splitlines() if re.match(r"\| [123] ", row)]
    assert len(rows) == 12
    for part, code, figures in rows:
        for name in re.findall(r"`(\S+)`", code):
            defined = re.search(rf"^(def|class) {name}\b|^{name} = ", sources, re.MULTILINE)
            assert defined or (ROOT / name).exists(), name
        for name in re.findall(r"`(\S+)`", figures):
            assert list(ROOT.glob(f"results/step{part.split()[0]}*/{name}")), name


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "tests/README.md", "data/README.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in map("".join, re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text)):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("module", make_tables.SCRIPTS.values())
def test_the_reported_ablation_has_the_settings_of_the_variants(module):
    """A variant or a default that was edited has to be trained anew; only the length may be another."""
    options = read_options(module.train) | read_options(getattr(module, "NETWORK", object))
    configs = list((ROOT / "results" / module.STEP / "ablation").glob("seed_*/**/config.json"))
    assert len(configs) > 3
    for config in configs:
        trained = json.loads(config.read_text())
        changes = {} if trained["variant"] == "default" else module.VARIANTS[trained["variant"]][1]
        expected = {name: each.default for name, each in options.items() if name != "num_epochs"} | changes
        found = {name: trained["hyperparameters"].get(name, options[name].default) for name in expected}
        assert json.dumps(found) == json.dumps(expected), config


@pytest.mark.parametrize("path", sorted((ROOT / "results").glob("step*/*.csv")), ids=lambda path: path.name)
def test_tables_of_runs_are_those_of_their_metrics(path):
    """Each mean is over the metrics.json of the variant's runs, where they are committed."""
    for row in files.read_csv(path):
        folders = [*path.with_suffix("").glob(f"seed_*/**/{row.get('variant')}/metrics.json")]
        for key in ("frechet_distance", "test_nll") if len(folders) == row.get("seeds") else ():
            values = [entry[key]["value"] for entry in map(files.read_json, folders) if key in entry]
            if values:
                assert row[f"{key}_mean"] == pytest.approx(statistics.fmean(values), rel=1e-5), (path, row)
