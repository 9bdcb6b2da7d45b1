"""A judge behind HTTP: start it, and let the run ask it.

python3 configs/rewards/server.py --port 8765
rewards: [{kind: http, url: "http://127.0.0.1:8765/", workers: 4, batch: true}]

An array of responses comes (without batch: one of them), and an array of rewards goes back. Put your own model in `judge`.
"""
import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def judge(asked):
    """The share of the reference's words that the response has; None without a reference."""
    words = set((asked["reference"] or "").lower().split())
    return len(words & set(asked["response"].lower().split())) / len(words) if words else None


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        answer = [judge(one) for one in asked] if isinstance(asked, list) else judge(asked)
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Silent."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    print(f"judging at http://127.0.0.1:{server.server_address[1]}/", flush=True)
    server.serve_forever()
