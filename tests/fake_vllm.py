"""A server that takes what a vLLM server takes, by its documented requests, and nothing else: any
further field, a wrong type or a wrong order is refused. Answers are drawn by Puna's own engine from
the weights that it was told to load.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import torch

from puna.core.checkpoint.folder import load_model
from puna.core.generation.generate import generate
from puna.core.text.tokenizer import Tokenizer

NUMBER = (int, float)
FIELDS = {  # of CompletionRequest, as far as a trainer needs them
    "model": str, "prompt": list, "max_tokens": int, "temperature": NUMBER, "top_p": NUMBER,
    "top_k": int, "min_p": NUMBER, "repetition_penalty": NUMBER, "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER, "n": int, "seed": int, "stop_token_ids": list, "stream": bool,
    "return_token_ids": bool, "prompt_logprobs": int,
}  # fmt: skip


class Refusal(Exception):
    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


class FakeVLLM:
    """What one server knows; `change` alters a choice before it is sent."""

    def __init__(self, folder: Path, context: int, token: str = "", developer: bool = True):
        self.tokenizer = Tokenizer(folder / "tokenizer.model")
        self.model, self.context = load_model(folder), context
        self.token, self.developer = token, developer
        self.paused, self.root = False, "a model on another machine"
        self.calls: list[str] = []
        self.asked: list[dict] = []
        self.loaded: list[Path] = []
        self.takes = lambda new: new  # what becomes of weights that are loaded
        self.change = lambda choice: choice
        self._drawing = threading.Lock()

    def reply(self, path: str, query: dict, body: dict | None, bearer: str) -> dict:
        self.calls.append(path)
        if path.startswith("/v1/") and bearer != (f"Bearer {self.token}" if self.token else ""):
            raise Refusal(401, "Unauthorized")
        if path == "/v1/models" and body is None:
            card = {
                "id": "served",
                "object": "model",
                "root": str(self.root),
                "max_model_len": self.context,
            }
            return {"object": "list", "data": [card]}
        if body is None:
            raise Refusal(405, "Method Not Allowed")
        if path == "/tokenize":
            if body.keys() - {"model", "prompt", "add_special_tokens"}:
                raise Refusal(400, "unknown field")
            bos = body.get("add_special_tokens", True)
            ids = self.tokenizer.encode(body["prompt"], bos=bos)
            return {"count": len(ids), "max_model_len": self.context, "tokens": ids}
        if path == "/v1/completions":
            return self.completion(body)
        if not self.developer:
            raise Refusal(404, "Not Found")
        if path == "/pause":
            if query.get("mode", "abort") not in ("abort", "wait", "keep"):
                raise Refusal(400, "unknown mode")
            self.paused = True
            return {"status": "paused"}
        if path == "/resume":
            self.paused = False
            return {"status": "resumed"}
        if path == "/collective_rpc":
            return self.collective(body)
        raise Refusal(404, "Not Found")

    def collective(self, body: dict) -> dict:
        kwargs = body.get("kwargs", {})
        if body.get("method") != "reload_weights" or kwargs.keys() != {"weights_path"}:
            raise Refusal(500, "no such method")
        if not self.paused:
            raise Refusal(500, "weights changed under a running generation")
        new = load_model(kwargs["weights_path"])
        if new.config != self.model.config:
            raise Refusal(500, "AssertionError: shape")
        self.model = self.takes(new)
        self.loaded.append(Path(kwargs["weights_path"]))
        return {"results": [None]}

    def completion(self, body: dict) -> dict:
        wrong = [n for n, v in body.items() if n not in FIELDS or not isinstance(v, FIELDS[n])]
        if wrong or body["model"] != "served" or self.paused:
            raise Refusal(400, f"bad request: {wrong}")
        if len(body["prompt"]) + body["max_tokens"] > self.context:
            raise Refusal(400, "longer than max_model_len")
        whole = [body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]]
        if whole != [1, -1, 0, 1] or body["presence_penalty"] or body["frequency_penalty"]:
            raise Refusal(400, "this is not the whole distribution")
        if "prompt_logprobs" in body:
            return {"choices": [{"prompt_logprobs": self.logprobs(body["prompt"])}]}
        self.asked.append(body)
        with self._drawing:
            (found,) = generate(
                self.model, [body["prompt"]], max_new_tokens=body["max_tokens"],
                eos_id=body["stop_token_ids"][0], temperature=body["temperature"], top_k=0,
                top_p=1.0, seed=body["seed"],
            )  # fmt: skip
        choice = {
            "index": 0, "text": self.tokenizer.decode(found.tokens), "logprobs": None,
            "finish_reason": "stop" if found.finished else "length", "stop_reason": None,
            "token_ids": found.tokens, "prompt_token_ids": body["prompt"],
        }  # fmt: skip
        return {
            "id": "cmpl-1", "object": "text_completion", "model": "served",
            "choices": [self.change(choice)],
        }  # fmt: skip

    def logprobs(self, ids: list[int]) -> list[dict | None]:
        with self._drawing, torch.no_grad():
            found = torch.log_softmax(self.model.logits(self.model(torch.tensor([ids])))[0], -1)
        return [None] + [
            {str(each): {"logprob": float(at[each]), "rank": 1, "decoded_token": ""}}
            for each, at in zip(ids[1:], found, strict=False)
        ]


@contextmanager
def served(fake: FakeVLLM) -> Iterator[str]:
    """The address at which it answers."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(None)

        def do_POST(self) -> None:
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body: dict | None) -> None:
            parts = urlsplit(self.path)
            try:
                bearer = self.headers.get("Authorization", "")
                status, found = (
                    200,
                    fake.reply(parts.path, dict(parse_qsl(parts.query)), body, bearer),
                )
            except Refusal as refusal:
                status, found = refusal.status, {"error": {"message": str(refusal)}}
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    class Server(ThreadingHTTPServer):
        request_queue_size = 256  # 5 by itself: of two ranks' requests at once some were reset

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
