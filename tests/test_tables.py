"""README.md and results/README.md: every measured number is in results/, and what they name is there."""

import json
import re
import shutil
import subprocess

import pytest

import hw2_step1_main as step1
import hw2_step2_main as step2
import hw2_step3_main as step3
from tests.conftest import ROOT
from utils import tables
from utils.files import UserError

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a clone of the repository"
)
README, RESULTS = (ROOT / page for page in tables.PAGES)
STEPS = {"1": step1, "2": step2, "3": step3}
TYPED = {"3.9", "0.5", "3.0"}  # numbers with a point that are not measured: versions and a threshold


@pytest.fixture
def copy(tmp_path):
    """A copy of the pages and results, with their tables made anew; figures and weights are empty."""
    for path in [ROOT / ".gitignore", README, RESULTS, *tables.reported_files()]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"" if path.suffix in (".png", ".pdf", ".gif", ".pt") else path.read_bytes())
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    write(tmp_path)
    return tmp_path


def write(root):
    for path, text in tables.pages(root).items():
        path.write_text(text, encoding="utf-8")


def prose(path):
    """Return a page without its tables, code and addresses."""
    text = re.sub(
        r"<!-- table: .*?<!-- end -->|```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    return re.sub(r"`[^`]*`|\]\([^)]*\)", "", text)


def change_digit(text, position):
    return text[:position] + str((int(text[position]) + 1) % 10) + text[position + 1 :]


# ---------------------------------------------------------------------------------------------------------
# The numbers


def test_pages_say_what_results_hold():
    weights = ["git", "diff", "--name-only", "HEAD", "--", "results/*model.pt"]
    if subprocess.run(weights, cwd=ROOT, capture_output=True, text=True, check=True).stdout:
        pytest.skip("models were trained anew here: python -m utils.tables brings the pages up to date")
    assert not tables.differences(), "python -m utils.tables brings the pages up to date"


@pytest.mark.parametrize("page", tables.PAGES)
def test_a_changed_digit_of_a_page_is_found(copy, page):
    assert not tables.differences(copy)
    whole = (copy / page).read_text(encoding="utf-8")
    digits = [
        block.start() + digit.start()
        for block in re.finditer(r"<!-- table: .*?<!-- end -->", whole, re.DOTALL)
        for digit in re.finditer(r"(?<![\w./=-])\d+[.,]\d", block[0])
    ]
    assert len(digits) > 10
    for position in digits[:: len(digits) // 8]:
        (copy / page).write_text(change_digit(whole, position), encoding="utf-8")
        assert len(tables.differences(copy)) == 1


@pytest.mark.parametrize("folder, key", [("step1_gan", "recall"), ("step2_pixelcnn", "test_nll")])
def test_a_changed_digit_of_the_metrics_is_found(copy, folder, key):
    path = copy / "results" / folder / "metrics.json"
    whole = path.read_text()
    value = json.dumps(json.loads(whole)[key]["value"])
    start = whole.index(value, whole.index(f'"{key}"'))
    for position in range(start, start + 4):
        if whole[position] != ".":
            path.write_text(change_digit(whole, position))
            assert tables.differences(copy)


@pytest.mark.parametrize("page", [README, RESULTS])
def test_no_measured_number_stands_outside_the_tables(page):
    numbers = set(re.findall(r"\d+\.\d+", prose(page))) - TYPED
    assert not numbers
    assert not re.search(r"\d\s*(nats|min|minutes|seconds|s|%)\b", prose(page))


@pytest.mark.parametrize(
    "value, error, text",
    [
        (80.0057, 0.0213, "80.01 ± 0.02"),
        (80.0057, 0.0148, "80.006 ± 0.015"),
        (242.03, 2.127, "242 ± 2"),
        (2319.2, 493.0, "2,319 ± 493"),
        (55.5979, None, "55.60"),
        (0.0734, None, "0.0734"),
        (433.04, None, "433.0"),
        (-7.374, 0.0, "-7.374"),
        (2.0, None, "2"),
        ("threshold", None, "threshold"),
        (None, None, ""),
    ],
)
def test_numbers_are_rounded_to_their_error(value, error, text):
    assert tables.shown(value, error) == text


def test_a_standard_error_is_shown(copy):
    path = copy / "results" / "step2_pixelcnn" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test_nll"] |= {"value": 12.3456, "standard_error": 0.0321}
    path.write_text(json.dumps(metrics))
    write(copy)
    for page in tables.PAGES:
        assert "12.35 ± 0.03" in (copy / page).read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# Runs that come and go


def test_missing_results_are_left_out(copy):
    for name in ("step1_gan", "benchmark", "classifier"):
        shutil.rmtree(copy / "results" / name)
    write(copy)
    assert "`python hw2_step1_main.py` |" not in (copy / "README.md").read_text(encoding="utf-8")
    page = (copy / "results" / "README.md").read_text(encoding="utf-8")
    assert "(step1_gan)" not in page and "(step2_pixelcnn)" in page and "no such run" in page


def test_new_runs_appear_and_experiments_do_not(copy):
    folder = copy / "results" / "step3_vae"
    names = ("long-99", "kl-4")  # .gitignore lets the first one in
    for name in names:
        for file in ("config.json", "metrics.json"):
            (folder / "variants" / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / file, folder / "variants" / name)
    write(copy)
    page = (copy / "results" / "README.md").read_text(encoding="utf-8")
    assert [f"step3_vae/variants/{name}" in page for name in names] == [True, False]


def test_quality_over_the_epochs_has_a_table(copy):
    text = "epoch,frechet_distance,recall\n10,123.456,0.5\n20,99.5,0.6123\n"
    (copy / "results" / "step1_gan" / "quality.csv").write_text(text)
    write(copy)
    page = (copy / "results" / "README.md").read_text(encoding="utf-8")
    assert "| epoch | Fréchet distance | recall |" in page and "| 10 | 123.5 | 0.5000 |" in page


def test_check_names_what_differs_and_writes_nothing(copy, monkeypatch, capsys):
    monkeypatch.setattr(tables, "pages", lambda root=ROOT: {copy / "README.md": "another text"})
    assert tables.main(["--check"]) == 2
    assert "README.md lacks ['another text']" in capsys.readouterr().err
    assert tables.main() == 0 and (copy / "README.md").read_text() == "another text"
    assert tables.main(["--check"]) == 0


def test_outside_a_clone_it_says_so(tmp_path):
    with pytest.raises(UserError, match="work in a clone"):
        tables.reported_files(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# What the pages name


def test_every_figure_of_a_reported_run_and_every_model_is_shown():
    page = RESULTS.read_text(encoding="utf-8")
    for path in tables.reported_files():
        name = path.relative_to(ROOT / "results")
        default = len(name.parts) == 2 and name.parts[0] != "classifier"
        assert not (default and path.suffix in (".png", ".gif")) or f'src="{name.as_posix()}"' in page
        assert name.name != "model.pt" or f"**`{name.parts[0]}/model.pt`**" in page


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 130
    assert README.stat().st_size <= 9000


def test_commands_of_the_readme_are_accepted(capsys):
    found = re.findall(r"hw2_step(\d)_main\.py([^#&`|\n]*)", README.read_text(encoding="utf-8"))
    assert len(found) > 15
    for step, flags in found:
        if "narrow" not in flags:  # which the reader adds
            assert STEPS[step].main([*flags.split(), "--list-variants"]) == 0, capsys.readouterr().err


def test_the_map_names_what_is_there():
    section = re.search(
        r"## The map of the assignment\n(.*?)\n## ", README.read_text(encoding="utf-8"), re.DOTALL
    )[1]
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")])
    rows = [row.split("|")[1:4] for row in section.splitlines() if re.match(r"\| [123] ", row)]
    assert len(rows) == 12
    for part, code, figures in rows:
        for name in re.findall(r"`(\S+)`", code):
            is_there = (ROOT / name).exists() or re.search(
                rf"^(def|class) {name}\b|^{name} = ", sources, re.MULTILINE
            )
            assert is_there, name
        for name in re.findall(r"`(\S+)`", figures):
            assert list(ROOT.glob(f"results/step{part.split()[0]}*/{name}")), name


@pytest.mark.parametrize("page", ["README.md", "results/README.md", "tests/README.md", "data/README.md"])
def test_links_lead_to_files(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", text):
        target = "".join(target)
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("module", [step1, step2, step3])
def test_the_reported_ablation_has_the_settings_of_the_variants(module):
    """The tables take the column `change` from the scripts, so a variant that was edited has to be trained anew."""
    configs = list((ROOT / "results" / module.STEP / "ablation").glob("seed_*/variants/*/config.json"))
    assert configs
    for config in configs:
        trained = json.loads(config.read_text())["hyperparameters"]
        changes = json.loads(json.dumps(module.VARIANTS[config.parent.name][1]))
        assert {name: trained[name] for name in changes} == changes, config
