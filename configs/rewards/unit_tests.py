"""A reward from unit tests: the share of the record's tests that the response's Python code passes.

rewards: [{kind: command, run: "python3 configs/rewards/unit_tests.py", workers: 4, timeout_s: 120}]

The code is the response's last block between ``` lines, else the whole response; the tests are the strings under `tests` of the record,
such as "assert add(1, 2) == 3". Each test is its own process in an empty folder, with limits on time, memory and files, and without a
network if the kernel allows that (unshare). This does not protect against malicious code: run it in a container.
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
    """The command prefix that disables the network; empty if that is not allowed."""
    words = ["unshare", "--user", "--net", "--map-root-user"]
    works = shutil.which("unshare") and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    return words if works else []


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
        request = json.loads(line)
        tests = request["record"].get("tests")
        code = code_of(request["response"])
        reward = sum(passes(code, test, before) for test in tests) / len(tests) if tests else None
        print(json.dumps(reward), flush=True)
