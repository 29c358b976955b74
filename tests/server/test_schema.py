"""The OpenAPI description tells the truth: requests drawn from it, right and wrong, get the answers it promises."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from live_server import KEYS, key, save_words, serving, tiny_frozen_lm
from softprompts.server.openapi import openapi

SCHEMA = schemathesis.openapi.from_dict(openapi())


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A server with everything switched on."""
    frozen, folder = tiny_frozen_lm(), tmp_path_factory.mktemp("prompts")
    save_words(frozen, folder / "five", 5)
    with serving(frozen, folder, keys=(key("admin", prompts=("*",), admin=True),), allow_loading=True) as live:
        yield live


@pytest.mark.filterwarnings("ignore")  # of schemathesis and of what it stands on
@SCHEMA.parametrize()
@settings(
    max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck), derandomize=True
)
def test_answers_are_those_of_the_description(case, live):
    # No schema can say what does not fit together (n times inputs, min_tokens), nor that 2.0 is no integer here.
    case.call_and_validate(
        base_url=live.url,
        headers={"Authorization": f"Bearer {KEYS['admin']}"},
        excluded_checks=[positive_data_acceptance],
    )
    assert live.service.thread.alive


def test_every_route_is_described(live):
    described = {
        (path.replace("{name}", "{name:path}"), method.upper())
        for path, item in openapi()["paths"].items()
        for method in item
    }
    routes = {
        (route.path, method)
        for route in live.server.config.app.routes
        for method in route.methods - {"HEAD"}
        if route.path not in ("/", "/static/{name}", "/openapi.json")
    }
    assert routes == described
    with live.client() as client:
        assert client.get("/openapi.json").json() == openapi()
