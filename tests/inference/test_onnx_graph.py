import numpy as np
import pytest

from mnist_flax.inference import formats
from mnist_flax.inference.run import Run
from tests.inference.test_formats import IN_ONNX, needs
from tests.models.test_folded import NETWORKS, ensemble, model_config, network, random_variables


@pytest.mark.parametrize("name", [*NETWORKS, "ensemble"])
def test_onnx_holds_every_kind_of_network(name, tmp_path):
    needs(*IN_ONNX)
    configs, variables = [model_config(NETWORKS.get(name, {}))], None
    if name == "ensemble":
        together, configs, _, variables = ensemble("plain", "norms", "valid_average")
    else:
        together, variables = network(configs[0]), random_variables(configs[0])
    trained = Run(None, configs[0], together, variables, tuple("0123456789"), tuple(configs[1:]))
    formats.export_onnx(trained, np.zeros((0, 28, 28), np.uint8), tmp_path / "model.onnx")
    predict = formats.load_onnx(tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    np.testing.assert_allclose(predict(images), formats.flax_predict(together, variables)(images), atol=1e-5)
    assert predict(images[:0]).shape == (0, 10)
