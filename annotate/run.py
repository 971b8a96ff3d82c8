"""`puna annotate`: serve the page until it is interrupted."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from puna.annotate.config import LOOPBACK, AnnotateConfig
from puna.annotate.guidelines import read_guidelines
from puna.core.terminal import say
from puna.trainers.annotations.items import KINDS
from puna.trainers.annotations.people import new_token
from puna.trainers.annotations.store import Store, opened

OWNER = "owner"


def run(config: AnnotateConfig) -> None:
    """Open or make the file of comparisons, start the thread that samples, and serve.

    Raises ValueError where the extra is not installed, the port is taken, or the file, the models
    or the prompts cannot be used.
    """
    check_models(config)
    try:
        import uvicorn

        from puna.annotate.app import application
        from puna.annotate.visits import Desk
    except ImportError as error:
        raise ValueError(
            f"puna annotate needs {error.name}; install it with: pip install 'puna[annotate]'"
        ) from error
    guidelines = {
        kind: read_guidelines(path) for kind, path in of_kinds(config, "guidelines").items()
    }
    rewards = of_kinds(config, "reward")
    if config.models:  # PyTorch is not imported before a model is wanted
        from puna.annotate.supply import Supply, check_readable

        check_readable(config)
    if rewards:
        from puna.annotate.scoring import Scoring, check_judge

        for kind, path in rewards.items():
            check_judge(kind, path)
    with listening(config) as place, opened(config.out, create=True) as store:
        supply = Supply(store, config) if config.models else None
        scoring = Scoring(store, rewards, config.device) if rewards else None
        beside = [each.background for each in (supply, scoring) if each is not None]
        for each in beside:
            each.start()
        say_addresses(store, config)
        desk = Desk(store, guidelines, supply, config.turns, bool(config.annotators))
        server = uvicorn.Server(
            # Without an access log: addresses hold tokens.
            uvicorn.Config(
                application(desk, hosts_of(config)),
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=5,
            )
        )
        try:
            server.run(sockets=[place])
        finally:
            for each in beside:
                each.end()


def check_models(config: AnnotateConfig) -> None:
    """ValueError where there are answers to nothing, or of too many."""
    if len(config.models) > 2:
        raise ValueError(f"models names {len(config.models)}; two are compared")
    if bool(config.models) != bool(config.prompts):
        raise ValueError("models and prompts belong together; give both or neither")


def of_kinds(config: AnnotateConfig, what: str) -> dict[str, Path]:
    """The options helpfulness_`what` and safety_`what` that are given, by kind."""
    given = {kind: getattr(config, f"{kind}_{what}") for kind in KINDS}
    return {kind: path for kind, path in given.items() if path is not None}


def hosts_of(config: AnnotateConfig) -> set[str]:
    """The names that the server answers to, in small letters."""
    return {name.lower() for name in (*LOOPBACK, config.host, *config.names)}


@contextmanager
def listening(config: AnnotateConfig) -> Iterator[socket.socket]:
    """A socket at the address asked for; ValueError where it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    place = socket.socket(family, socket.SOCK_STREAM)
    try:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind((config.host, config.port))
            place.listen(128)
        except OSError as error:
            raise ValueError(
                f"{config.host}:{config.port} cannot be listened at ({error.strerror}); give "
                "another --port or --host"
            ) from error
        yield place
    finally:
        place.close()


def say_addresses(store: Store, config: AnnotateConfig) -> None:
    """Where to go; tokens are said here, once, and nowhere else."""
    name = config.names[0] if config.names else config.host
    place = f"http://{f'[{name}]' if ':' in name else name}:{config.port}"
    if not config.annotators:
        say(f"compare at {place}/ (Ctrl-C ends; {config.out} keeps everything)")
        return
    for who in (OWNER, *config.annotators):
        token = new_token(store, who, owner=who == OWNER, renew=config.renew)
        if token is None:
            say(f"{who}: has an address already; --renew gives another")
        else:
            say(f"{who}: {place}/enter/{token}")
    say(f"Ctrl-C ends; {config.out} keeps everything")
