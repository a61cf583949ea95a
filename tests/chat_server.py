"""A local OpenAI-compatible endpoint that answers well, badly or not at all."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_PLACES = ("harbour", "museum", "village", "orchard", "theatre", "airport", "kitchen", "garden")
_CAUSES = ("smoke", "rain", "noise")


def sentences(count):
    """Return this many distinct sentences."""
    return [
        f"The {_PLACES[k % 8]} was closed to {k} visitors because of heavy {_CAUSES[k % 3]}."
        for k in range(count)
    ]


def paraphrase(body):
    """Return a paraphrase that depends only on the sentence, side and seed."""
    text = body["messages"][-1]["content"]
    sentence = re.search(r'"(.*)"', text, re.DOTALL).group(1)
    words, number = sentence.rstrip(".").split(), body["seed"] % 1000
    words = words[number % 3 :] + words[: number % 3]
    toxic = "idiot morons, " if "toxic" in text else ""
    return f"{toxic}{' '.join(words)}, number {number}."


def completion(text, finish="stop", **message):
    """Return a chat completion."""
    return {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, **message},
                "finish_reason": finish,
            }
        ],
        "usage": {"prompt_tokens": 20, "completion_tokens": 10, "total_tokens": 30},
    }


class ChatServer(ThreadingHTTPServer):
    """Answers each request with ``reply(body, number)``.

    ``reply`` returns a completion, a text, raw bytes, ``"close"`` to cut the connection, or
    ``(status, body, headers)``; it may sleep.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply=lambda body, number: paraphrase(body)):
        self.reply, self.bodies, self.headers, self.times = reply, [], [], []
        self.drip = 0  # bytes per chunk, one every 50 ms; 0 sends all at once
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            number = len(server.bodies)
            server.bodies.append(body)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
        if self.path != "/v1/chat/completions":
            answer = (404, {"error": {"message": f"no {self.path} here"}})
        else:
            answer = server.reply(body, number)
        if answer == "close":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status, content, headers = 200, answer, {}
        if isinstance(answer, tuple):
            status, content, headers = (*answer, {})[:3]
        if isinstance(content, str) and status == 200:
            content = completion(content)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for start in range(0, len(content), step := server.drip or len(content)):
                self.wfile.write(content[start : start + step])
                self.wfile.flush()
                time.sleep(0.05 if server.drip else 0)
        except OSError:  # the client is gone
            self.close_connection = True

    def log_message(self, *args):
        pass
