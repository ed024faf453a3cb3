import json

import openapi_spec_validator

from mnist_flax.serving import json_api, openapi


def test_the_description_is_valid_and_complete():
    description = openapi.document()
    openapi_spec_validator.validate(description)
    assert set(description["paths"]) == {"/api/predict", "/api/explain", "/api/mistakes", "/api/run", "/healthz"}
    digit = description["paths"]["/api/explain"]["post"]["requestBody"]["content"]["application/json"]
    assert all(json_api.parse_digit(json.dumps(example["value"]).encode()) for example in digit["examples"].values())
    assert all("421" in asked["responses"] for path in description["paths"].values() for asked in path.values())
