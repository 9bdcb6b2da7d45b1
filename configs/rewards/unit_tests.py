"""A reward by tests: the share of the record's tests that the response's Python code passes.

rewards: [{kind: command, run: "python3 configs/rewards/unit_tests.py", workers: 4, timeout_s: 120}]

The code is the response's last block between ``` lines, else all of it; the tests are the strings under `tests` of the record, such as
"assert add(1, 2) == 3". Each test is a process of its own in an empty folder, with limits of time, memory and files, and
without a network where the kernel lets us take it away (unshare). This is no wall against code that means harm: run it in a container.
"""
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile

SECONDS, BYTES = 5, 512 << 20


def limit():
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def without_network():
    """The words before a command that take its network away; none where that is not allowed."""
    words = ["unshare", "--user", "--net", "--map-root-user"]
    there = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if there else []


def code_of(response):
    blocks = re.findall(r"```(?:python)?\n(.*?)```", response, re.DOTALL)
    return blocks[-1] if blocks else response


def passes(code, test, before):
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run([*before, sys.executable, "-I", "-c", f"{code}\n{test}\n"], cwd=folder, env={}, timeout=2 * SECONDS,
                                   preexec_fn=limit, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return False
        return ended.returncode == 0


if __name__ == "__main__":
    before = without_network()
    for line in sys.stdin:
        asked = json.loads(line)
        tests = asked["record"].get("tests")
        code = code_of(asked["response"])
        reward = sum(passes(code, test, before) for test in tests) / len(tests) if tests else None
        print(json.dumps(reward), flush=True)
