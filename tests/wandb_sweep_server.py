"""A server that answers as W&B's where sweeps are made, agents ask for work, and runs are sent; it keeps all of it."""

import contextlib
import json
import re
from types import SimpleNamespace
from urllib.parse import unquote

import yaml
from wandb_server import USER, answering, operation_of

SWEEP = "sweep123"
STREAM = re.compile(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream")
UPLOAD = re.compile(r"/upload/([^/]+)/(.+)")


class SweepServer:
    """One sweep, the runs of its agents, and runs that are uploaded later.

    Attributes:
        points: The parameters that agents get to try, in order; after the last one they are told to exit.
        stop_after: Validations after which a run is told to stop, as early termination does; ``None`` for never.
        sweep: What ``wandb sweep`` has sent, its configuration parsed.
        commands: What agents were told, in order.
        runs: Run id to its ``config``, ``sweep``, ``groupName``, ``history``, ``exitcode`` and names of ``files``.
        unknown: What this server could not answer; a test looks that there was nothing.
    """

    def __init__(self, points=()):
        self.points, self.stop_after = list(points), None
        self.address, self.sweep = None, None
        self.commands, self.runs, self.unknown = [], {}, []

    def answer(self, method, path, body):
        """Status and content of the answer to one request."""
        if method == "POST" and path == "/graphql":
            request = json.loads(body)
            operation = getattr(self, "on_" + operation_of(request["query"]), None)
            if operation is not None:
                return 200, {"data": operation(SimpleNamespace(**request.get("variables") or {}))}
        elif method == "POST" and (found := STREAM.fullmatch(path)):
            self._receive(self.runs[found[3]], json.loads(body))
            return 200, {}
        elif method == "PUT" and (found := UPLOAD.fullmatch(path)):
            self.runs[found[1]].files.append(unquote(found[2]))
            return 200, {}
        elif path.startswith("/sdk/otel/"):  # W&B's client about itself
            return 200, {}
        self.unknown.append((method, path, body[:500]))
        return 400, {"errors": [{"message": "the server of the tests does not know this"}]}

    # ------------------------------------------------------------------ what `wandb sweep` and all clients ask

    def on_Viewer(self, given):
        return {"viewer": USER}

    def on_ServerFeaturesQuery(self, given):
        return {"serverInfo": {"features": []}}

    def on_ProbeServerCapabilities(self, given):  # this and the next four: older clients
        return {name: {"fields": []} for name in ("QueryType", "MutationType", "ServerInfoType")}

    def on_ProbeServerSettings(self, given):
        return {"ServerSettingsType": {"fields": []}}

    def on_ServerInfo(self, given):
        return {"serverInfo": None}

    def on_RunStoppedStatus(self, given):
        return {"project": {"run": {"stopped": False}}}

    def on_RunUploadUrls(self, given):
        edges = [{"node": {"name": name, "url": self._url(given.run, name)}} for name in given.files]
        return {"model": {"bucket": {"id": given.run, "files": {"uploadHeaders": [], "edges": edges}}}}

    def on_OrganizationCoreWeaveOrganizationID(self, given):
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def on_UpsertSweep(self, given):
        given.config = yaml.safe_load(given.config)
        self.sweep = given
        sweep = {"name": SWEEP, "project": self._project(given.projectName)}
        return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}

    # ------------------------------------------------------------------ what `wandb agent` asks

    def on_SweepWithRuns(self, given):
        sweep = {"id": "s", "name": SWEEP, "config": yaml.safe_dump(self.sweep.config), "runs": {"edges": []}}
        return {"project": {"sweep": sweep if given.sweep == SWEEP else None}}

    def on_CreateAgent(self, given):
        return {"createAgent": {"agent": {"id": "agent"}}}

    def on_Heartbeat(self, given):
        told = self._work(json.loads(given.runState))
        self.commands += told
        return {"agentHeartbeat": {"agent": {"id": given.id}, "commands": json.dumps(told)}}

    def _work(self, running):
        """The next point for an agent that has nothing to do; a request to stop for a run that is to end early."""
        if not running:
            number = sum(command["type"] == "run" for command in self.commands)
            if number == len(self.points):
                return [{"type": "exit"}]
            args = {name: {"value": value} for name, value in self.points[number].items()}
            return [{"type": "run", "run_id": f"run{number}", "program": self.sweep.config["program"], "args": args}]
        behind = [id for id in running if self.stop_after and self._validations(id) >= self.stop_after]
        return [{"type": "stop", "run_id": id} for id in behind]

    def _validations(self, id):
        metric = self.sweep.config["metric"]["name"]
        return sum(metric in row for row in self.runs[id].history) if id in self.runs else 0

    # ------------------------------------------------------------------ what a run sends

    def on_RunResumeStatus(self, given):
        return {"model": None}

    def on_UpsertBucket(self, given):
        id = given.name
        new = SimpleNamespace(history=[], files=[], config={}, exitcode=None, sweep=None, groupName=None)
        run = self.runs.setdefault(id, new)
        for name in ("project", "entity", "sweep", "groupName"):
            if getattr(given, name) is not None:  # nothing changes by null
                setattr(run, name, getattr(given, name))
        if given.config:
            run.config = {name: entry["value"] for name, entry in json.loads(given.config).items()}
        bucket = {"id": f"bucket-{id}", "name": id, "displayName": id, "description": "", "config": given.config}
        bucket |= {"sweepName": run.sweep, "project": self._project(run.project), "historyLineCount": 0}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def on_CreateRunFiles(self, given):
        files = [{"name": name, "uploadUrl": self._url(given.run, name)} for name in given.files]
        return {"createRunFiles": {"runID": given.run, "uploadHeaders": [], "files": files}}

    def _receive(self, run, sent):
        run.history += map(json.loads, (sent.get("files") or {}).get("wandb-history.jsonl", {}).get("content", []))
        if sent.get("complete"):
            run.exitcode = sent["exitcode"]

    def _url(self, run, name):
        return f"{self.address}/upload/{run}/{name}"

    def _project(self, name):
        return {"id": "p", "name": name, "entity": {"id": "e", "name": USER["entity"]}}


@contextlib.contextmanager
def serving_sweeps(points=()):
    """A :class:`SweepServer` while the block runs."""
    server = SweepServer(points)
    with answering(server.answer) as server.address:
        yield server
