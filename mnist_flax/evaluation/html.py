"""Reports as HTML, from Jinja templates, which escape whatever they show."""

from __future__ import annotations  # Jinja's types without its import

import base64
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).parent / "templates"


def render(template: Path, **values: Any) -> str:
    """The page that a template makes of values; it may use the templates in `TEMPLATES`."""
    return _environment(template.parent).get_template(template.name).render(values)


@cache
def _environment(directory: Path) -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([directory, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment
