"""Mutations that know JSON: bytes exchanged at random would hardly ever leave it whole."""

import json
import random
from typing import Any

_ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**400, 0.5, 1e-320, 1e308, -0.0),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "a", "\0", "\ud800", "../../x", "~nobody/x"),
    *("<script>alert(1)</script>", "[/red]", "$\\x$", "x\ny", "x" * 300),
    *([], {}, [[]], [1, 2], ["a"], {"a": 1}, [None], [[[[[[1]]]]]]),
)


def mutate(content: bytes, generator: random.Random) -> bytes:
    """JSON (or lines of it) in which a value was exchanged, removed, doubled or buried deep."""
    lines = content.split(b"\n")
    place = generator.randrange(len(lines))
    try:
        value = json.loads(lines[place])
    except (ValueError, RecursionError):
        return content
    holder: Any = [value]
    nodes: list[tuple[Any, Any]] = [(holder, 0)]
    for container, key in nodes:  # grows while it is walked
        inner = container[key]
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        nodes.extend((inner, k) for k in keys)
    container, key = generator.choice(nodes)
    match generator.randrange(6):
        case 0 if container is not holder:
            del container[key]
        case 1:
            container[key] = [container[key], container[key]]
        case 2 if isinstance(container, dict):
            container[generator.choice(["x", "\n", "<b>", key + "_", ""])] = container[key]
        case 3:
            other, name = generator.choice(nodes)
            container[key] = json.loads(json.dumps(other[name]))
        case _:
            container[key] = generator.choice(_ODD)
    text = json.dumps(holder[0])
    if not generator.randrange(50):
        text = "[" * 100_000 + text
    lines[place] = text.encode()
    return b"\n".join(lines)
