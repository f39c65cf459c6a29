"""Manifests of the documentation: their settings and mounts, and both ends on a real Redis."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from docblocks import ROOT, blocks_of, files_of
from precast.cache.chain import parse_chain
from precast.config import CompilationConfig, resolve_config
from servers import RedisServer
from system.conftest import CALM

HOW_TO = ROOT / "docs" / "how-to"
PAGE = HOW_TO / "kubernetes.md"
FILES = files_of(blocks_of(PAGE))
OBJECTS = [one for text in FILES.values() for one in yaml.safe_load_all(text)]
#: A call as the server makes it, and what became of it.
SERVE = """
import torch, precast
from model import example, make_model
model = precast.compile(make_model())
with torch.inference_mode():
    model(example())
    precast.wait(model)
    model(example())
[assembly] = precast.status(model)["assemblies"]
print([(piece["compiler"], piece["from"]) for piece in assembly["pieces"]])
"""


def pods() -> list[dict[str, Any]]:
    return [one["spec"]["template"]["spec"] for one in OBJECTS if "template" in one["spec"]]


def settings_of(pod: dict[str, Any]) -> dict[str, str]:
    [container] = pod["containers"]
    return {row["name"]: row["value"] for row in container.get("env", ())}


def pod_named(name: str) -> dict[str, Any]:
    [pod] = [pod for pod in pods() if pod["containers"][0]["name"] == name]
    return pod


def test_every_variable_is_a_setting_with_a_value_that_is_accepted() -> None:
    given = [settings_of(pod) for pod in pods()]
    names = {f"PRECAST_{name.upper()}" for name in CompilationConfig.settings}
    assert set().union(*given) <= names
    for environ in filter(None, given):
        resolved = resolve_config(None, {}, environ=environ, pyproject=None, user_file=None)
        read = [o for o in resolved.origins.values() if o.startswith("environment")]
        assert len(read) == len(environ)
        chain = parse_chain(str(resolved.config.cache_url))
        assert [entry.scheme for entry in chain] == ["disk", "redis"]


def test_what_is_mounted_is_there() -> None:
    """
    Each mount has its volume, each secret and config map is made by a command of the page, and
    paths in settings lie in a mount.
    """
    made = dict(re.findall(r"create (configmap|secret generic) (\S+)", PAGE.read_text()))
    for pod in pods():
        [container] = pod["containers"]
        volumes = {volume["name"]: volume for volume in pod.get("volumes", ())}
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", ())}
        assert set(mounts) == set(volumes)
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["secretName"] == made["secret generic"]
            if "configMap" in volume:
                assert volume["configMap"]["name"] == made["configmap"]
        for value in settings_of(pod).values():
            if value.startswith("/"):
                assert any(value.startswith(f"{path}/") for path in mounts.values()), value


def test_services_and_probes_lead_somewhere() -> None:
    labels = [
        o["spec"]["template"]["metadata"]["labels"]
        for o in OBJECTS
        if "selector" in o["spec"] and "template" in o["spec"]
    ]
    for service in (o for o in OBJECTS if o["kind"] == "Service"):
        assert service["spec"]["selector"] in labels
        assert (
            f"//{service['metadata']['name']}/"
            in settings_of(pod_named("warm"))["PRECAST_CACHE_URL"]
        )
    [server] = pod_named("server")["containers"]
    program = files_of(blocks_of(HOW_TO / "fastapi.md"))["serve.py"]
    assert f'"{server["readinessProbe"]["httpGet"]["path"]}"' in program
    assert str(server["readinessProbe"]["httpGet"]["port"]) in server["command"]
    [warm] = pod_named("warm")["containers"]
    assert warm["command"][-1] in files_of(blocks_of(HOW_TO / "container-image.md"))


@pytest.mark.compile
def test_a_server_loads_what_the_job_compiled(redis_server: RedisServer, tmp_path: Path) -> None:
    """
    With the settings of the manifests, in volumes that everybody may write, as Kubernetes makes
    them. The server has no compiler.
    """
    for name, text in files_of(blocks_of(HOW_TO / "container-image.md")).items():
        (tmp_path / name).write_text(text)
    (tmp_path / "server.py").write_text(SERVE)
    keys = tmp_path / "keys"
    keys.mkdir()

    def run(*command: str, pod: str = "", **more: str) -> str:
        volume = tmp_path / f"volume-{pod}"
        volume.mkdir(exist_ok=True)
        volume.chmod(0o2777)
        settings = {
            name: value.replace("/cache/", f"{volume}/")
            .replace("/run/signing", str(keys))
            .replace("/etc/precast", str(keys))
            .replace("//precast-redis/0", f"//127.0.0.1:{redis_server.port}/0")
            + ("&prefix=pods" if "?" in value else "?prefix=pods" if "redis" in value else "")
            for name, value in (settings_of(pod_named(pod)) if pod else {}).items()
        }
        done = subprocess.run(
            [sys.executable, *command],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT / "src"),
                **CALM,
                **settings,
                **more,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    run("-m", "precast", "keys", "generate", str(keys / "signing.pem"))
    run("build.py", pod="warm")
    said = run("server.py", pod="server", CXX="/nonexistent")
    assert said == "[('aot_inductor', 'cache')]\n"
