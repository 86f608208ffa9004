"""What libraries say on stderr is held back, whatever stderr is."""

import subprocess
import sys


def test_where_stderr_is_closed_nothing_is_lost_but_what_is_said() -> None:
    program = "\n".join(
        [
            "import os",
            "os.close(2)",
            "from qimera.litert.remarks import held_back",
            "for _ in range(2):",
            "    with held_back() as said:",
            "        os.write(2, b'a line\\n')",
            "        print(said())",
        ]
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True)
    assert done.stdout == "['a line']\n['a line']\n"
