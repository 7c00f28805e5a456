# SPDX-License-Identifier: Apache-2.0
"""What the path of a warm Python starts: it has the process forked, and ends as that ends.

See :mod:`opd_ext.bridge.warm_python`. Standard library only, and little of it: this file is executed, without this
package and without ``site``, for every process that starts warm.
"""

import array
import contextlib
import json
import os
import signal
import socket
import sys

_FLAGS = {"-u", "-s", "-E", "-B", "-I"}  # without effect on what is forked here


# ---------------------------------------------------------------------- messages: a length, JSON, open files


def send(connection: socket.socket, message: object, files: list[int] = ()) -> None:
    """Send ``message`` (anything that JSON can hold) and open files, by their numbers."""
    body = json.dumps(message).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))] if files else []
    connection.sendmsg([len(body).to_bytes(4, "big")], rights)
    connection.sendall(body)


def receive(connection: socket.socket) -> tuple[object, list[int]]:
    """The next message and its files.

    Raises:
        EOFError: the other side is gone.
    """
    files = array.array("i")
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(256 * files.itemsize))
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content[: len(content) - len(content) % files.itemsize])
    length, body = int.from_bytes(head, "big"), b""
    while len(head) == 4 and len(body) < length:
        part = connection.recv(length - len(body))
        if not part:
            break
        body += part
    if len(head) < 4 or len(body) < length:
        raise EOFError("the other side closed the connection")
    return json.loads(body), list(files)


# ---------------------------------------------------------------------- the stand-in


def _program(arguments: list[str]) -> list[str] | None:
    """``arguments`` from the script, ``-m`` or ``-c`` on; None if there is none of them, or flags that matter."""
    for i, argument in enumerate(arguments):
        if argument in ("-c", "-m") or not argument.startswith("-"):
            return arguments[i:]
        if argument not in _FLAGS:
            return None
    return None


def stand_in(address: str, arguments: list[str]) -> None:
    """Have ``python ARGUMENTS`` forked by the server at ``address`` and end as it ends; never returns."""
    files = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own descriptor is closed by now
            os.fstat(int(name))
            files.append(int(name))
    program = _program(arguments)
    connection, pid = _ask(address, program, files) if program is not None else (None, None)
    if pid is None:
        os.execv(sys.executable, [sys.executable, *arguments])
    for forwarded in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(forwarded, lambda number, _: kill(pid, number))
    for descriptor in files:
        if descriptor > 2:  # a pipe whose closing means something must be held by the process alone
            os.close(descriptor)
    try:
        status = receive(connection)[0]
    except (OSError, EOFError):  # the template is gone, and took its processes along
        status = -signal.SIGKILL
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _ask(address: str, program: list[str], files: list[int]) -> tuple[socket.socket | None, int | None]:
    """The connection to the template that forked, and the forked process; None where it cannot be forked."""
    request = {
        "program": program,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }
    try:
        while address is not None:  # the server answers with the address of a template, the template with a process
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(address)
            send(connection, request, files)
            answer = receive(connection)[0]
            if isinstance(answer, int):
                return connection, answer
            connection.close()
            address = answer
    except (OSError, EOFError):
        pass
    return None, None


def kill(pid: int, number: int) -> None:
    """Send signal ``number`` to a process, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


if __name__ == "__main__":
    stand_in(sys.argv[1], sys.argv[2:])
