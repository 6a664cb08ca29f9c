"""The hand-in: the report under the right name, and an archive that works by itself."""

import io
import subprocess
import sys
import zipfile

import pytest

from report import hand_in
from utils.files import ROOT

TOP = "Doe_EE8520_F25"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(io.BytesIO(hand_in.archive(TOP))).extractall(folder)
    assert [path.name for path in folder.iterdir()] == [TOP]
    return folder / TOP


def test_archive_holds_the_project_without_hidden_files(unpacked):
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {"README.md", "LICENSE", "pytest.ini", "tests/conftest.py", "results/step1_gan/loss.png"} <= names
    for name in names:
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
        assert not any(part.startswith(".") for part in name.split("/"))
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "*.py", "*.md", "*.gz", "*.pt", "*.npz", "*.png"]
        tracked = subprocess.check_output(command, cwd=ROOT, text=True).split()
        assert {name for name in tracked if (ROOT / name).exists()} <= names


def test_what_stays_out(tmp_path):
    kept = ["hw2_step1_main.py", "own/notebook.ipynb", "results/step3_vae/per_image.npz"]
    others = [".pytest_cache/README.md", ".venv/a.py", "models/__pycache__/GAN.py", "Doe_EE8520_F25.pdf"]
    others += ["results/step1_gan/runs/seed=3/loss.png", "results/step1_gan/ablation/seed_0/loss.png"]
    others += ["checkpoint.pt", "compare.png", "notes.docx", "data/FashionMNIST/raw/a.gz"]
    others += ["report/report.pdf", "report/runs.json"]
    for name in kept + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = zipfile.ZipFile(io.BytesIO(hand_in.archive(TOP, tmp_path))).namelist()
    assert names == [f"{TOP}/{name}" for name in kept]


@pytest.mark.parametrize("flags", [["--collect-only"], pytest.param([], marks=pytest.mark.slow)])
def test_the_tests_of_the_archive_pass(flags, unpacked):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *flags]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("script", ["report/hand_in.py", "results/make_tables.py"])
def test_scripts_outside_of_utils_find_it(script, tmp_path):
    command = [sys.executable, ROOT / script, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


def test_both_files(monkeypatch, tmp_path, capsys):
    """A file that cannot be read is named, and then nothing is written."""
    monkeypatch.setattr(hand_in, "archive", lambda top: b"PK")
    monkeypatch.setattr(hand_in, "REPORT", tmp_path / "reference.pdf")
    monkeypatch.chdir(tmp_path)
    assert hand_in.main(["--lastname", "Doe", "--out-dir", "out"]) == 2
    assert "reference.pdf" in capsys.readouterr().err and not (tmp_path / "out").exists()
    for name in ("reference", "own"):
        (tmp_path / f"{name}.pdf").write_bytes(name.encode())
    assert hand_in.main(["--lastname", "Doe", "--out-dir", "out"]) == 0
    assert "reference solution" in capsys.readouterr().out
    assert (tmp_path / "out" / f"{TOP}.pdf").read_bytes() == b"reference"
    assert hand_in.main(["--lastname", "van der Müller-O'Neil", "--report", "own.pdf"]) == 0
    assert "reference solution" not in capsys.readouterr().out
    assert (tmp_path / "van der Müller-O'Neil_EE8520_F25.pdf").read_bytes() == b"own"
    assert (tmp_path / "van der Müller-O'Neil_EE8520_F25.zip").read_bytes() == b"PK"


@pytest.mark.parametrize("name", ["../a", " ", "-a", "x" * 101])
def test_a_name_that_is_no_file_name_is_refused(name, tmp_path, capsys):
    assert hand_in.main([f"--lastname={name}", "--out-dir", str(tmp_path / "out")]) == 2
    assert "--lastname" in capsys.readouterr().err and not (tmp_path / "out").exists()
