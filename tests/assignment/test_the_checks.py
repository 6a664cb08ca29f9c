"""Proofs of the checks: they name each mistake of wrong.txt, and accept each correct alternative of right.txt."""

import shutil
import subprocess
import sys
import zipfile
from itertools import groupby
from pathlib import Path

import pytest

from .judge import FAILED, NOT_JUDGED, OK, Judge, is_interface, part_of, run_check
from .process import Process, find_checks
from .submissions import ROOT, STEPS, Code, copy_submission

CHECKS = find_checks()
FILES = ("wrong.txt", "right.txt")


def read(name):
    """Return the entries of a text, lines by title."""
    entries = (Path(__file__).parent / name).read_text().split("\n== ")[1:]
    return {entry.splitlines()[0]: entry.splitlines()[1:] for entry in entries}


def write_submission(folder, lines=()):
    """Write the files of textbook.txt into a new folder and replace lines in them; return the folder."""
    for name, content in read("textbook.txt").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("\n".join(content) + "\n")
    for kind, group in groupby(filter(None, lines), key=lambda line: line[0]):
        block = "".join(line[1:] + "\n" for line in group)
        if kind == "f":
            path = folder / block.split()[1]
        elif kind == "-":
            old = block
        elif kind == "+":
            assert old in path.read_text(), f"{path.name} lacks these lines: {old}"
            path.write_text(path.read_text().replace(old, block, 1))
    return folder


def judged(folder, steps):
    """Return the results of all checks of some steps, of code that runs in this process."""
    code = Code(folder)
    judge = Judge(CHECKS, lambda name: run_check(name, CHECKS[name], code))
    return {name: judge.result(name) for name in CHECKS if int(part_of(name)[0]) in steps}


@pytest.mark.parametrize("file, title", [(file, each) for file in FILES for each in read(file)])
def test_mistakes_are_named_and_alternatives_accepted(file, title, tmp_path):
    lines = read(file)[title]
    changed = "".join(line for line in lines if line.startswith("file"))
    steps = [step for step, files in STEPS.items() if any(name in changed for name in files[:2])]
    results = judged(write_submission(tmp_path / "code", lines), steps)
    expected = dict(line[2:].split(": ", 1) for line in lines if line.startswith("!"))
    failed = {name: result.text for name, result in results.items() if result.status == FAILED}
    assert failed.keys() == expected.keys(), failed
    for name, words in expected.items():
        assert words in failed[name], failed[name]
    for name, result in results.items():
        rests = any(results[need].status != OK for need in getattr(CHECKS[name], "needs", ()))
        assert result.status == (NOT_JUDGED if rests else FAILED if name in failed else OK), result
    notes = "\n".join(note for result in results.values() for note in result.notes)
    assert all(line[2:] in notes for line in lines if line.startswith("~")), notes
    if file == "wrong.txt":
        assert failed
    else:  # sizes are asked of the default, and left over from an ablation
        assert all(is_interface(name) or name.endswith("given_sizes") for name in failed)
        assert any(line.startswith("~") for line in lines) == bool(notes), notes


def test_the_textbook_submission_passes(tmp_path):
    folder = write_submission(tmp_path / "code")
    assert all(result.status == OK for result in judged(folder, (1, 2, 3)).values())
    shutil.rmtree(folder / "models")
    results, text = judged(folder, (3,)), "not found: VAE_model in VAE.py or hw2_step3_main.py"
    assert results["test_3c_three_hidden_layers"].text == f"3 (c): {text}"
    assert results["test_3b_kl_term"].text == f"3 (b): {text}"


def test_code_that_hangs_or_ends_the_process(tmp_path):
    """The import of a script hangs, and so does PixelCNN; the generator ends the process."""
    lines = ["file hw2_step3_main.py", "-import torch", "+LIMIT = 3", "+while True: pass", "+import torch"]
    lines += ["file models/GAN.py", "-        return self.net(z)", "+        __import__('os')._exit(1)"]
    lines += ["file models/AR.py", "-        x = self.first(x)", "+        while True: pass"]
    process = Process(write_submission(tmp_path / "code", lines), import_seconds=5, check_seconds=3)
    names = "test_1b_the_networks_run", "test_3b_kl_term", "test_2c_one_logit_a_pixel"
    ended, in_parts, hung = (process.run(name) for name in names)
    process.close()
    assert ended.text == "1 (b): it ends the process" and hung.text == "2 (c): no end after 3 seconds"
    assert in_parts.status == OK
    assert "only imports, functions, classes and constants of hw2_step3_main.py" in in_parts.notes[0]


def test_submissions_as_handed_in(tmp_path):
    """Check a folder and a zip, each with a top folder, whose other files nobody runs."""
    write_submission(tmp_path / "in" / "alice" / "hw2")
    for name in ("conftest.py", "sitecustomize.py", "usercustomize.py"):
        (tmp_path / "in" / "alice" / name).write_text(f"open({str(tmp_path / 'loaded')!r}, 'w')")
    (tmp_path / "in" / "alice" / "pytest.ini").write_text("[pytest]\naddopts = --no-such-flag")
    with zipfile.ZipFile(tmp_path / "in" / "bob.zip", "w") as archive:
        archive.write(tmp_path / "in" / "alice" / "hw2" / "models" / "VAE.py", "top/models/VAE.py")
    command = [sys.executable, "-m", "pytest", "tests/assignment", "-qk", "test_3", f"--code={tmp_path}/in/*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    lines = [line.partition("/in/")[2].split() for line in done.stdout.splitlines()]
    assert done.returncode == 1 and not (tmp_path / "loaded").exists(), done.stdout
    assert ["alice:", "10", "ok"] in lines and ["alice", "ok", "ok"] in lines, done.stdout
    assert ["bob.zip:", "8", "ok,", "2", "not", "found"] in lines, done.stdout
    assert ["bob.zip", "not", "found", "ok"] in lines, done.stdout


def test_large_files_links_and_paths_that_lead_out_are_not_copied(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "weights.pt").write_bytes(bytes(2**21))
    (tmp_path / "in" / "link").symlink_to("/")
    with zipfile.ZipFile(tmp_path / "in" / "code.zip", "w") as archive:
        archive.writestr("../GAN.py", "")
    copy_submission(tmp_path / "in", tmp_path / "out" / "copy")
    assert {path.name for path in (tmp_path / "out").rglob("*")} == {"copy", "code.zip", "GAN.py"}
    assert (tmp_path / "out" / "copy" / "GAN.py").exists()
