"""Dockerfile and Kubernetes manifest name what there is: files, extras, commands, paths, ports."""

from __future__ import annotations

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from starlette.testclient import TestClient

from conftest import build_debug
from fusionsam.cli.options import parse
from fusionsam.cli.serve import Options
from fusionsam.inference.predictor import FusionSAM
from fusionsam.server.app import create_app

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "examples" / "kubernetes" / "fusionsam.yaml"


@pytest.fixture(scope="module")
def parts() -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all(MANIFEST.read_text())}


@pytest.fixture(scope="module")
def container(parts) -> dict:
    (found,) = parts["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.fixture(scope="module")
def steps() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile."""
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip() and not line.startswith("#")]


def served(words: list[str]):
    """The options that `fusionsam serve ...` is started with; the command itself refuses what it does not know."""
    assert words[:2] == ["fusionsam", "serve"]
    return parse(Options, "fusionsam serve", words[2:])


class TestManifest:
    def test_probes_ask_paths_that_answer_without_a_token(self, container):
        with TestClient(create_app(FusionSAM(build_debug(), "debug", {}), token="secret")) as client:
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                assert client.get(container[kind]["httpGet"]["path"]).status_code == 200, kind

    def test_ports_names_and_secrets_agree(self, parts, container):
        (port,) = container["ports"]
        options = served(container["args"])
        assert (options.host, options.port) == ("0.0.0.0", port["containerPort"])
        assert {container[k]["httpGet"]["port"] for k in container if k.endswith("Probe")} == {port["name"]}
        (front,) = parts["Service"]["spec"]["ports"]
        assert front["targetPort"] == port["name"]
        deployment = parts["Deployment"]["spec"]
        labels = deployment["template"]["metadata"]["labels"]
        assert parts["Service"]["spec"]["selector"] == deployment["selector"]["matchLabels"] == labels
        (token,) = (item for item in container["env"] if item["name"] == "FUSIONSAM_TOKEN")
        asked = token["valueFrom"]["secretKeyRef"]
        assert asked["name"] == parts["Secret"]["metadata"]["name"]
        assert asked["key"] in parts["Secret"]["stringData"]

    def test_what_was_accepted_is_finished_before_the_kill(self, parts, container):
        grace = parts["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert grace >= 2 * served(container["args"]).timeout + 10


class TestDockerfile:
    def test_what_is_copied_is_there_and_not_ignored(self, steps):
        rules = [line for line in (ROOT / ".dockerignore").read_text().split() if not line.startswith("#")]
        for words in (rest.split() for kind, rest in steps if kind == "COPY"):
            for name in words[:-1]:
                assert (ROOT / name).exists(), name
                matching = [rule for rule in rules if fnmatch.fnmatch(name, rule.removeprefix("!"))]
                assert matching, name
                assert matching[-1].startswith("!"), name

    def test_what_the_build_needs_is_copied_before_the_install(self, steps):
        install = next(i for i, (kind, rest) in enumerate(steps) if kind == "RUN" and '".[' in rest)
        copied = {name for kind, rest in steps[:install] if kind == "COPY" for name in rest.split()[:-1]}
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert {"pyproject.toml", "src", project["readme"], *project["license-files"]} <= copied
        extras = re.search(r'"\.\[([a-z,]+)\]"', steps[install][1])[1].split(",")
        assert set(extras) <= set(project["optional-dependencies"])

    def test_it_starts_a_server_whose_health_is_asked_at_its_port(self, steps):
        kinds = dict(steps)
        options = served(yaml.safe_load(kinds["CMD"]))
        assert (options.host, str(options.port)) == ("0.0.0.0", kinds["EXPOSE"])
        assert options.weights == "tiny"
        health = yaml.safe_load(kinds["HEALTHCHECK"].partition("CMD ")[2])
        path = re.search(rf"http://127\.0\.0\.1:{options.port}(/\w+)", health[2])[1]
        with TestClient(create_app(FusionSAM(build_debug(), "debug", {}), token="secret")) as client:
            assert client.get(path).status_code == 200
        compile(health[2], "HEALTHCHECK", "exec")
        assert kinds["USER"] in shlex.split(kinds["RUN"])  # the last RUN makes it
