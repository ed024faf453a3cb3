import contextlib
import http.client
import json

import pytest

from mnist_flax.serving import listen
from tests.server import running
from tests.serving.test_app import SEVEN


@pytest.mark.parametrize(
    ("host", "reached"), [("127.0.0.2", "127.0.0.2"), ("::FFFF:127.0.0.1", "127.0.0.1"), ("LOCALHOST", "localhost")]
)
def test_it_answers_to_the_address_that_it_prints_and_to_no_stranger(host, reached, digits_run):
    with running(digits_run, f"--host={host}") as server:
        for name, status in ((reached, 200), ("localhost", 200), ("127.0.0.1", 200), ("evil.example", 421)):
            connection = http.client.HTTPConnection(reached, server.port, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", "/healthz", headers={"Host": f"{name}:{server.port}"})
                assert connection.getresponse().status == status, name


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_behind_a_proxy_it_answers_to_the_names_that_are_allowed_and_to_no_other(host, digits_run):
    with running(digits_run, f"--host={host}", "--allowed_hosts=Digits.example,2001:DB8::1,b") as server:
        for name, status in (
            *(("digits.example", 200), ("digits.example:443", 200), ("[2001:db8::1]", 200), ("b", 200)),
            *(("127.0.0.1", 200), ("localhost", 200)),
            *(("evil.example", 421), ("digits.example.evil", 421), ("www.digits.example", 421), ("example", 421)),
            *(("192.0.2.1", 421), ("digits.example,evil", 421), ("", 421)),
        ):
            assert server.ask("GET", "/healthz", Host=name).status == status, name
        page = {"Host": "digits.example", "Origin": "https://digits.example"}
        digit = json.dumps(SEVEN).encode()
        assert server.ask("POST", "/api/predict", digit, "application/json", **page).status == 200
        page["Origin"] = "https://evil.example"
        assert server.ask("POST", "/api/predict", digit, "application/json", **page).status == 403


def test_a_server_that_is_open_without_names_answers_to_all_and_with_names_to_those():
    assert listen.names("0.0.0.0", []) is None and listen.names("192.0.2.1", []) is None
    assert "evil.example" not in listen.names("192.0.2.1", ["a.example"])
    assert listen.names("my.host", ["a.example"]) == ["my.host", "a.example"]
