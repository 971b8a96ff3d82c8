"""A vLLM server that draws the answers in place of this process, with the policy's own weights.

    VLLM_SERVER_DEV_MODE=1 vllm serve <a model folder of the policy's shape> --host 127.0.0.1

Over HTTP, as vLLM documents it: weights go as a model folder at a path that both see (generation is
paused, which empties the server's caches; /collective_rpc calls the workers' `reload_weights` with
that path; /resume), prompts and answers as ids (/v1/completions with `return_token_ids`). A server
takes weights that do not fit, cuts them to its own shape and says nothing, so each time its
log-probs of one text are held against the policy's. Those of the answers are not asked for: the
trainer scores them itself. Draws are the server's, seeded, but not the same again on another
machine or beside other requests.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

import torch

from puna.core import parallel
from puna.core.checkpoint.hf_config import read_config
from puna.core.config import ModelConfig
from puna.core.documents import count_of, parse_json
from puna.core.generation.sampling import EosIds, all_of
from puna.core.model import Transformer
from puna.core.text.tokenizer import Tokenizer
from puna.trainers.train.run import save_model

TOKEN = "PUNA_ENGINE_TOKEN"  # the environment variable with the server's --api-key
PROBE = "Where is the 7th café? Über-all, said a naïve cat."  # read by both tokenizers
MOST_BYTES = 2**26  # of one of the server's replies
APART = 0.25  # nats a token on average; vLLM in bf16 is .04 from a policy of 135M in fp32
DEVELOPER = "start it with VLLM_SERVER_DEV_MODE=1 in its environment"


class Drawn(NamedTuple):
    """One answer."""

    tokens: list[int]  # EOS included where it is finished
    finished: bool


class NoRedirect(HTTPRedirectHandler):
    """Prompts and the token go to the address that was given, and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


OPENER = build_opener(ProxyHandler({}), NoRedirect)


class Engine:
    """The server at `url`, which finds the policy's weights in `folder`.

    It waits `timeout` seconds for each reply. Raises ValueError, one sentence, for an address that
    is none.
    """

    def __init__(self, url: str, folder: Path, tokenizer: Tokenizer, *, timeout: float):
        self.url = check_url(url)
        self.folder, self.tokenizer = folder.resolve(), tokenizer
        self.timeout = timeout
        self._model = ""  # what the server calls it
        self._context = 0  # tokens of prompt and answer
        self._served = Path()  # the folder that it began with
        self._saved: Callable[[], Any] = lambda: None  # the policy whose weights lie in `folder`

    def draw(
        self,
        policy: Transformer,
        prompts: Sequence[list[int]],
        keys: Sequence[tuple[int, ...]],
        *,
        max_new_tokens: int,
        eos_id: EosIds,
        temperature: float,
        batch_size: int,
    ) -> list[Drawn]:
        """An answer to each prompt by `policy` as it is now (collective; `keys` become the seeds),
        up to EOS, `max_new_tokens` or the end of the policy's context.

        Raises ValueError where the server does not answer, has another vocabulary, a shorter
        context or other weights than could be given to it, or cuts an answer short.
        """
        parallel.on_main(self._meet)
        self._model, self._context = parallel.broadcast([self._model, self._context])
        longest = parallel.all_max(max(map(len, prompts), default=0))
        needed = min(longest + max_new_tokens, policy.config.context)
        if needed > self._context:
            raise ValueError(
                f"{self.url} has room for {self._context} tokens, and a prompt of {longest} with "
                f"max_new_tokens {max_new_tokens} has more: start it with --max-model-len "
                f"{needed}, or lower max_new_tokens"
            )
        self._give(policy)

        def answer(prompt: list[int], key: tuple[int, ...]) -> Drawn:
            most = min(max_new_tokens, policy.config.context - len(prompt))
            asked = {
                "model": self._model,
                "prompt": prompt,
                "max_tokens": most,
                "temperature": temperature,
                "seed": seed_of(key),
                "stop_token_ids": list(all_of(eos_id)),
                "return_token_ids": True,
                **WHOLE,
            }
            reply = self._post("/v1/completions", asked)
            return self._checked(reply, prompt, most, all_of(eos_id))

        side_by_side = ThreadPoolExecutor(max(1, min(batch_size, len(prompts))))
        try:
            return list(side_by_side.map(answer, prompts, keys))
        finally:  # where one failed the others need not be asked for
            side_by_side.shutdown(cancel_futures=True)

    def _meet(self) -> None:
        """Once: what the server serves (rank 0)."""
        if self._model:
            return
        listed = self._get("/v1/models")
        try:
            card = listed["data"][0]
            model, context = str(card["id"]), int(card["max_model_len"])
            self._served = Path(str(card.get("root")))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"{self.url} lists no model as vLLM does; is it one?") from error
        asked = {"model": model, "prompt": PROBE, "add_special_tokens": False}
        if self._post("/tokenize", asked).get("tokens") != self.tokenizer.encode(PROBE):
            raise ValueError(
                f"{self.url} reads the same text as other ids than the policy's tokenizer: start "
                "it with the policy's own folder"
            )
        self._model, self._context = model, context

    def _give(self, policy: Transformer) -> None:
        """The policy's weights to the server (collective). It takes them each time, since it may
        have been started anew; those of a frozen policy are written once."""
        frozen = not any(parameter.requires_grad for parameter in policy.parameters())
        parallel.on_main(lambda: self._check_shape(policy.config, frozen))
        if not (frozen and policy is self._saved()):
            dtype = policy.__dict__.get("compute_dtype") or torch.float32
            save_model(self.folder, policy, None, dtype)
        parallel.on_main(self._reload)
        self._saved = weakref.ref(policy)
        self._compare(policy)

    def _check_shape(self, config: ModelConfig, frozen: bool) -> None:
        """ValueError where the server began with a model into which the policy's weights do not go,
        as far as that can be seen from here."""
        try:
            served, _, tied = read_config(self._served / "config.json")
        except (OSError, ValueError):
            return  # it is on another machine, or of another kind: the log-probs will say it
        if replace(served, context=config.context) != config or (tied and not frozen):
            raise ValueError(
                f"{self.url} serves {self._served}, whose shape is not the policy's: start it with "
                "the policy's own folder (one with tie_word_embeddings: as puna convert writes it)"
            )

    def _reload(self) -> None:
        self._post("/pause?mode=wait", {}, DEVELOPER)
        call = {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
        try:
            self._post("/collective_rpc", call, DEVELOPER)
        except Refused as error:
            raise ValueError(
                f"{self.url} did not take the weights in {self.folder} ({error.why}) and stays "
                "paused: it must see that path, and have been started with a model of that shape"
            ) from error
        self._post("/resume", {}, DEVELOPER)

    @torch.no_grad()
    def _compare(self, policy: Transformer) -> None:
        """ValueError where the server gives a text other probabilities than the policy does
        (collective)."""
        room = min(self._context, policy.config.context) - 1
        ids = self.tokenizer.encode(PROBE, bos=True)[:room]
        tokens = torch.tensor(ids, device=policy.device)
        hidden = policy(tokens[None])[0, :-1]
        own = policy.logprobs(hidden, tokens[1:])[0].tolist()

        def check() -> None:
            theirs = self._logprobs(ids)
            apart = sum(abs(a - b) for a, b in zip(own, theirs, strict=True)) / len(own)
            if not apart <= APART:
                raise ValueError(
                    f"{self.url} took the weights in {self.folder}, and its probabilities are not "
                    f"the policy's ({apart:.2f} nats a token apart): start it with the policy's "
                    "own folder, and not quantised"
                )

        parallel.on_main(check)

    def _logprobs(self, ids: list[int]) -> list[float]:
        """What the server gives each of a text's ids after the first."""
        asked = {"model": self._model, "prompt": ids, "max_tokens": 1, "temperature": 1.0}
        reply = self._post("/v1/completions", {**asked, "prompt_logprobs": 0, **WHOLE})
        try:
            given = reply["choices"][0]["prompt_logprobs"][1:]
            return [
                float(at[str(each)]["logprob"]) for at, each in zip(given, ids[1:], strict=True)
            ]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.url} answers without prompt_logprobs: it takes a vLLM of 0.10.2 or later"
            ) from error

    def _checked(
        self, reply: Mapping[str, Any], prompt: list[int], most: int, ends: tuple[int, ...]
    ) -> Drawn:
        """The answer in a reply; ValueError where it is not all of one."""
        try:
            choice = reply["choices"][0]
            tokens, read, why = (
                choice[name] for name in ("token_ids", "prompt_token_ids", "finish_reason")
            )
            whole = all(type(token) is int for token in tokens) and len(tokens) > 0
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{self.url} answers without token_ids: it takes a vLLM of 0.10.2 or later"
            ) from error
        vocabulary = self.tokenizer.vocab_size
        if not whole or min(tokens) < 0 or max(tokens) >= vocabulary:
            raise ValueError(
                f"{self.url} answered with ids beyond the policy's {vocabulary} pieces: start it "
                "with the policy's own folder"
            )
        ended = tokens[-1] in ends
        if read != prompt or (why == "stop") != ended or (not ended and len(tokens) != most):
            raise ValueError(
                f"{self.url} cut an answer short: {len(tokens)} of "
                f"{count_of(most, 'token')}, with the reason "
                f"{str(why)[:40]!r}; let nobody else pause it or abort requests"
            )
        return Drawn(tokens, ended)

    def _get(self, path: str) -> dict[str, Any]:
        return self._said(path, None, "")

    def _post(self, path: str, body: Mapping[str, Any], remedy: str = "") -> dict[str, Any]:
        return self._said(path, json.dumps(body).encode(), remedy)

    def _said(self, path: str, data: bytes | None, remedy: str) -> dict[str, Any]:
        """What the server replies (an empty reply: nothing); `remedy` is for one without `path`."""
        headers = {"Content-Type": "application/json", **authorization()}
        request = Request(self.url + path, data, headers)
        try:
            with OPENER.open(request, timeout=self.timeout) as reply:
                text = reply.read(MOST_BYTES + 1)
        except HTTPError as error:
            why = " ".join(error.read(400).decode("utf-8", "replace").split())
            if error.code == 404 and remedy:
                raise ValueError(f"{self.url} has no {path.partition('?')[0]}: {remedy}") from error
            raise Refused(self.url + path, f"{error.code} {why}".strip()) from error
        except (URLError, HTTPException, OSError) as error:
            why = str(getattr(error, "reason", error)) or type(error).__name__
            raise ValueError(
                f"{self.url} does not answer ({why}): start the server; the same command goes on"
            ) from error
        where = self.url + path
        found = parse_json(text, where, "is a vLLM server there?") if text else {}
        if not isinstance(found, dict) or len(text) > MOST_BYTES:
            raise ValueError(f"{self.url}{path} answers with something else than vLLM does")
        return found


# What the server is told of the distribution, so that no default of its own cuts anything off.
WHOLE = {
    "n": 1, "stream": False, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


class Refused(ValueError):
    """The server answered, but not with what was asked for."""

    def __init__(self, where: str, why: str):
        super().__init__(f"{where} refused: {why}")
        self.why = why


def seed_of(key: tuple[int, ...]) -> int:
    """63 bits that are a function of the key alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_url(url: str) -> str:
    """The address without a slash at its end; ValueError where it is more, or less, than one."""
    try:
        parts = urlsplit(url)
        whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        whole = False
    if not whole or "@" in url or parts.path not in ("", "/") or parts.query or parts.fragment:
        raise ValueError(
            f"engine is {url!r}; give a vLLM server's address, as http://127.0.0.1:8000, and its "
            f"key in the environment variable {TOKEN}"
        )
    return url.rstrip("/")


def authorization() -> dict[str, str]:
    """The header with the server's key, where one is set."""
    token = os.environ.get(TOKEN, "")
    if not (token.isascii() and token.isprintable()):
        raise ValueError(f"{TOKEN} holds characters that no header can; set it again")
    return {"Authorization": f"Bearer {token}"} if token else {}
