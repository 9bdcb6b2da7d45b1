"""A reward from a regular expression: 1 if the response has a number, else 0.

rewards: [{kind: command, run: "python3 configs/rewards/regex.py"}]

Input: a line of JSON for each response: {"prompt", "response", "reference", "num_tokens", "record"}; `record` is the line of the data.
Output: a line for each: a number, {"reward": number}, or null if there is no score. Flush after each line.
"""
import json
import re
import sys

for line in sys.stdin:
    request = json.loads(line)
    print(1.0 if re.search(r"\d", request["response"]) else 0.0, flush=True)
