"""The report builds to the text of the committed PDF, and the skeleton builds for any runs."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from report import make_numbers
from tests.conftest import TIMEOUT
from utils.files import ROOT

SOURCES, PROGRAMS = ROOT / "report" / "report.tex", ("latexmk", "pdflatex", "pdftotext", "pdffonts")
needs_sources = pytest.mark.skipif(not SOURCES.exists(), reason="needs the report's sources")
needs_latex = pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason=f"needs {', '.join(PROGRAMS)}")


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A project of one run."""
    run = tmp_path / "results" / "step9_toy"
    run.mkdir(parents=True)
    nll, share = dict(value=-1234.5678, unit="nats", floor=0.25), dict(value=0.5, standard_error=0.0123)
    options = dict(num_epochs=2, learning_rate=4e-4, channels=[3, 2])
    metrics = dict(nll=nll, share=share)
    config = dict(step="step1_gan", hardware="CPU_1 100%", hyperparameters=options)
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "results" / "comparisons.json").write_text(json.dumps(dict(gain=share)))
    (run / "losses.csv").write_text("iteration,epoch,loss\n1,1,2\n2,1,4\n3,1,\n")
    table = "variant,seeds,nll_mean,nll_std\ndefault,2,10,1\nnarrow,2,8,0.7\nwide-1.5,1,9.3,\n"
    (run / "ablation.csv").write_text(table)
    monkeypatch.setattr(make_numbers, "ROOT", tmp_path)
    monkeypatch.setattr(make_numbers, "REPORT", tmp_path)
    monkeypatch.setattr(make_numbers, "choice", {})
    return tmp_path


@pytest.mark.parametrize(
    "call, expected",
    [
        (r"\val{step9_toy.nll}{1}", r"\ensuremath{-}1{,}234.6"),
        (r"\val{step9_toy.learning_rate}{}", r"\ensuremath{4 \cdot 10^{-4}}"),
        (r"\val{step9_toy.channels}{}", "3, 2"),
        (r"\val{step9_toy.losses.last.loss}{1}", "3.0"),
        (r"\val{step9_toy.losses_std.1.loss}{3}", "1.414"),
        (r"\val{step9_toy.ablation.wide-1.5.nll_mean}{1}", "9.3"),
        (r"\err{step9_toy.share}{2}", r"0.50 \ensuremath{\pm} 0.01"),
        (r"\err{comparisons.gain}{3}", r"0.500 \ensuremath{\pm} 0.012"),
        (r"\mean{step9_toy.ablation.narrow.nll}{1}", r"8.0 \ensuremath{\pm} 0.7"),
        (r"\calc{[step9_toy.nll] ** 2 / 2 + log(1) - 2 * [step9_toy.nll.floor]}{0}", "762{,}078"),
        (r"\val{step9_toy.hardware}{}", r"CPU\_1 100\%"),
        (
            r"\ablation{step9_toy}{nll:1}",
            r"""\texttt{default} & 10.0 \ensuremath{\pm} 1.0 \\
\texttt{narrow} & 8.0 \ensuremath{\pm} 0.7 \\
\texttt{wide-1.5} & 9.3 \\""",
        ),
    ],
)
def test_numbers_of_the_report(call, expected, root):
    (root / "report.tex").write_text(f"text {call} more\n")
    line = make_numbers.make_files(root / "report.tex")["numbers.tex"]
    assert line.endswith(f"}}{{{expected}}}\n") and line.startswith(r"\numberdef{" + call[1:].split("{")[0])


@pytest.mark.parametrize(
    "call",
    [
        r"\val{step9_toy.ell}{1}",
        r"\val{step9_toy.losses.2.loss}{1}",
        r"\err{step9_toy.nll}{1}",
        r"\calc{[step9_toy.nll.unit] * 2}{1}",
        r"\calc{__import__('os').getcwd()}{1}",
        r"\source{results/step9_toy/losses.csv}{train}",
    ],
)
def test_a_missing_number_is_named_with_its_place(call, root):
    (root / "part.tex").write_text(f"\n% {call} in a comment\n{call}\n")
    (root / "report.tex").write_text("\\input{part}\n")
    with pytest.raises(LookupError, match="part.tex:3: " + re.escape(call)):
        make_numbers.make_files(root / "report.tex")


@needs_sources
def test_every_number_and_listing_of_the_report_is_there():
    texts = make_numbers.make_files(SOURCES)
    assert texts.pop("numbers.tex").count("numberdef") > 100
    assert len(texts) == 10 and '"""' not in "".join(texts.values())  # no docstrings


@needs_sources
def test_the_skeleton_has_every_part_with_its_points():
    page = (ROOT / "report" / "skeleton.tex").read_text()
    parts = re.findall(r"\\section\{Step (\d)|\\assignedpart\{(.)\}\{(\d+)\}", page)
    assert "".join(map("".join, parts)) == "1a3b8c10d42a3b6c6d103a4b5c10d6"
    for section in page.split(r"\assignedpart{")[1:]:
        assert r"\asked{" in section and r"\writehere{" in section


def test_the_choice_of_runs_holds_for_the_skeleton_alone(root, capsys):
    """A choice is kept, and what a run lacks is --. The report stops at it."""
    calls = [r"\val{step1.nll}{1} \val{step2.nll}{1} \ablation{step1_ablation}{ell:1}"]
    calls += [r"\ownfig{step1}{a} \ownfig{step1}{b} \chosen{author} \chosen{step1}"]
    (root / "skeleton.tex").write_text("\n".join(calls))
    (root / "report.tex").write_text(r"\val{step9_toy.nll}{1}")
    run = root / "results" / "step9_toy"
    (run / "a.png").touch()
    make_numbers.main(["--results", f"step1={run}"])
    make_numbers.main(["--author", "A & B"])
    lines = (root / "numbers_skeleton.tex").read_text().splitlines()
    texts = [re.fullmatch(r"\\numberdef\{[^}]*\}\{(.*)\}", line)[1] for line in lines]
    assert texts[:3] == [r"\ensuremath{-}1{,}234.6", "--", r"-- \\"]
    assert texts[3:5] == [r"\figurefile{\detokenize{results/step9_toy/a.png}}", r"\fbox{no such figure yet}"]
    assert texts[5:] == [r"A \& B", "--"]  # config.json does not say whether it was a dry run
    assert r"skeleton.tex:1: \val{step2.nll}{1} is missing" in capsys.readouterr().out
    make_numbers.main([])
    assert "step9_toy" in (root / "numbers.tex").read_text() and len(list(root.glob("numbers*"))) == 2
    (root / "report.tex").write_text(r"\val{step1.nll}{1} \val{step2.nll}{1}")
    with pytest.raises(LookupError):
        make_numbers.main([])


@pytest.mark.parametrize(
    "choice", ["step4=results/step9_toy", "step1=nowhere", "step2=results/step9_toy", "step1_ablation=."]
)
def test_a_choice_that_is_no_run_is_refused(choice, root, capsys):
    with pytest.raises(SystemExit):
        make_numbers.main(["--results", choice])
    assert choice in capsys.readouterr().err and not (root / "runs.json").exists()


def build(folder, *documents):
    """Run latexmk in a copy of the project; return the finished process."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    return subprocess.run(
        ["latexmk", *documents], cwd=folder / "report", timeout=TIMEOUT, check=False, **pipes
    )


def text(*command):
    return subprocess.run(command, capture_output=True, check=True).stdout.decode()


def words(path):
    """Return the words, sorted and without hyphens, because another version of TeX may break lines elsewhere."""
    return sorted(re.sub(r"-\n\s*|-", "", text("pdftotext", "-layout", path, "-")).split())


@needs_sources
@needs_latex
def test_the_build(tmp_path):
    """It gives the committed PDF, and a missing result stops it."""
    products = shutil.ignore_patterns("*.pt", "runs", "report.[!t]*", "numbers.tex", "*.lst")
    for name in ("models", "report", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=products)
    for path in ROOT.glob("hw2_*.py"):
        shutil.copy(path, tmp_path)
    report = tmp_path / "report" / "report.pdf"
    done = build(tmp_path)
    assert done.returncode == 0, done.stdout[-2000:]
    assert words(report) == words(ROOT / "report" / "report.pdf")
    log = report.with_suffix(".log").read_text(errors="replace")
    assert "undefined" not in log and "Overfull" not in log  # \hfuzz lets 5 pt pass
    assert "Type 3" not in text("pdffonts", report)

    path = tmp_path / "results" / "step2_pixelcnn" / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["test_nll"]
    path.write_text(json.dumps(metrics))
    done = build(tmp_path)
    assert done.returncode != 0 and "test_nll" in done.stdout


@needs_sources
@needs_latex
def test_the_skeleton_builds_for_runs_that_lack_figures_and_numbers(tmp_path, trained):
    copy = tmp_path / "report"
    shutil.copytree(ROOT / "report", copy, ignore=shutil.ignore_patterns("*.pdf", "numbers*", "runs.json"))
    done = build(tmp_path, "skeleton")
    assert done.returncode == 0 and "is missing" in done.stdout, done.stdout[-2000:]
    odd = tmp_path / "results" / "dropout=0.4,seed=3 and a space"
    shutil.copytree(trained["gan"], odd)
    for name in ("loss.pdf", "samples.png"):
        shutil.copy(ROOT / "results" / "step1_gan" / name, odd)
    runs = [f"step1={odd}", f"step2={trained['pixelcnn']}", f"step3={trained['vae']}"]
    command = [sys.executable, copy / "make_numbers.py", "--results", *runs, "--author", "Ada M. Öz_1"]
    subprocess.run(command, check=True)
    done = build(tmp_path, "skeleton")
    assert done.returncode == 0, done.stdout[-2000:]
    page = text("pdftotext", "-layout", copy / "skeleton.pdf", "-")
    metrics = json.loads((trained["pixelcnn"] / "metrics.json").read_text())
    assert f"{metrics['test_nll']['value']:.2f}" in page and "Ada M. Öz_1" in page and "dry run" in page
    assert text("pdfimages", "-list", copy / "skeleton.pdf").count("image") > 1  # samples.png
    assert page.count("no such figure yet") == (copy / "skeleton.tex").read_text().count(r"\ownfig{step") - 2
    assert not (copy / "numbers.tex").exists() and not (copy / "report.pdf").exists()
