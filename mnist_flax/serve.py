"""Serves a trained model: a page to draw on and an API, `python -m mnist_flax.serve RUN [--port=8000]`."""

import mnist_flax.runtime.quiet_start  # noqa: F401  # isort: skip
import contextlib
import signal

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


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise cli.UserError("name one run directory: python -m mnist_flax.serve RUN")
    require_packages()
    from mnist_flax.serving import listen

    host, allowed = listen.canonical_host(_HOST.value), listen.check_names(_ALLOWED_HOSTS.value)
    with listen.listen(host, _PORT.value) as listener, contextlib.suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # while the run is still being loaded
        from mnist_flax.inference import classifier
        from mnist_flax.runtime import devices
        from mnist_flax.serving import app, server

        devices.keep_compiled_programs()
        reader = classifier.load_classifier(model_flags.load(argv[1]), threshold.FLAG.value)
        limits = app.Limits(round(_MAX_MEGABYTES.value * 1e6), round(_MAX_MEGAPIXELS.value * 1e6))
        address = f"http://{listen.in_url(host)}:{listener.getsockname()[1]}"
        ready = f"serving {argv[1]} at {address} (Ctrl-C stops)"
        server.serve(listener, listen.names(host, allowed), reader, limits, ready)
    print("stopped", flush=True)


if __name__ == "__main__":
    cli.run(main)
