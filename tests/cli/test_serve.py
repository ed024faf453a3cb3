import socket

import pytest

from tests.commands import refusal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--allowed_hosts=https://a.example"], "'https://a.example' is not the name of a host"),
        (["{run}", "--allowed_hosts=a.example:443"], "'a.example:443' is not the name of a host"),
        (["{run}", "--allowed_hosts=*"], "'*' is not the name of a host"),
        (["{run}", "--allowed_hosts=a,,b"], "'' is not the name of a host"),
        (["{run}", "--allowed_hosts="], "--allowed_hosts= names nothing"),
        ([], "name one run directory"),
        (["{nowhere}"], "is no run directory"),
        (["{run}", "--port=70000"], "port"),
        (["{run}", "--port={taken}"], "cannot listen at 127.0.0.1, port"),
        (["{run}", "--host=192.0.2.1"], "cannot listen at 192.0.2.1"),
        (["{run}", "--host=no.such.host.invalid"], "cannot listen at no.such.host.invalid"),
        (["{run}", "--host=a..b"], "cannot listen at a..b"),
        (["{run}", "--max_megabytes=0"], "max_megabytes"),
        (["{run}", "--pot=1"], "pot"),
    ],
)
def test_wrong_inputs_get_one_line(arguments, message, digits_run, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        places = {"run": digits_run, "nowhere": tmp_path / "nowhere", "taken": other.getsockname()[1]}
        assert message in refusal("mnist_flax.serve", *(argument.format(**places) for argument in arguments))
