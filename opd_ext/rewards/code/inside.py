# SPDX-License-Identifier: Apache-2.0
"""What runs inside the sandbox: it shuts the door behind itself, then becomes the program.

The parent compiles this file and hands it to ``python -I -S`` with the job, so that a test costs one interpreter. It
imports the standard library only, and as little of it as it can. Nothing here knows what output is expected.
"""

import os
import sys

FILE = "Solution.py"
FRAMES = 3  # of a traceback, as LeetCode shows them
_MESSAGE = 400  # characters of an exception's message

# linux/sched.h, linux/mount.h, linux/prctl.h
_NEWNS, _NEWCGROUP, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
)  # fmt: skip
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _BIND, _REC, _PRIVATE = 1, 2, 4, 8, 32, 4096, 16384, 1 << 18
_DETACH = 2
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
# statvfs(3) flags of a mount, which a remount in a user namespace must repeat, as mount(2) names them.
_KEPT = {2: _NOSUID, 4: _NODEV, 8: _NOEXEC, 1024: 1024, 2048: 2048, 4096: 1 << 21}
_OLD = "/.old"


def main(job):
    """Enter the sandbox that the job asks for, tell the parent, and run the program."""
    lifeline = _enclose(job["jail"]) if job["jail"] else None
    if job["uid"]:
        _become(job["uid"])
    if job["jail"] or job["uid"]:
        _seal()
    if lifeline is not None:
        _follow(lifeline)
    _limit(job["limits"])
    if job["filter"]:
        _filter(job["filter"])
    os.write(job["ready"], b"r")  # the write end stays open: it closes when the last process here has gone
    run(job, lambda text: _tell(job["report"], text))


# ---------------------------------------------------------------------- the program


def run(job, tell):
    """Run a program on one test, and ``tell`` what became of it: JSON with ``error`` and ``frames``, or ``result``.

    Args:
        job: ``program``, ``function`` (a name, or None for a program that reads standard input), ``arguments`` of it,
            ``check`` (Python behind the program, or empty; ``result`` is true if it passes), ``prelude`` (before it),
            ``names`` ({name: module} that the program may use without importing them), ``paths`` of packages,
            ``recursion`` (the limit).
    """
    import _sitebuiltins
    import builtins

    builtins.exit, builtins.quit = _sitebuiltins.Quitter("exit", ""), _sitebuiltins.Quitter("quit", "")
    sys.path += job["paths"]
    sys.setrecursionlimit(job["recursion"])
    sys.argv = [FILE]
    module = type(sys)("solution" if job["function"] or job["check"] else "__main__")
    module.__file__ = FILE
    sys.modules[module.__name__] = module
    if "threading" in job["program"]:
        import threading

        threading.excepthook = lambda args: tell(_error(args.exc_value))
    try:
        for name, source in job["names"].items():
            found = __import__(source)
            setattr(module, name, found if name == source else getattr(found, name))
        exec(compile(job["prelude"], "Prelude.py", "exec", dont_inherit=True), module.__dict__)
        exec(compile(job["program"], FILE, "exec", dont_inherit=True), module.__dict__)
        if job["function"]:
            tell(_result(_callable(module, job["function"])(*job["arguments"])))
        if job["check"]:
            exec(compile(job["check"], "Test.py", "exec", dont_inherit=True), module.__dict__)
            tell(_result(True))
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException as error:
        tell(_error(error))
        sys.exit(1)


def _callable(module, name):
    solution = getattr(module, "Solution", None)
    if hasattr(solution, name):
        return getattr(solution(), name)
    if hasattr(module, name):
        return getattr(module, name)
    raise NameError(f"there is no function {name}, and no class Solution that has it")


def _result(value):
    import json

    def plain(other):  # what numpy returns
        if hasattr(other, "tolist"):
            return other.tolist()
        raise TypeError(f"the function returns {type(other).__name__}, which JSON cannot hold")

    return '{"result": ' + json.dumps(value, default=plain) + "}"


def _error(error):
    from _json import encode_basestring_ascii as quoted

    traces, trace = [], error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == FILE:
            traces.append(trace)
        trace = trace.tb_next
    frames = [f"Line {trace.tb_lineno} in {trace.tb_frame.f_code.co_name} ({FILE})" for trace in traces[-FRAMES:]]
    if isinstance(error, SyntaxError) and error.filename == FILE:
        frames.append(f"Line {error.lineno} ({FILE})")
    try:
        message = str(error.msg if isinstance(error, SyntaxError) else error)[:_MESSAGE]
    except Exception:
        message = ""
    words = f"{type(error).__name__}: {message}" if message else type(error).__name__
    name = error.name if isinstance(error, NameError) and isinstance(getattr(error, "name", None), str) else ""
    shown = ", ".join(map(quoted, reversed(frames[-FRAMES:])))
    return f'{{"error": {quoted(words)}, "frames": [{shown}], "name": {quoted(name)}}}'


def _tell(report, text):
    data = text.encode("utf-8", "replace")
    os.ftruncate(report, 0)
    os.pwrite(report, data, 0)


# ---------------------------------------------------------------------- the sandbox


def _limit(limits):
    import resource

    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


def _library():
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *arguments):
        if getattr(libc, name)(*arguments) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}{arguments}: {os.strerror(number)}")

    return call


def _enclose(jail):
    """Namespaces of one's own, a root of one's own, and nobody outside: returns in process 1 of the new namespace.

    The process that was started waits outside for it; when it is killed, the kernel kills process 1 and with it every
    process of the namespace.
    """
    import _signal

    call = _library()
    call("prctl", _PDEATHSIG, 9, 0, 0, 0)
    _signal.signal(_signal.SIGCHLD, _signal.SIG_DFL)  # a parent that ignores it would hide how the child ended
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", _NEWNS | _NEWCGROUP | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET | (0 if jail["root"] else _NEWUSER))
    if not jail["root"]:
        _map_ids(uid, gid)
    lifeline, hold = os.pipe()
    if child := os.fork():
        os.close(lifeline)
        status = os.waitpid(child, 0)[1]
        os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    os.close(hold)
    _private_root(jail, call)
    return lifeline


def _follow(lifeline):
    """Die with the process outside; it may be gone before the kernel is told. A change of the user would undo it."""
    import select

    _library()("prctl", _PDEATHSIG, 9, 0, 0, 0)
    if select.select([lifeline], [], [], 0)[0]:
        os._exit(1)
    os.close(lifeline)


def _map_ids(uid, gid, inside=1000):
    for file, text in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)


def _become(uid):
    """From root to a user that nobody is: the kernel counts root's processes against no limit."""
    call = _library()
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    call("prctl", _DUMPABLE, 1, 0, 0, 0)
    try:
        call("unshare", _NEWUSER)
        _map_ids(uid, uid)
    except OSError:  # no user namespaces here: then the program cannot make any either
        pass


def _seal():
    """No further user namespaces, in which a program would be root, and no capabilities."""
    import ctypes

    try:
        with open("/proc/sys/user/max_user_namespaces", "w") as handle:
            handle.write("0")
    except OSError:  # no /proc here, or one that is read-only
        pass
    call = _library()
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    call("capset", header, none)


def _filter(steps):
    """See :mod:`syscalls`. A kernel without seccomp leaves the other walls."""
    import ctypes

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("steps", ctypes.c_char_p)]

    call = _library()
    call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        call("prctl", _SECCOMP, 2, ctypes.byref(Program(len(steps) // 8, steps)), 0, 0)
    except OSError:
        pass


def _private_root(jail, call):
    """A small file system of one's own with the interpreter's library, read-only, and an empty folder to write to."""

    def mount(source, target, kind, flags, options=None):
        encode = [None if text is None else text.encode() for text in (source, target, kind)]
        call("mount", *encode, flags, None if options is None else options.encode())

    mount(None, "/", None, _REC | _PRIVATE)
    mount("root", "/tmp", "tmpfs", _NOSUID | _NODEV, "size=256k,nr_inodes=512,mode=755")
    os.mkdir("/tmp" + _OLD)
    call("pivot_root", b"/tmp", ("/tmp" + _OLD).encode())
    os.chdir("/")
    for link, target in jail["links"].items():
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(target, link)

    def show(path):
        os.makedirs(path, exist_ok=True)
        mount(_OLD + path, path, None, _BIND | _REC)
        held = os.statvfs(path).f_flag
        kept = sum(flag for shown, flag in _KEPT.items() if held & shown)
        mount(None, path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | kept)

    for path in jail["folders"]:
        show(path)
    for path in jail["devices"]:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o666))
        mount(_OLD + path, path, None, _BIND | _REC)
    for path, options in (*jail["covered"].items(), *jail["empty"].items()):
        os.makedirs(path, exist_ok=True)
        mount("empty", path, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)
    for path in jail["packages"]:  # which may lie below what was covered
        show(path)
    for path in jail["covered"]:
        mount(None, path, None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | _NOEXEC)
    if jail["proc"]:
        os.makedirs("/proc")
        mount("proc", "/proc", "proc", _NOSUID | _NODEV | _NOEXEC)
    call("umount2", _OLD.encode(), _DETACH)
    os.rmdir(_OLD)
    mount(None, "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir(jail["cwd"])
