"""A process of its own for the code of each submission, with a time limit for each import and each check."""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from .judge import FAILED, Result, run_check, title
from .submissions import ROOT, Code, copy_submission

IMPORT_SECONDS, CHECK_SECONDS = 20, 60


def find_checks():
    """Return the checks of all steps by name."""
    modules = [importlib.import_module(f".test_step{step}", __package__) for step in (1, 2, 3)]
    return {name: check for each in modules for name, check in vars(each).items() if name.startswith("test_")}


class Process:
    """Runs checks of a copy of a submission in another process, and starts a new one where that hangs or dies."""

    def __init__(self, source, import_seconds=IMPORT_SECONDS, check_seconds=CHECK_SECONDS):
        self.import_seconds, self.check_seconds = import_seconds, check_seconds
        self.temporary = tempfile.mkdtemp()
        self.folder = Path(self.temporary).resolve() / "submission"
        copy_submission(source, self.folder)
        self.process, self.by_ast = None, []  # files whose import takes too long

    def run(self, name):
        """Return the result of a check."""
        while True:
            if self.process is None:
                self._start()
            result, importing, why = self._ask(name)
            if result is not None:
                return result
            self._stop()
            if not importing or importing in self.by_ast:
                return Result(FAILED, f"{title(name)}: {why}")
            self.by_ast.append(importing)

    def close(self):
        self._stop()
        shutil.rmtree(self.temporary, ignore_errors=True)

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, self.folder, self.by_ast), daemon=True)
        self.process.start()
        theirs.close()  # so that a process that dies closes the connection
        self.connection.recv_bytes()

    def _ask(self, name):
        """Return the result of a check, or None, the file whose import is under way, and why there is no result."""
        self.connection.send_bytes(name.encode())
        importing = ""
        while self.connection.poll(self.import_seconds if importing else self.check_seconds):
            try:
                answer = json.loads(self.connection.recv_bytes())
            except (EOFError, OSError):
                return None, importing, "it ends the process"
            if "importing" not in answer:
                return Result(**answer), "", ""
            importing = answer["importing"]
        return None, importing, f"no end after {self.check_seconds} seconds"

    def _stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
        self.process = None


def serve(connection, folder, by_ast):
    """Answer names of checks with results, in JSON, because unpickling could run a submission's code."""
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    os.environ.update(MPLBACKEND="Agg", CUDA_VISIBLE_DEVICES="")

    def answer(**values):
        connection.send_bytes(json.dumps(values).encode())

    checks = find_checks()
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT]
    code = Code(folder, announce=lambda file: answer(importing=file), by_ast=by_ast)
    os.chdir(folder)
    answer(started=True)
    while True:
        name = connection.recv_bytes().decode()
        answer(**asdict(run_check(name, checks[name], code)))
