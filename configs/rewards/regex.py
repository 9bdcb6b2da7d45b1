"""A reward by a regular expression: 1 where a response has a number, else 0.

rewards: [{kind: command, run: "python3 configs/rewards/regex.py"}]

A line of JSON comes for each response: {"prompt", "response", "reference", "num_tokens", "record"}; `record` is the line of the data.
A line goes back: a number, {"reward": number}, or null for what cannot be judged. Flush after each line.
"""
import json
import re
import sys

for line in sys.stdin:
    asked = json.loads(line)
    print(1.0 if re.search(r"\d", asked["response"]) else 0.0, flush=True)
