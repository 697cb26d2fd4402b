"""The HTTP interface's document and table, and its token: no server, no collector."""

import json
import typing
from pathlib import Path

import pytest

from netflow import metrics, wire
from netflow.serve import app, listen
from netflow.serve.questions import QUESTIONS

pytestmark = pytest.mark.unit

TOKEN = "t" * 40


@pytest.fixture(scope="module")
def document():
    settings = app.Settings(metrics.Source(*[Path("/none")] * 4))
    return app.make(settings).openapi()


def test_every_question_can_be_asked():
    """Who adds a question adds a line to the table."""
    made = {type(q.asks(**({"peer_port": 1} if q.path == "who" else {})).request())
            for q in QUESTIONS}  # fmt: skip
    assert made == set(typing.get_args(wire.Question))


def test_the_document_says_each_path_its_answer_and_its_errors(document):
    assert set(document["paths"]) == {
        *(f"/v1/{q.path}" for q in QUESTIONS), "/v1/status", "/v1/files", "/metrics"
    }  # fmt: skip
    for path, operations in document["paths"].items():
        assert set(operations) == {"get"}, path
        responses = operations["get"]["responses"]
        assert {"200", "400", "401", "403", "413", "500", "502", "503"} == set(responses), path
        for status, response in responses.items():
            if status != "200":
                assert set(response["content"]) == {"application/problem+json"}


def test_every_reference_in_the_document_leads_somewhere(document):
    def references(node):
        if isinstance(node, dict):
            if "$ref" in node:
                yield node["$ref"]
            for value in node.values():
                yield from references(value)
        elif isinstance(node, list):
            for value in node:
                yield from references(value)

    found = set(references(document))
    assert found
    for reference in found:
        assert reference.rpartition("/")[2] in document["components"]["schemas"], reference
    json.dumps(document)


def test_every_parameter_is_described(document):
    for path, operations in document["paths"].items():
        for parameter in operations["get"].get("parameters", []):
            name = parameter["name"]
            assert name in ("peer_port", "own_port") or "description" in parameter, (path, name)


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (TOKEN, 0o644, "read by others"),
        (TOKEN, 0o640, "read by others"),
        ("short", 0o600, "32 or more"),
        (f"{TOKEN} {TOKEN}", 0o600, "without spaces"),
        ("\u00e9" * 40, 0o600, "32 or more"),
        (None, 0o600, "cannot read the token"),
    ],
)
def test_a_token_that_is_none_is_refused(tmp_path, content, mode, words):
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
        file.chmod(mode)
    with pytest.raises(listen.ServeError, match=words):
        listen.read_token(file)


def test_a_token_is_the_files_line(tmp_path):
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    file.chmod(0o600)
    assert listen.read_token(file) == TOKEN
