"""Serves a trained model: a page to draw on and an API, `python -m mnist_flax.serve RUN [--port=8000]`."""

import contextlib
import ipaddress
import logging as std_logging
import re
import signal
import socket
from collections.abc import Sequence

from absl import flags

from mnist_flax.inference import model_flags
from mnist_flax.runtime import cli, threshold

flags.adopt_module_key_flags(model_flags)
flags.adopt_module_key_flags(threshold)
_HOST = flags.DEFINE_string(
    "host", "127.0.0.1", "address to listen at; 0.0.0.0 lets everyone in who can reach this machine."
)
_PORT = flags.DEFINE_integer("port", 8000, "port to listen at; 0 takes any that is free.", 0, 65_535)
_ALLOWED_HOSTS = flags.DEFINE_list(
    "allowed_hosts", [], "names that requests may call the server by, besides its own: of a proxy before it, a.example."
)
_MAX_MEGABYTES = flags.DEFINE_float("max_megabytes", 16.0, "largest upload.", 0.001, 1000.0)
_MAX_MEGAPIXELS = flags.DEFINE_float("max_megapixels", 50.0, "largest picture.", 0.001, 150.0)

SECONDS_TO_FINISH = 5  # for requests that are under way when the server is stopped


def require_packages() -> None:
    """Raises UserError unless the extra that serves is installed."""
    from mnist_flax.ocr import page_reader

    try:
        import msgspec  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise cli.UserError(f"{error.name} is not installed: pip install 'mnist_flax[serve]'") from error
    page_reader.require_packages()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address.

    Raises UserError: the port is taken or not allowed, or the host is none of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(512)
    except (OSError, UnicodeError) as error:  # UnicodeError: a label of the name is empty or too long
        reason = error.strerror if isinstance(error, OSError) else "no host has such a name"
        raise cli.UserError(
            f"cannot listen at {host}, port {port} ({reason}): choose another --port or --host"
        ) from error
    return listener


def normalize(host: str) -> str:
    """A host as browsers send it: in lower case and shortened, an IPv4 address that is inside an IPv6 one taken out."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    return str(getattr(address, "ipv4_mapped", None) or address)


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def names(host: str, allowed: Sequence[str]) -> list[str] | None:
    """What a request may call a server at a normalized `host`: its own names, and those that are `allowed`.

    None is anything, for one that is open to other machines and has no name allowed.
    """
    local = ["localhost", "127.0.0.1", "[::1]"]
    try:
        own = [*local, in_url(host)] if ipaddress.ip_address(host).is_loopback else local if allowed else None
    except ValueError:
        own = local if host == "localhost" else [host]
    return None if own is None else [*own, *map(in_url, allowed)]


def check_names(allowed: Sequence[str]) -> list[str]:
    """The names, normalized.

    Raises:
      UserError: one is not the bare name of a host, as browsers send it.
    """
    for name in allowed:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                raise cli.UserError(
                    f"--allowed_hosts: {name!r} is not the name of a host: "
                    "give names alone, without scheme and port, international ones as xn--..."
                ) from None
    return [normalize(name) for name in allowed]


def serve(listener: socket.socket, host: str, allowed: Sequence[str], directory: str) -> None:
    """Loads a run and serves it until SIGINT or SIGTERM comes; requests under way are then finished.

    `host` is what the listener listens at, `allowed` are further names of it; all are normalized.

    Raises KeyboardInterrupt if one comes while the run is still being loaded.
    """
    import uvicorn

    from mnist_flax.inference import classifier
    from mnist_flax.runtime import devices
    from mnist_flax.serving import app, http_limits

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    devices.keep_compiled_programs()
    reader = classifier.load_reader(model_flags.load(directory), threshold.FLAG.value)
    limits = app.Limits(round(_MAX_MEGABYTES.value * 1e6), round(_MAX_MEGAPIXELS.value * 1e6))
    server = uvicorn.Server(
        uvicorn.Config(
            app.make_app(reader, limits, names(host, allowed)),
            http=http_limits.Protocol,
            ws="none",
            log_level=std_logging.ERROR,  # who sends nonsense is told so, and fills no log
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SECONDS_TO_FINISH,
        )
    )
    # The server stops by itself at these, and then raises them again, which is not to end the process by force.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: None)
    print(f"serving {directory} at http://{in_url(host)}:{listener.getsockname()[1]} (Ctrl-C stops)", flush=True)
    server.run(sockets=[listener])


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m mnist_flax.serve RUN")
    require_packages()
    host, allowed = normalize(_HOST.value), check_names(_ALLOWED_HOSTS.value)
    with listen(host, _PORT.value) as listener, contextlib.suppress(KeyboardInterrupt):
        serve(listener, host, allowed, argv[1])
    print("stopped", flush=True)


if __name__ == "__main__":
    cli.run(main)
