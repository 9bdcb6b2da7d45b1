"""A reward server: start it, and the run sends requests to it.

python3 configs/rewards/server.py --port 8765
rewards: [{kind: http, url: "http://127.0.0.1:8765/", workers: 4, batch: true}]

Input: an array of responses (without batch: a single one); output: an array of rewards. Put your own model in `score`.
"""
import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(request):
    """The share of the reference's words that the response contains; None without a reference."""
    words = set((request["reference"] or "").lower().split())
    return len(words & set(request["response"].lower().split())) / len(words) if words else None


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        reply = [score(one) for one in request] if isinstance(request, list) else score(request)
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """No log."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=8765)
    args = parser.parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    print(f"serving at http://127.0.0.1:{server.server_address[1]}/", flush=True)
    server.serve_forever()
