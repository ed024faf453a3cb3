"""Where a server listens, and which names a request may call it by (against DNS rebinding)."""

import ipaddress
import re
import socket
from collections.abc import Sequence

from mnist_flax.runtime import cli


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
        raise cli.UserError(f"cannot listen at {host}, port {port} ({reason}): choose another port or host") from error
    return listener


def canonical_host(host: str) -> str:
    """A host as browsers send it: in lower case and shortened, an IPv4 address that is inside an IPv6 one taken out."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower()
    return str(getattr(address, "ipv4_mapped", None) or address)


def in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def names(host: str, allowed: Sequence[str]) -> list[str] | None:
    """What a request may call a server at a canonical `host`: its own names, and those that are `allowed`.

    None is anything, for one that is open to other machines and has no name allowed.
    """
    local = ["localhost", "127.0.0.1", "[::1]"]
    try:
        own = [*local, in_url(host)] if ipaddress.ip_address(host).is_loopback else local if allowed else None
    except ValueError:
        own = local if host == "localhost" else [host]
    return None if own is None else [*own, *map(in_url, allowed)]


def check_names(allowed: Sequence[str]) -> list[str]:
    """The names, in their canonical form.

    Raises:
      UserError: one is not the bare name of a host, as browsers send it.
    """
    for name in allowed:
        try:
            ipaddress.ip_address(name)
        except ValueError:
            if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                raise cli.UserError(
                    f"allowed_hosts: {name!r} is not the name of a host: "
                    "give names alone, without scheme and port, international ones as xn--..."
                ) from None
    return [canonical_host(name) for name in allowed]
