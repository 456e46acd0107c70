"""Child processes that run a module of this package, and no code from the folders that the user works in or on.

Python puts the current folder first on its search path, so a `torch.py` in a checkpoint's folder would be run there. A child
is therefore started with `-P` in an empty folder. It imports this package from the files of its parent, however that was
installed, and everything else from its own site-packages and from the absolute folders in PYTHONPATH.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import UsageError

PACKAGE = Path(__file__).resolve().parents[1]
# Arguments: the name and the folder of the package, the module, and its arguments.
PROGRAM = """\
import importlib.util, runpy, sys
name, folder, module = sys.argv[1:4]
del sys.argv[1:4]
if name not in sys.modules:
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


def run_module(
    module: str,
    arguments: Sequence[str],
    python: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `module` (its full name) with `arguments` in a process of its own, by default with this interpreter.

    The working folder is empty, so paths in `arguments` must be absolute (see `absolute`). `environment` adds variables.
    Output that is not UTF-8 is replaced. Raises `UsageError` if `python` cannot be started.
    """
    interpreter = sys.executable if python is None else _executable(python)
    name = module.partition(".")[0]
    command = [interpreter, "-P", "-c", PROGRAM, name, str(PACKAGE), module, *arguments]
    with tempfile.TemporaryDirectory(prefix="lmpress-process-") as folder:
        try:
            return subprocess.run(  # noqa: S603 our own module
                command,
                cwd=folder,
                env=_isolated(os.environ) | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
                check=False,
            )
        except OSError as error:
            raise UsageError(
                f"{interpreter} cannot be started: {error.strerror}", "give --python an interpreter"
            ) from error


def absolute(path: str | Path) -> str:
    """`path` as another process finds it; a name of the Hugging Face Hub stays as it is."""
    return str(Path(path).absolute()) if Path(path).exists() else str(path)


def _executable(python: str | Path) -> str:
    """A path relative to the current folder made absolute, links kept: they lead into virtual environments."""
    return str(Path(python).absolute()) if os.sep in str(python) else str(python)


def _isolated(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without relative and empty folders in PYTHONPATH: these mean the current folder."""
    folders = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if Path(each).is_absolute()]
    own = dict(environment) | {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}
    if not folders:
        del own["PYTHONPATH"]
    return own
