import ctypes
import subprocess
import sys

import pytest

from qimera.machine.allocator import reuse_freed_memory

PROGRAM = """
import ctypes, resource
from qimera.machine.allocator import reuse_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        ctypes.memset((block := libc.malloc(64 << 20)), 1, 64 << 20)
        libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
ordinary = faults()
print(ordinary, reuse_freed_memory(), faults())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")
def test_a_process_keeps_the_memory_that_it_frees() -> None:
    """Of twenty blocks of 64 MiB, only the first one is made of new pages."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    ordinary, worked, kept = result.stdout.split()
    assert worked == "True"
    assert int(kept) < int(ordinary) / 10


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not reuse_freed_memory()
