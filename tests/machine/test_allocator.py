import ctypes
import subprocess
import sys

import pytest

from qimera.machine.allocator import reuse_freed_memory

PROGRAM = """
import ctypes, resource
from qimera.machine.allocator import reuse_freed_memory, reusing_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        ctypes.memset((block := libc.malloc(64 << 20)), 1, 64 << 20)
        libc.free(ctypes.c_void_p(block))
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() >> 20

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
before = resident()
print(faults())
with reusing_freed_memory():
    with reusing_freed_memory():
        print(faults())
    print(faults(), resident() - before)
print(faults(), resident() - before)
worked = reuse_freed_memory()
with reusing_freed_memory():
    faults()
print(faults(), resident() - before, worked)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator than glibc's")
def test_memory_that_is_freed_is_kept_where_that_is_asked_for() -> None:
    """Of twenty blocks of 64 MiB, only the first one is made of new pages."""
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    ordinary, inner, outer, held, after, left, whole, kept, worked = result.stdout.split()
    assert int(inner) < int(ordinary) / 10
    assert int(outer) < int(ordinary) / 10
    assert int(held) > 60
    assert int(after) > int(ordinary) / 2  # as before the block
    assert int(left) < 30
    assert int(whole) < int(ordinary) / 10  # no end of a block takes back what the process asked for
    assert int(kept) > 60
    assert worked == "True"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert not reuse_freed_memory()
