"""The hand-in, and the numbers of the report: nothing missing, nothing invented."""

import ast
import importlib.util
import io
import json
import os
import subprocess
import sys
import zipfile

import pytest

from tests import children
from tests.conftest import ROOT, assert_refused
from utils import hand_in


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(io.BytesIO(hand_in.archive())).extractall(folder)
    return folder


def test_archive_holds_what_git_tracks_and_little_of_it(unpacked):
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {"README.md", "hw2_step1_main.py", "models/AR.py", "tests/conftest.py", "data/README.md"} <= names
    assert sum(name.endswith(".gz") for name in names) == 4
    for name in names:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
        assert not name.endswith((".png", ".pyc", "checkpoint.pt")) and "seeds" not in name
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "*.py", "results/*.pt"]
        tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
        assert {name for name in tracked if (ROOT / name).exists()} <= names


def test_archive_does_not_depend_on_place_time_or_git(unpacked):
    """Files of other times and modes, and no git, give the very same bytes."""
    os.utime(unpacked / "README.md", (10**9, 10**9))
    (unpacked / "README.md").chmod(0o600)
    (unpacked / "utils" / "__pycache__").mkdir(exist_ok=True)
    (unpacked / "utils" / "__pycache__" / "data.pyc").write_text("")
    assert hand_in.archive(unpacked) == hand_in.archive()


def is_module(root, name):
    path = root / name.replace(".", "/")
    return (path / "__init__.py").exists() or path.with_suffix(".py").exists()


def test_archive_holds_all_that_its_files_import(unpacked):
    for path in unpacked.rglob("*.py"):
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        missing = [name for name in names if is_module(ROOT, name) and not is_module(unpacked, name)]
        assert not missing, path
    assert "not slow" in (unpacked / "pytest.ini").read_text()


def test_both_files(call_step, monkeypatch, tmp_path):
    monkeypatch.setattr(hand_in, "REPORT", tmp_path / "report.pdf")
    assert_refused(call_step(hand_in, "--lastname", "Doe", "--out-dir", tmp_path / "out"), "latexmk")
    assert not (tmp_path / "out").exists()
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    monkeypatch.setattr(hand_in, "archive", lambda: b"PK")
    monkeypatch.chdir(tmp_path)
    assert call_step(hand_in, "--lastname", "van der Müller-O'Neil").returncode == 0
    assert (tmp_path / "van der Müller-O'Neil_EE8520_F25.pdf").read_bytes() == b"%PDF"
    assert (tmp_path / "van der Müller-O'Neil_EE8520_F25.zip").read_bytes() == b"PK"
    assert_refused(call_step(hand_in), "--lastname")


def test_the_home_folder_and_an_empty_name(call_step, monkeypatch, tmp_path):
    monkeypatch.setattr(hand_in, "REPORT", tmp_path / "report.pdf")
    monkeypatch.setattr(hand_in, "archive", lambda: b"PK")
    (tmp_path / "report.pdf").write_bytes(b"%PDF")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert call_step(hand_in, "--lastname", "Doe", "--out-dir=~/out").returncode == 0
    assert len([*(tmp_path / "home" / "out").iterdir()]) == 2
    assert_refused(call_step(hand_in, "--lastname", "Doe", "--out-dir", ""), "--out-dir")
    assert {path.name for path in tmp_path.iterdir()} == {"report.pdf", "home"}


NO_FILE_NAMES = [
    "a/b",
    "../a",
    "a\\b",
    "a\nb",
    "a\0b",
    "a:b",
    "a*",
    "",
    " ",
    ".",
    "a.",
    " a",
    "-a",
    "\udcff",
    "x" * 101,
]


@pytest.mark.parametrize("name", NO_FILE_NAMES)
def test_a_name_that_is_no_file_name_is_refused(name, call_step, tmp_path):
    assert_refused(call_step(hand_in, f"--lastname={name}", "--out-dir", tmp_path / "out"), "--lastname")
    assert not (tmp_path / "out").exists()


def test_an_interpreter_without_docstrings(tmp_path):
    command = [sys.executable, "-OO", "-m", "utils.hand_in", "--lastname", "X", "--out-dir", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "X_EE8520_F25.zip").exists(), done.stderr


def test_an_incomplete_copy_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("")
    with pytest.raises(hand_in.UserError, match="requirements.txt"):
        hand_in.files(tmp_path)


# ---------------------------------------------------------------------------------------------------------
# The numbers of the report


@pytest.fixture(scope="module")
def numbers():
    # Loaded by its path: report/ is no package.
    spec = importlib.util.spec_from_file_location("make_numbers", ROOT / "report" / "make_numbers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path):
    """A project of one run, one step script and one report."""
    run = tmp_path / "results" / "step9_toy"
    run.mkdir(parents=True)
    entry = dict(value=-1234.5678, unit="nats", floor=0.25)
    share = dict(value=0.5, standard_error=0.0123)
    (run / "metrics.json").write_text(json.dumps(dict(nll=entry, wall_time=dict(value=90.0), share=share)))
    options = dict(num_epochs=2, learning_rate=4e-4, channels=[3, 2])
    config = dict(seed=7, hardware="CPU_1 100%", minutes=None, hyperparameters=options)
    (run / "config.json").write_text(json.dumps(config))
    (run / "losses.csv").write_text("iteration,epoch,loss\n1,1,2\n2,1,4\n3,2,\n4,2,1\n")
    table = "variant,seeds,nll_mean,nll_std\ndefault,2,10,1\nnarrow,2,8,0.7\nwide-1.5,2,9.3,1\n"
    (run / "ablation.csv").write_text(table)
    (run / "ablation_dropped.csv").write_text("variant,seeds,nll_mean,nll_std\nworse-2.0,2,11,1\n")
    variants = '{"narrow": ("why?", dict(width=1)), "wide-1.5": ("is it a_b?", dict(width=(2, 3)))}'
    (tmp_path / "hw2_step9_main.py").write_text(f"import nothing_there\n\nVARIANTS = {variants}\n")
    (tmp_path / "report.tex").write_text(r"NLL \val{step9_toy.nll}{1}")
    return tmp_path


@pytest.mark.parametrize(
    "call, expected",
    [
        (r"\val{step9_toy.nll}{1}", r"\ensuremath{-}1{,}234.6"),
        (r"\val{step9_toy.nll.floor}{3}", "0.250"),
        (r"\val{step9_toy.nll.unit}{}", "nats"),
        (r"\val{step9_toy.learning_rate}{}", r"\ensuremath{4 \cdot 10^{-4}}"),
        (r"\val{step9_toy.channels}{}", "3, 2"),
        (r"\val{step9_toy.channels.0}{}", "3"),
        (r"\val{step9_toy.hardware}{}", r"CPU\_1 100\%"),
        (r"\val{step9_toy.losses.1.loss}{1}", "3.0"),
        (r"\val{step9_toy.losses.last.loss}{1}", "1.0"),
        (r"\val{step9_toy.losses_std.1.loss}{3}", "1.414"),
        (r"\val{step9_toy.ablation.wide-1.5.nll_mean}{1}", "9.3"),
        (r"\val{step9_toy.spread.nll.narrow}{4}", "0.1038"),  # of 1/10 and 1/9.3
        (r"\val{step9_toy.ablation_dropped.worse-2.0.nll_mean}{1}", "11.0"),
        (r"\err{step9_toy.share}{2}", r"0.50 \ensuremath{\pm} 0.01"),
        (r"\err{100*step9_toy.share}{1}", r"50.0 \ensuremath{\pm} 1.2"),
        (r"\err{step9_toy.nll}{0}", r"\ensuremath{-}1{,}235"),
        (r"\calc{2 * [step9_toy.nll.floor] + log(1)}{2}", "0.50"),
        (r"\calc{dense(4, *[step9_toy.channels])}{0}", "23"),
        (r"\calc{masked('A', 1, 2, 3) + masked('B', 2, 1, 3)}{0}", "21"),
        (r"\run{step9_toy}", r"seed 7, 2 epochs in 1.5 minutes on CPU\_1 100\%"),
    ],
)
def test_numbers_of_the_report(call, expected, numbers, root):
    (root / "report.tex").write_text(f"text {call} more\n")
    (line,), _ = numbers.definitions(root / "report.tex", root)
    assert line.endswith(f"}}{{{expected}}}") and line.startswith(r"\numberdef{" + call[1:].split("{")[0])


def test_a_changed_value_changes_the_report(numbers, root):
    before, _ = numbers.definitions(root / "report.tex", root)
    path = root / "results" / "step9_toy" / "metrics.json"
    path.write_text(path.read_text().replace("1234.5", "1234.6"))
    after, _ = numbers.definitions(root / "report.tex", root)
    assert before != after and "234.7" in after[0]


@pytest.mark.parametrize(
    "call, named",
    [
        (r"\val{step9_toy.ell}{1}", "'ell'"),
        (r"\val{step9_toy.nll.optimum}{1}", "'optimum'"),
        (r"\val{step9_toy/variants/none.nll}{1}", "none"),
        (r"\val{step9_toy.losses.3.loss}{1}", "'3'"),
        (r"\val{step9_toy.losses.1.gain}{1}", "'gain'"),
        (r"\val{step9_toy.seeds.default.nll_mean}{1}", "seeds.csv"),
        (r"\val{step9_toy.ablation.other.nll_mean}{1}", "'other'"),
        (r"\val{step9_toy.spread.gain}{1}", "spread of 'gain'"),
        (r"\err{step9_toy.ell}{1}", "'ell'"),
        (r"\calc{[step9_toy.ell] + 1}{1}", "'ell'"),
        (r"\calc{[step9_toy.nll.unit] + 1}{1}", "nats"),
        (r"\run{step8_toy}", "step8_toy"),
        (r"\ablation{step9_toy}{ell:1}", "'ell'"),
        (r"\source{hw2_step9_main.py}{train}", "train"),
    ],
)
def test_a_missing_number_is_named_with_its_place(call, named, numbers, root):
    (root / "part.tex").write_text(f"\n% {call} in a comment\n{call}\n")
    (root / "report.tex").write_text("\\input{part}\n")
    with pytest.raises(numbers.Missing, match="part.tex:3: .*" + named):
        numbers.definitions(root / "report.tex", root)


def test_the_build_stops_at_a_missing_run(numbers, root, monkeypatch):
    monkeypatch.setattr(numbers, "REPORT", root)
    with pytest.raises(SystemExit, match="make_numbers.py: report.tex:1: .*step9_toy"):
        numbers.main()
    assert not (root / "numbers.tex").exists()


def test_ablation_table(numbers, root):
    """The best and what does not differ from it are bold; the script with the reasons is not run."""
    rows = numbers.ablation("step9_toy", "reason, change, nll:1:min, nll/2:0", root).splitlines()
    assert rows == [
        r"\texttt{default} & the reported settings &  & $10.0 \pm 1.0$ & $5 \pm 0$ \\",
        r"\texttt{narrow} & why? & \texttt{width=1} & $\mathbf{8.0 \pm 0.7}$ & $4 \pm 0$ \\",
        r"\texttt{wide-1.5} & is it a\_b? & \texttt{width=(2, 3)} & $\mathbf{9.3 \pm 1.0}$ & $5 \pm 0$ \\",
    ]


def test_ablation_table_of_one_seed(numbers, root):
    """Without a spread none is written, and the best alone is bold."""
    path = root / "results" / "step9_toy" / "ablation.csv"
    path.write_text("variant,seeds,nll_mean,nll_std\ndefault,1,10,\nnarrow,1,8,\n")
    rows = numbers.ablation("step9_toy", "nll:1:min", root).splitlines()
    assert rows == [r"\texttt{default} & $10.0$ \\", r"\texttt{narrow} & $\mathbf{8.0}$ \\"]


def test_a_part_that_is_switched_off_needs_no_numbers(numbers, root):
    text = "\\newif\\ifmore\n\\ifmore\n\\val{step9_toy.none}{1}\n\\fi\n\\val{step9_toy.nll}{0}\n"
    (root / "report.tex").write_text(text)
    assert len(numbers.definitions(root / "report.tex", root)[0]) == 1
    (root / "report.tex").write_text(text + "\\moretrue\n")
    with pytest.raises(numbers.Missing, match="report.tex:3"):
        numbers.definitions(root / "report.tex", root)


@pytest.mark.parametrize("module", [children.step1, children.step2, children.step3])
def test_variants_are_read_from_the_step_scripts(module, numbers):
    explained = numbers.variants(ROOT / f"{module.__name__}.py")
    assert list(explained) == ["default", *module.VARIANTS]


@pytest.mark.skipif(not (ROOT / "report" / "report.tex").exists(), reason="needs the report's sources")
def test_every_number_and_listing_of_the_report_is_there(numbers):
    lines, listings = numbers.definitions(ROOT / "report" / "report.tex")
    assert len(lines) > 100 and all(listings.values())


def test_listings_are_the_code_without_docstrings(numbers):
    text = numbers.source("models/VAE.py", "kl_divergence")
    assert text.startswith("def kl_divergence(mean, logvar):\n    return 0.5") and '"""' not in text
