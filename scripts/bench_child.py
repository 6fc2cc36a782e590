"""A benchmark's child process: every command is one line of JSON, and so is its answer."""

import json
import subprocess
from typing import Any

from jaxstack.core.errors import UserError


class Child:
    """Runs `command` until `close`; `what` names it in errors."""

    def __init__(self, what: str, command: list[str]) -> None:
        self.what = what
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **command: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            code = self.process.wait()
            raise UserError(f"{self.what}: the child process ended with {code}; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
