"""The report: it builds from the results, to the text of the committed PDF, and from nothing less."""

import json
import re
import shutil
import subprocess

import pytest

from tests.conftest import ROOT, TIMEOUT

PROGRAMS = ("latexmk", "pdflatex", "pdftotext", "pdffonts")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, PROGRAMS)) or not (ROOT / "report" / "report.tex").exists(),
    reason=f"needs the report's sources and {', '.join(PROGRAMS)}",
)


def build(folder):
    """Run latexmk in a copy of the project; return the finished process."""
    return subprocess.run(
        ["latexmk"], cwd=folder / "report", capture_output=True, text=True, errors="replace", timeout=TIMEOUT
    )


def text(path):
    return subprocess.run(
        ["pdftotext", "-layout", path, "-"], capture_output=True, check=True
    ).stdout.decode()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Copy what the report is made of, and build it there."""
    folder = tmp_path_factory.mktemp("project")
    patterns = "hw2_*.py models/*.py utils/*.py report/*.py report/*.bib report/*.tex".split()
    sources = {path for pattern in patterns for path in ROOT.glob(pattern)} - {
        ROOT / "report" / "numbers.tex"
    }
    for path in [*sources, ROOT / "report" / "latexmkrc"]:
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    shutil.copytree(ROOT / "results", folder / "results", ignore=shutil.ignore_patterns("*.pt", "runs"))
    done = build(folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    return folder


def words(path):
    """Return the words, sorted and without hyphens, because another version of TeX may break lines elsewhere."""
    return sorted(re.sub(r"-\n\s*|-", "", text(path)).split())


def test_the_build_is_the_committed_pdf(project):
    assert words(project / "report" / "report.pdf") == words(ROOT / "report" / "report.pdf")


def test_nothing_is_unresolved_too_wide_or_of_type_3(project):
    log = (project / "report" / "report.log").read_text(errors="replace")
    assert "undefined" not in log and "Overfull" not in log  # \hfuzz lets 5 pt pass
    fonts = subprocess.run(
        ["pdffonts", project / "report" / "report.pdf"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(fonts) > 2 and not any("Type 3" in line for line in fonts)


def test_a_changed_result_changes_the_pdf_and_a_missing_one_stops_the_build(project):
    path = project / "results" / "step2_pixelcnn" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["test_nll"]["value"] = 98.765
    path.write_text(json.dumps(metrics))
    assert build(project).returncode == 0
    assert "98.77" in text(project / "report" / "report.pdf")  # rounded as the text prints it

    del metrics["test_nll"]
    path.write_text(json.dumps(metrics))
    done = build(project)
    assert done.returncode != 0 and "test_nll" in done.stdout + done.stderr
    path.unlink()
    done = build(project)
    assert done.returncode != 0 and "step2_pixelcnn/metrics.json" in done.stdout + done.stderr
