# SPDX-License-Identifier: Apache-2.0
"""Programs run by a SandboxFusion server (https://github.com/bytedance/SandboxFusion), through verl's client.

The server is sent the program and one input, and answers with what was printed: what is expected stays here, as with
the sandboxes of this machine. Its own limits hold beside the time and memory that are asked for.
"""

import json
import math
from pathlib import Path

from opd_ext.rewards.code import inside
from opd_ext.rewards.code.sandbox import Job, Outcome, report

_MARK = "\x1e"  # before the report, which is the last line on standard error
_TAIL = """
import json as _json
run(_json.loads(__JOB__), lambda text: print(chr(30) + text, file=sys.stderr, flush=True))
"""


def run_remote(url: str, job: Job) -> Outcome:
    """Run one test there.

    Raises:
        ConnectionError: the server does not answer, or says that it cannot run programs.
    """
    from opd_ext.bridge.graders import run_code

    described = {
        "program": job.program, "function": job.function, "arguments": list(job.arguments), "names": dict(job.names),
        "check": job.check, "prelude": job.prelude,
        "paths": [], "recursion": 600_000,
    }  # fmt: skip
    source = Path(inside.__file__).read_text() + _TAIL.replace("__JOB__", repr(json.dumps(described)))
    answer = run_code(url, source, job.stdin, math.ceil(job.limits.seconds), job.limits.memory_bytes >> 20)
    ran = answer.get("run_result") or {}
    output, status = str(ran.get("stdout") or ""), ran.get("status")
    seconds = float(ran.get("execution_time") or 0.0)
    if status == "TimeLimitExceeded":
        return Outcome("time", output, seconds=seconds)
    if answer.get("status") == "SandboxError" or status not in ("Finished", "Error"):
        raise ConnectionError(f"{url} cannot run programs: {str(answer.get('message') or answer.get('status')):.200}")
    said = str(ran.get("stderr") or "").rpartition(_MARK)[2] if _MARK in str(ran.get("stderr") or "") else ""
    told = report(said.strip())
    if told.get("error"):
        over = told["error"].partition(":")[0] == "MemoryError"
        return Outcome("memory" if over else "error", output, seconds=seconds, **told)
    if ran.get("return_code") not in (0, None):
        return Outcome("error", output, error=f"the process ended with status {ran['return_code']}", seconds=seconds)
    return Outcome("finished", output, seconds=seconds, **told)
