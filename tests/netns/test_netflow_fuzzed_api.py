"""schemathesis asks the HTTP interface what its document allows, and what it does not."""

from pathlib import Path

import pytest
import schemathesis
from askersbed import collecting
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers
from schemathesis import GenerationMode
from schemathesis.generation.feedback import NO_FEEDBACK
from schemathesis.specs.openapi import checks

from netflow import metrics
from netflow.serve import app

pytestmark = pytest.mark.netns

TOKEN = "t" * 40
EXAMPLES = 8
CHECKS = (
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
)
QUESTIONS = ("flows", "top", "who", "series", "scans", "spoofed", "coverage")
RIGHTLY, WRONGLY = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
WHICH = [
    *((f"/v1/{name}", mode) for name in (*QUESTIONS, "files") for mode in (RIGHTLY, WRONGLY)),
    ("/v1/status", RIGHTLY),  # these take nothing that could be said wrongly
    ("/metrics", RIGHTLY),
]


@pytest.fixture(autouse=True)
def drawn_alike(monkeypatch):
    """A seed gives the same requests whatever literals the source code has."""
    monkeypatch.setattr(providers, "_get_local_constants", providers.Constants)
    providers.CONSTANTS_CACHE.cache.clear()
    yield
    providers.CONSTANTS_CACHE.cache.clear()


@pytest.fixture(scope="module")
def document():
    with collecting() as flows:
        source = metrics.Source(flows.socket, flows.base, flows.base, flows.base)
        made = app.make(app.Settings(source, TOKEN))
        yield schemathesis.openapi.from_asgi("/openapi.json", made)
        assert flows.process.poll() is None
        assert "Traceback" not in Path(flows.base / "collector.log").read_text()


@pytest.mark.parametrize(("path", "mode"), WHICH, ids=str)
def test_each_answer_and_each_refusal_is_as_the_document_says(document, path, mode):
    operation = document[path]["GET"]

    @seed(1)
    @settings(
        max_examples=EXAMPLES,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        data=st.data(),
        case=operation.as_strategy(generation_mode=mode, feedback=NO_FEEDBACK),
    )
    def ask(data, case):
        if mode == RIGHTLY:
            meant(data, path, case.query)
        answer = case.call_and_validate(
            headers={"Authorization": f"Bearer {TOKEN}"}, checks=list(CHECKS)
        )
        if mode == RIGHTLY:
            assert answer.status_code == 200, answer.text
        elif answer.status_code != 413:  # which schemathesis takes for no refusal
            case.validate_response(answer, checks=[checks.negative_data_rejection])

    ask()


def meant(data, path, query):
    """Put words that mean something where the document only says that there are words."""
    for key in ("since", "until", "last", "at", "skew"):
        query.pop(key, None)
    query |= data.draw(st.sampled_from(PERIODS))
    if query.get("step") is not None and query.get("since") == "@0":
        del query["since"]  # in steps since 1970, which are more than anybody is given
    for key, values in WORDS.items():
        if query.get(key) is not None:
            value = data.draw(st.sampled_from(values))
            query[key] = [value] if isinstance(query[key], list) else value
    if query.get("only"):
        query["inside"] = ["127.0.0.0/8"]
    if query.keys() & {"peer", "own", "peer_port", "own_port"} or path == "/v1/who":
        query["peer"] = "127.0.0.1"


PERIODS = ({}, {"last": "1h"}, {"since": "@0"}, {"at": "1m", "skew": "5m"}, {"until": "now"})
WORDS = {
    "q": [
        "",
        "port 9",
        "slice mine or xid 400",
        "not proto udp",
        "bytes > 1k and initiator ip ::1",
    ],
    "node": ["vm", "nobody", ""],
    "peer": ["127.0.0.1", "::/0"],
    "own": ["127.0.0.0/8"],
    "inside": ["127.0.0.0/8", "2001:db8::/32"],
    "step": ["1m", "1h"],
    "window": ["1s", "10m", "1d"],
}
