"""Pages from templates: what is shown is escaped, and nothing is left out in silence."""

import base64

import jinja2
import pytest

from mnist_flax.evaluation import html


def render(tmp_path, template: str, **values) -> str:
    (tmp_path / "page.jinja").write_text(template)
    return html.render(tmp_path / "page.jinja", **values)


def test_values_are_escaped(tmp_path):
    found = render(tmp_path, '<b title="{{ text }}">{{ text }}</b>', text="<script>\"'&")
    escaped = "&lt;script&gt;&#34;&#39;&amp;"
    assert found == f'<b title="{escaped}">{escaped}</b>'


def test_a_missing_value_is_an_error(tmp_path):
    with pytest.raises(jinja2.UndefinedError, match="'absent' is undefined"):
        render(tmp_path, "{{ absent }}")


def test_files_are_shown_as_base64(tmp_path):
    content = bytes(range(256))
    assert base64.b64decode(render(tmp_path, "{{ content | base64 }}", content=content)) == content


def test_a_template_finds_its_own_directory_first_and_then_the_packages(tmp_path):
    (tmp_path / "part.jinja").write_text("mine")
    assert render(tmp_path, "{% include 'part.jinja' %}") == "mine"
    blocks = "{% block subject %}mine{% endblock %}{% block tables %}{% endblock %}"
    values = {"name": "run", "heading": "all right", "tiles": [], "pictures": {}}
    found = render(tmp_path, "{% extends 'base.html.jinja' %}" + blocks, **values)
    assert found.startswith("<!DOCTYPE html>") and "<h1>all right</h1><p>mine</p>" in found
