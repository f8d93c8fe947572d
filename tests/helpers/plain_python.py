"""Python processes that have imported what `transformers.modeling_utils` imports, which takes seconds, and no more.

A server imports it once and forks them. What they share with a new process: they know nothing of symphony_hf, they have
their own `__main__` and arguments, and they end as Python ends, with a traceback and an exit code. The installed
package's entry point is switched off, so that what they see does not depend on how the project was installed.
"""

import json
import os
import subprocess
import sys


class PlainPython:
    """A context manager: `run` is `subprocess.run([sys.executable, "-c", code, *arguments])` without the imports.

    Args:
        folder: Empty folder for what the processes print.
    """

    def __init__(self, folder):
        self.folder = folder
        self.count = 0

    def __enter__(self):
        command = [sys.executable, "-W", "ignore", __file__]
        environment = os.environ | {"SYMPHONY_HF_AUTOLOAD": "0"}
        self.server = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *error):
        self.server.communicate()  # no more requests: it ends

    def run(self, code, *arguments):
        """Return what a process that runs the code prints. Its failure is an AssertionError with its traceback."""
        self.count += 1
        printed, errors = (self.folder / f"{self.count}.{name}" for name in ("out", "err"))
        self.server.stdin.write(json.dumps([code, [*map(str, arguments)], str(printed), str(errors)]) + "\n")
        self.server.stdin.flush()
        assert self.server.stdout.readline() == "0\n", errors.read_text()
        return printed.read_text()


def serve():
    """Answer each request with the exit code of a process that runs it."""
    import transformers.modeling_utils  # noqa: F401

    sys.path[0] = ""  # as for `python -c`
    while line := sys.stdin.readline():
        code, arguments, printed, errors = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, path in ((1, printed), (2, errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
