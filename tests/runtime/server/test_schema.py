"""schemathesis on the OpenAPI description: what fits it, and what nearly does, makes no 500."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode

from dsq.runtime.server.app import build_app
from dsq.tokenizer_port.tokenizer import Tokenizer
from tests.runtime.server.scripted_backend import ScriptedBackend, pool_of
from tests.tiny_gguf import END, token_id


@pytest.mark.parametrize("n", [8, pytest.param(500, marks=pytest.mark.slow)])
def test_no_request_by_the_description_makes_a_500(tokenizer: Tokenizer, n: int) -> None:
    backend = ScriptedBackend(lambda request: [65, token_id(END)])
    app = build_app(pool_of(backend, tokenizer))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    statuses: dict[str, set[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()
        right, wrong = (
            operation.as_strategy(generation_mode=mode)
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        )

        @settings(
            max_examples=n,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=right | wrong)
        def ask(case: schemathesis.Case) -> None:
            response = case.call()
            statuses.setdefault(f"{case.method} {case.path}", set()).add(response.status_code)
            case.validate_response(response, checks=[not_a_server_error])

        ask()
    asked = {"POST /v1/completions", "POST /v1/chat/completions", "POST /infill", "GET /slots"}
    assert asked <= set(statuses)
    assert 400 in statuses["POST /infill"]
    assert 200 in statuses["POST /tokenize"]
    assert backend.n_running == 0
