"""`--code=PATTERN`, the process that checks each submission, and the table of parts at the end."""

import glob
import os
from collections import Counter
from pathlib import Path

import pytest

from .judge import FAILED, NOT_JUDGED, OK, PARTS, Judge, is_interface, part_of, title
from .process import Process, find_checks
from .submissions import ROOT


def pytest_addoption(parser):
    text = "check these folders or zips, not this project; quote the pattern; repeat the option for more"
    parser.addoption("--code", action="append", default=[], metavar="PATTERN", help=text)


def pytest_configure(config):
    if "--code" in config.invocation_params.args:
        # pytest would take the next word for a folder of tests, and load a conftest.py in it.
        raise pytest.UsageError("write --code=PATTERN, with an equals sign")
    config.judges, config.submissions = {}, []
    for pattern in patterns(config):
        pattern = str(config.invocation_params.dir / Path(pattern).expanduser())
        found = [Path(each) for each in sorted(glob.glob(pattern, recursive=True))]
        found = [path for path in found if path.is_dir() or path.suffix.lower() == ".zip"]
        if not found:
            raise pytest.UsageError(f"--code={pattern}: no folder and no zip there")
        config.submissions += [path for path in found if path not in config.submissions]


def patterns(config):
    # If tests/assignment is not on the command line, pytest has not read pytest_addoption.
    return config.getoption("--code", default=None) or []


def pytest_generate_tests(metafunc):
    if "code" in metafunc.fixturenames:
        paths = metafunc.config.submissions or [ROOT]
        names = ["this project" if path == ROOT else path.name for path in paths]
        metafunc.parametrize("code", paths, ids=names, indirect=True, scope="session")


def pytest_ignore_collect(collection_path, config):
    """Leave out the tests of the checks themselves when other code is checked."""
    return True if patterns(config) and collection_path.name == "test_the_checks.py" else None


@pytest.fixture(scope="session")
def code(request):
    """Return the Judge of a submission, in whose process `pytest_pyfunc_call` runs the test."""
    process = Process(request.param)
    judge = Judge(find_checks(), process.run)
    name = os.path.relpath(request.param, request.config.invocation_params.dir)
    request.config.judges[name] = judge
    yield judge
    process.close()
    if patterns(request.config):
        counts = Counter(result.status for result in judge.results.values())
        plugins = request.config.pluginmanager
        with plugins.getplugin("capturemanager").global_and_fixture_disabled():
            words = ", ".join(f"{count} {status}" for status, count in counts.items())
            plugins.getplugin("terminalreporter").write_line(f"\n{name}: {words}")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    judge = pyfuncitem.funcargs.get("code")
    if not isinstance(judge, Judge):
        return None
    result = judge.result(pyfuncitem.originalname)
    if result.status == NOT_JUDGED:
        pytest.skip(result.text)
    if result.status != OK:
        pytest.fail("\n".join([result.text, *result.notes]), pytrace=False)
    return True


def cell(results, part):
    """Return what the table says of a part."""
    found = {name: each.status for name, each in results.items() if part_of(name) == part}
    failed = [is_interface(name) for name, status in found.items() if status == FAILED]
    if not all(failed):
        return f"{failed.count(False)} failed"
    others = [status for status in found.values() if status not in (OK, FAILED)]
    return min(others, default="interface" if failed else OK if found else "")


def pytest_terminal_summary(terminalreporter, config):
    """Print the table of parts and the notes."""
    if not patterns(config):
        return
    terminalreporter.section("parts of the assignment")
    rows = {name: [cell(judge.results, part) for part in PARTS] for name, judge in config.judges.items()}
    width = max(map(len, rows), default=0)
    for name, cells in {"": [title(f"test_{part}") for part in PARTS], **rows}.items():
        terminalreporter.write_line(name.ljust(width) + "".join(f"{each:>12}" for each in cells))
    for name, judge in config.judges.items():
        for text in dict.fromkeys(note for result in judge.results.values() for note in result.notes):
            terminalreporter.write_line(f"{name}: note: {text}")
