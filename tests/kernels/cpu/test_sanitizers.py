"""The C files under the address and undefined behaviour sanitizers: no kernel reads or writes outside of its buffers."""

import subprocess
from pathlib import Path

import pytest

from lmpress.kernels.cpu import build
from lmpress.kernels.kernel import Unavailable

DRIVER = Path(__file__).with_name("driver.c")
FLAGS = ["-std=gnu11", "-O1", "-g", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def test_no_access_outside_of_buffers(tmp_path: Path) -> None:
    try:
        compiler = build.find_compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    if subprocess.run([compiler, *FLAGS, "-o", tmp_path / "probe", probe], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no sanitizers (install libasan and libubsan)")
    subprocess.run([compiler, *FLAGS, "-o", tmp_path / "driver", DRIVER, "-lm"], check=True)
    done = subprocess.run([tmp_path / "driver"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: ok" in done.stdout
