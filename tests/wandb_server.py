"""A W&B server that knows one project with one run, and keeps the reports that it is sent."""

import contextlib
import gzip
import json
import re
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


def _answer(query, variables, reports):
    operation = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
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

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            request = json.loads(body) if self.path == "/graphql" else None
            data = _answer(request["query"], request.get("variables"), reports) if request else {}
            answer = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", reports
    finally:
        server.shutdown()
        server.server_close()
