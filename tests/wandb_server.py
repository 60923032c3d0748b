"""Local servers that answer as W&B's, for W&B's own clients: HTTP, and one that knows a run and keeps reports."""

import contextlib
import gzip
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

RUN = {
    **dict.fromkeys(("sweepName", "group", "jobType", "commit")),
    **{"id": "r", "name": "abc123", "displayName": "comparison", "state": "finished", "projectId": "1"},
    **{"config": "{}", "systemMetrics": "{}", "summaryMetrics": "{}", "description": "", "notes": ""},
    **{"tags": [], "readOnly": False, "historyLineCount": 1, "historyKeys": {}, "user": {"name": "m", "username": "m"}},
    **dict.fromkeys(("createdAt", "heartbeatAt"), "2026-01-01T00:00:00"),
}
PROJECT = {
    **{"id": "p", "internalId": "1", "name": "project", "entityName": "me", "createdAt": "2026-01-01T00:00:00"},
    **{"isBenchmark": False, "user": None},
}
USER = {"id": "u", "entity": "me", "username": "me", "email": "", "flags": "{}", "teams": {"edges": []}}


def operation_of(query):
    """The name of a GraphQL operation."""
    return re.search(r"(?:query|mutation)\s+(\w+)", query)[1]


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that has ended
            super().handle_error(request, client_address)


@contextlib.contextmanager
def answering(answer):
    """Serve ``answer(method, path, body) -> (status, object for JSON)`` on a free port; yields the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # wandb-core keeps connections

        def _answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            status, content = answer(self.command, self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *args):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _answer(query, variables, reports):
    operation = operation_of(query)
    if operation in ("Viewer", "GetDefaultEntity"):
        return {"viewer": USER}
    if operation == "Run":
        known = (variables["entity"], variables["project"], variables["name"]) == ("me", "project", "abc123")
        return {"project": {"run": RUN if known else None}}
    if operation == "ProjectInternalId":
        return {"project": PROJECT}
    if operation == "upsertView":
        view = {"id": "report1", "description": "", "updatedAt": "2026-01-01T00:00:00Z", "project": PROJECT}
        reports.append(variables)
        view |= {key: variables[key] for key in ("type", "name", "displayName", "spec")}
        return {"upsertView": {"view": view, "inserted": True}}
    if "models(" in query:
        page = {"endCursor": "", "hasNextPage": False}
        return {"models": {"edges": [{"node": PROJECT, "cursor": ""}], "pageInfo": page}}
    raise AssertionError(f"an operation that the tests do not know: {query}")


@contextlib.contextmanager
def serving():
    """Address of the server, and the list of the reports that it gets."""
    reports = []

    def answer(method, path, body):
        request = json.loads(body) if path == "/graphql" else None
        return 200, {"data": _answer(request["query"], request.get("variables"), reports) if request else {}}

    with answering(answer) as address:
        yield address, reports
