"""A stand-in for `vllm serve`: the routes llmac uses, in this process, with a will of its own where a test needs it."""

import contextlib
import itertools
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from llmac.errors import EngineError


class FakeServer:
    """Answers with tokens that tell prompt, sibling and seed apart. `broken` sees a path and a body first."""

    def __init__(self, *, model="model", port=0, **facts):
        self.facts = {
            "model_config": {
                "model": model,
                "max_model_len": 128,
                "dtype": "torch.float32",
                "logprobs_mode": "processed_logprobs",
            },
            "weight_transfer_config": {"backend": "fake"},
        }
        self.facts["model_config"].update(
            {name: value for name, value in facts.items() if name != "backend"}
        )
        if "backend" in facts:
            self.facts["weight_transfer_config"] = facts["backend"]
        self.broken = lambda path, body: None
        """Returns None to go on, (status, answer), or "drop" to cut the connection."""
        self.seconds = 0.0
        self.says_cached = False
        """An answer to a request takes so long."""
        self.calls = []
        self.prompts = []
        self.at_once = self.most_at_once = 0
        self._lock = threading.Lock()
        self._resumed = threading.Event()
        self._resumed.set()
        self._connections = set()
        self._port = port
        self._http = None
        self.start()
        self._port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self._port}"

    def start(self):
        """Like a new process: with the weights of the checkpoint."""
        if self._http is not None:
            return
        self.label, self.paused, self.session = "default", False, None
        self.weights = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *arguments):
                pass

            def setup(self):
                super().setup()
                outer._connections.add(self.connection)

            def do_GET(self):
                self._serve(None)

            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._serve(json.loads(content) if content else None)

            def _serve(self, body):
                outer._resumed.wait()
                outer.calls.append(self.path)
                answer = outer.broken(self.path, body) or outer._answer(self.path, body)
                if answer == "drop":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, content = answer
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass

        self._http = self._listening(lambda: Quiet(("127.0.0.1", self._port), Handler))
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    @staticmethod
    def _listening(listen, seconds=5.0):
        """Between two starts somebody's outgoing connection may have the port for a moment."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return listen()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def kill(self):
        """Like kill -9: connections break, nobody listens."""
        http, self._http = self._http, None
        if http is None:
            return
        http.shutdown()
        http.server_close()
        self._resumed.set()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def hang(self):
        """Like SIGSTOP: connections are taken and nothing is answered."""
        self._resumed.clear()

    def _answer(self, path, body):
        path = path.partition("?")[0]
        routes = {
            "/health": lambda: {},
            "/server_info": lambda: {"vllm_config": self.facts},
            "/weight_info": lambda: {"weight_version": self.label},
            "/init_weight_transfer_engine": lambda: {},
            "/pause": lambda: self._pause(True),
            "/resume": lambda: self._pause(False),
            "/collective_rpc": lambda: self._call(body["method"]),
            "/start_weight_update": self._start_update,
            "/update_weights": lambda: self._update(body["update_info"]),
            "/update_weight_version": lambda: self._label(body["new_version"]),
            "/finish_weight_update": lambda: self._finish_update(body),
            "/reset_prefix_cache": lambda: {"success": True},
            "/inference/v1/generate": lambda: self._generate(body),
        }
        if path not in routes:
            return 404, {"detail": "Not Found"}
        try:
            return 200, routes[path]()
        except RuntimeError as error:
            return 500, {"error": {"message": str(error)}}

    def _pause(self, paused):
        self.paused = paused
        return {}

    def _call(self, method):
        assert method == "break_off_weight_update"
        self.session = None
        return {"results": [None]}

    def _start_update(self):
        if self.session is not None:
            raise RuntimeError("a weight update is already active")
        self.session = {}
        return {}

    def _label(self, label):
        self.label = label
        return {}

    def _update(self, bucket):
        if self.session is None:
            raise RuntimeError("no weight update is active")
        self.session.update(bucket)
        return {}

    def _finish_update(self, body):
        if self.session is None:
            raise RuntimeError("no weight update is active")
        self.weights, self.session = self.session, None
        if body:
            self.label = body["weight_version"]
        return {}

    def _generate(self, body):
        assert not self.paused, "a paused server would let the request wait"
        params = body["sampling_params"]
        with self._lock:
            self.prompts.append(tuple(body["token_ids"]))
            self.at_once += params.get("n", 1)
            self.most_at_once = max(self.at_once, self.most_at_once)
        label = self.label
        time.sleep(self.seconds)
        with self._lock:
            self.at_once -= params.get("n", 1)
        choices = [choice(body, place, label) for place in range(params.get("n", 1))]
        usage = {"prompt_tokens_details": {"cached_tokens": 1} if self.says_cached else None}
        return {"choices": choices, "usage": usage}


def choice(body, place, label):
    """What a sibling says: the first token of its prompt, its place."""
    tokens = [body["token_ids"][0], place][: body["sampling_params"]["max_tokens"]]
    return {
        "index": place,
        "token_ids": tokens,
        "finish_reason": "length",
        "logprobs": {"content": [{"logprob": -0.5, "token_id": token} for token in tokens]},
        "weight_versions": [{"version": label, "start": 0, "end": len(tokens)}],
    }


class FakeProcess:
    """A `FakeServer` that is started and restarted as a local process is."""

    def __init__(self, **facts):
        self.server = FakeServer(**facts)
        self.server.kill()
        self.url = self.server.url
        self.starts = self.closes = 0
        self.slow = False
        """It starts, and is not ready until `server.start()`."""

    @property
    def alive(self):
        return self.slow or self.server._http is not None

    def start(self):
        self.starts += 1
        if not self.slow:
            self.server.start()

    def wait_ready(self, seconds):
        if self.slow and self.server._http is None:
            time.sleep(min(seconds, 3.0))
        if self.server._http is None:
            raise EngineError(f"{self.url} died while starting")

    def restart(self):
        self.server.kill()
        self.start()

    def close(self):
        self.closes += 1
        self.server.kill()


class FakeSender:
    """Tells a server the sum of every tensor; eight tensors a bucket."""

    backend = "fake"

    def __init__(self):
        self.closed = False

    def init_info(self):
        return {"where": "here"}

    def buckets(self, stream):
        while bucket := list(itertools.islice(stream, 8)):
            yield {name: float(tensor.sum()) for name, tensor in bucket}

    def close(self):
        self.closed = True
