import sqlalchemy
from hypothesis import given
from hypothesis import strategies as st

from experiments import storage


@given(st.text(min_size=1), st.sampled_from(["user", "query"]))
def test_what_is_written_down_is_the_address_without_its_password(password, part):
    address = sqlalchemy.URL.create("postgresql", "me", host="host", port=5432, database="db", query={"sslmode": "on"})
    told = address.set(password=password) if part == "user" else address.update_query_dict({"password": password})
    written = storage.public(told.render_as_string(hide_password=False))
    assert sqlalchemy.make_url(written) == address
