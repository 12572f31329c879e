"""What is freed stays with the process."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

import dtbert.training

# By its path: the package would load torch, which takes seconds.
CODE = """
import resource, runpy, sys

def faults_of_filling():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    filled = bytearray(b"x") * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

runpy.run_path(sys.argv[1])["keep_freed_memory"]()
print(faults_of_filling(), faults_of_filling())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose malloc this is about")
def test_memory_that_was_freed_is_used_again_without_page_faults() -> None:
    file = Path(dtbert.training.__file__).with_name("memory.py")
    done = subprocess.run([sys.executable, "-c", CODE, str(file)], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    # With huge pages the first, too, may be few.
    assert first > 0
    assert second < 10
