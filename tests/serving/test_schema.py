import json

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from mnist_flax.runtime.cli import UserError
from mnist_flax.serving import json_api, openapi

odd = st.lists(st.sampled_from([0, 1, 1.01, -0.01, True, None, "0", []]), max_size=3)
points = st.lists(st.floats(0, 1), min_size=2, max_size=2)
parts = {
    "strokes": st.lists(st.lists(points, max_size=4) | st.lists(points | odd), max_size=3),
    "pixels": st.sampled_from([0, 255, 256, -1, 0.5, "0"]).map(lambda level: [[0] * 28] * 27 + [[level] * 28]),
    "about": st.sampled_from([None, 0, 9, -1, 10, 0.5, True, "1"]),
    "x": st.none(),
}
one = [st.fixed_dictionaries({form: parts[form]}, optional={"about": parts["about"]}) for form in ("strokes", "pixels")]
sent = st.one_of(*one, st.fixed_dictionaries({}, optional=parts))


@settings(max_examples=300, deadline=None)
@given(sent)
def test_digits_are_taken_that_the_description_allows_and_no_others(body):
    described = openapi.document()
    digit = described["paths"]["/api/explain"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    allowed = jsonschema.Draft202012Validator(described | digit).is_valid(body)
    try:
        json_api.parse_digit(json.dumps(body).encode())
        assert allowed
    except UserError as error:
        assert not allowed, error
