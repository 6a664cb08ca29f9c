"""The code of a submission: a temporary copy of a folder or a zip, and the names that the handout asks for."""

import ast
import contextlib
import importlib
import shutil
import sys
import types
import zipfile
from pathlib import Path

from .judge import NOT_FOUND, fail, first_line

ROOT = Path(__file__).resolve().parents[2]
LARGEST_FILE = 2**20  # bytes; larger ones are data or weights, and not copied
STEPS = {  # files of the models, scripts, and the names that the handout has in them
    1: ("GAN.py", "hw2_step1_main.py", "Generator Discriminator train_discriminator train_generator"),
    2: ("AR.py", "hw2_step2_main.py", "MaskedConv2d PixelCNN ConditionalMaskedConv2d ConditionalPixelCNN"),
    3: ("VAE.py", "hw2_step3_main.py", "VAE_model loss_func"),
}
CALLS_IN_CONSTANTS = ("torch.device", "torch.cuda.is_available", "int", "float")


def copy_submission(source, target):
    """Copy a folder or unpack a zip into a new folder; if no code is there, unpack the zips in it."""
    if source.is_dir():
        shutil.copytree(source, target, ignore=_left_out)
    else:
        _unpack(source, target)
    if not any(find_file(target, name) for files in STEPS.values() for name in files[:2]):
        for path in [*target.rglob("*.zip")]:
            _unpack(path, path.parent)


def _left_out(folder, names):
    paths = [Path(folder) / name for name in names]
    kept = [path for path in paths if path.name[0] != "." and not path.is_symlink()]
    kept = [path.name for path in kept if path.is_dir() or path.stat().st_size <= LARGEST_FILE]
    return set(names) - set(kept)


def _unpack(path, target):
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.file_size <= LARGEST_FILE and "__MACOSX" not in entry.filename:
                archive.extract(entry, target)  # which keeps the path inside the target


def find_file(folder, name):
    """Return the uppermost file with a name, or None."""
    return min(folder.rglob(name), key=lambda path: (len(path.parts), path), default=None)


class Code:
    """The modules of a submission, imported when one of their names is first asked for: `code.Generator`.

    `announce(file)` is called before a file is imported, and `announce("")` after it. Files in `by_ast` are not
    imported: only their imports, functions, classes and constants are executed.
    """

    def __init__(self, folder, announce=lambda file: None, by_ast=()):
        self.folder, self.announce, self.by_ast = folder, announce, by_ast
        self.modules, self.errors, self.remarks = {}, [], []
        self.imported = {}  # by folder: what the imports have left in sys.modules

    def relative(self, path):
        return Path(path).relative_to(self.folder).as_posix()

    def __getattr__(self, name):
        files = next((files for files in STEPS.values() if name in files[2].split()), None)
        if files is None:
            raise AttributeError(name)
        for module in map(self._module, files[:2]):
            if hasattr(module, name):
                return getattr(module, name)
        return fail("; ".join([f"{name} in {files[0]} or {files[1]}", *self.errors]), NOT_FOUND)

    def words(self, step, script_only=False):
        """Return the names that occur in the files of a step; comments and texts do not count."""
        words = set()
        for path in filter(None, (find_file(self.folder, file) for file in STEPS[step][script_only:2])):
            with contextlib.suppress(SyntaxError):
                for node in ast.walk(ast.parse(path.read_bytes())):
                    words |= {getattr(node, "id", None), getattr(node, "attr", None)}
        return words

    def _module(self, file):
        if file not in self.modules:
            path = find_file(self.folder, file)
            self.modules[file] = self._load(path) if path else None
        return self.modules[file]

    def _load(self, path):
        root = path.parent.parent if path.parent.name == "models" else path.parent
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        self.announce(self.relative(path))
        try:
            with self._alone(root):
                return self._import(path, name)
        except (SyntaxError, ValueError) as error:
            self.errors.append(f"{self.relative(path)} cannot be read: {error}")
            return None
        finally:
            self.announce("")

    @contextlib.contextmanager
    def _alone(self, root):
        """Let imports find the files of this submission, and not this project's or another's of the same name."""
        own = {path.stem for path in root.iterdir() if path.is_dir() or path.suffix == ".py"}

        def take_out():
            names = [name for name in sys.modules if name.split(".")[0] in own - {"tests"}]
            return {name: sys.modules.pop(name) for name in names}

        others, path, argv = take_out(), sys.path[:], sys.argv
        sys.modules.update(self.imported.get(root, {}))
        sys.path[:] = [str(root), *(each for each in path if Path(each or ".").resolve() != ROOT)]
        sys.argv = [""]
        importlib.invalidate_caches()
        try:
            yield
        finally:
            self.imported[root] = take_out()
            sys.modules.update(others)
            sys.path[:], sys.argv = path, argv

    def _import(self, path, name):
        file, tree = self.relative(path), ast.parse(path.read_bytes())
        why = "its import takes too long, or ends the process"
        if file not in self.by_ast:
            try:
                return importlib.import_module(name)
            except (Exception, SystemExit) as error:
                why = f"its import raises {type(error).__name__}: {first_line(error)}"
        self.remarks.append(f"only imports, functions, classes and constants of {file} were executed: {why}")
        module = sys.modules[name] = types.ModuleType(name)
        module.__file__ = str(path)
        for node in filter(_is_definition, tree.body):
            with contextlib.suppress(Exception):  # what is missing is named where it is used
                exec(compile(ast.Module([node], []), str(path), "exec"), module.__dict__)
        return module


def _is_definition(node):
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        calls = [ast.unparse(each.func) for each in ast.walk(node) if isinstance(each, ast.Call)]
        return all(name in CALLS_IN_CONSTANTS or name.endswith("Loss") for name in calls)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))
