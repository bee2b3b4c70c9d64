"""Checkpoints on the Hugging Face hub: its format in a folder, and its API at a stand-in endpoint on loopback."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from fusionsam.errors import InputError
from fusionsam.evaluation.calibrate import store
from fusionsam.inference.predictor import FusionSAM
from fusionsam.weights import hub
from fusionsam.weights.checkpoint import WEIGHTS, calibrated_digest, locate, read_card, save_checkpoint
from fusionsam.weights.publish import write_repository

CARD = {"commit": "abc", "seed": 3, "command": "fusionsam train --data.root /secret/place/mfnet --seed 3"}
VAL = {"miou": 41.25, "protocol": "present", "split": "mfnet/val"}
PUSH = """
import sys
from fusionsam import FusionSAM
print(FusionSAM.from_pretrained(sys.argv[1]).push_to_hub(sys.argv[2], token="hf_test", reports=sys.argv[3:]))
"""


@pytest.fixture
def checkpoint(debug, tmp_path):
    return save_checkpoint(tmp_path / "mine", debug, {**CARD, "val": VAL})


def report(folder: Path, of: Path, **change: object) -> Path:
    sha = hashlib.sha256((of / WEIGHTS).read_bytes()).hexdigest()
    found = {
        "dataset": "mfnet", "split": "test", "protocol": "present", "weights_sha256": sha, "miou": 37.128,
        "by_time": {"day": {"miou": 40.0}, "night": {"miou": None}}, **change,
    }  # fmt: skip
    path = folder / "report.json"
    path.write_text(json.dumps(found))
    return path


class TestFolder:
    def test_predicts_as_the_checkpoint_stored_in_halves(self, checkpoint, tmp_path, pair):
        model = FusionSAM.from_pretrained(checkpoint)
        folder = model.save_pretrained(tmp_path / "hub", "me/model")
        assert {path.name for path in folder.iterdir()} == {WEIGHTS, "config.json", "training.json", "README.md"}
        assert json.loads((folder / "config.json").read_text())["preset"] == "debug"
        again = FusionSAM.from_pretrained(folder)
        images = (pair[0][0], pair[1][0])
        first, second = model.predict(*images), again.predict(*images)
        np.testing.assert_allclose(first.fused.astype(int), second.fused.astype(int), atol=2)
        assert np.mean(first.labels == second.labels) > 0.98
        # a second turn rounds nothing more
        third = FusionSAM.from_pretrained(again.save_pretrained(tmp_path / "again", "me/model"))
        assert np.array_equal(second.labels, third.predict(*images).labels)

    def test_calibration_is_not_applied_twice(self, debug, tmp_path, pair):
        offsets = dict.fromkeys(debug.config.classes, 0.0) | {debug.config.classes[1]: 2.0}
        source = save_checkpoint(tmp_path / "mine", debug, {"class_offsets": {"offsets": offsets}})
        model = FusionSAM.from_pretrained(source)
        again = FusionSAM.from_pretrained(model.save_pretrained(tmp_path / "hub"))
        before, after = (m.infer(pair[0], pair[1]).logits for m in (model, again))
        torch.testing.assert_close(before, after, atol=0.1, rtol=0.01)
        plain = FusionSAM.from_pretrained(tmp_path / "hub", calibrated=False).infer(pair[0], pair[1]).logits
        torch.testing.assert_close((after - plain)[:, 1].mean(), torch.tensor(2.0), atol=1e-3, rtol=0)

    def test_card_holds_the_figures_of_reports_or_those_of_training(self, checkpoint, tmp_path):
        write_repository(checkpoint, tmp_path / "a", "me/model")
        card = ModelCard.load(tmp_path / "a" / "README.md")
        (figure,) = card.data.eval_results
        assert (figure.metric_value, figure.dataset_name, figure.dataset_split) == (41.25, "mfnet", "val")
        assert 'from_pretrained("me/model")' in card.text
        assert "/secret" not in card.text + (tmp_path / "a" / "training.json").read_text()
        write_repository(checkpoint, tmp_path / "b", "me/model", [report(tmp_path, checkpoint)])
        figures = ModelCard.load(tmp_path / "b" / "README.md").data.eval_results
        assert [(f.metric_name, f.metric_value, f.dataset_split) for f in figures] == [
            ("mIoU, percent (present)", 37.13, "test"), ("mIoU, day, percent (present)", 40.0, "test"),
        ]  # fmt: skip

    def test_figures_tell_how_they_were_made(self, checkpoint, tmp_path):
        odd = {"modality": "visible", "flip": True, "scales": [0.75, 1.0], "fitted": {"class_offsets": 3}}
        odd |= {"prompts": "none", "align": {"rig": "ab", "refine": False}}
        write_repository(checkpoint, tmp_path / "a", "me/model", [report(tmp_path, checkpoint, **odd)])
        figure, _ = ModelCard.load(tmp_path / "a" / "README.md").data.eval_results
        how = "visible only, flip, scales 0.75 1, aligned without refinement, prompts none"
        assert figure.metric_name == f"mIoU, {how}, class offsets fitted on these pairs, percent (present)"

    @pytest.mark.parametrize(
        ("fault", "told"),
        [
            ({"prompts": "oracle"}, "its prompts were drawn from the ground truth"),
            ({"prompts": "named"}, "its prompts were drawn from the ground truth"),
            ({"leak_guard": {"leaks": 4}}, "it scores 4 pictures that were trained on"),
            ({"leak_guard": {"leaks": 0, "off": True}}, "no training list was compared with its pictures"),
        ],
    )
    def test_figures_that_are_not_honest_are_refused(self, checkpoint, tmp_path, fault, told):
        with pytest.raises(InputError, match=rf"report\.json: {told}, .*; give another report"):
            write_repository(checkpoint, tmp_path / "a", "me/m", [report(tmp_path, checkpoint, **fault)])
        assert not list((tmp_path / "a").iterdir())

    def test_figures_are_of_what_calibrate_stored(self, checkpoint, tmp_path):
        own = calibrated_digest(read_card(checkpoint)[1])
        write_repository(checkpoint, tmp_path / "a", "me/m", [report(tmp_path, checkpoint, calibrated=own)])
        store(checkpoint, calibration={"temperature": 1.5})
        with pytest.raises(
            InputError, match=r"report\.json: is of other offsets and temperature than calibrate stored"
        ):
            write_repository(checkpoint, tmp_path / "b", "me/m", [report(tmp_path, checkpoint, calibrated=own)])
        plain = report(tmp_path, checkpoint, calibrated=own, as_trained=True)
        write_repository(checkpoint, tmp_path / "c", "me/m", [plain])

    def test_without_a_report_the_figure_is_that_of_training(self, debug, tmp_path):
        card = {"val": {"val/miou": 12.5}, "config": {"data": {"dataset": "mfnet", "val_split": "val26"}}}
        source = save_checkpoint(tmp_path / "mine", debug, card)  # as train writes it
        write_repository(source, tmp_path / "a", "me/m")
        (figure,) = ModelCard.load(tmp_path / "a" / "README.md").data.eval_results
        assert (figure.metric_value, figure.dataset_name, figure.dataset_split) == (12.5, "mfnet", "val26")

    def test_a_page_of_ones_own_stays_and_loses_its_old_metadata(self, checkpoint, tmp_path):
        (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n---\nend\n")
        text = (
            write_repository(checkpoint, tmp_path / "hub", "me/m", license="bsd-3-clause") / "README.md"
        ).read_text()
        _, head, body = text.split("---\n", 2)
        assert yaml.safe_load(head)["license"] == "bsd-3-clause"
        assert body == "\n# Mine\n---\nend\n"

    def test_refusals_are_one_line(self, checkpoint, tmp_path, debug):
        with pytest.raises(InputError, match="is of other weights"):
            write_repository(checkpoint, tmp_path / "a", "me/m", [report(tmp_path, checkpoint, weights_sha256="0")])
        (tmp_path / "list.json").write_text("[1]")
        with pytest.raises(InputError, match=r"is no report\.json"):
            write_repository(checkpoint, tmp_path / "b", "me/m", [tmp_path / "list.json"])
        with pytest.raises(InputError, match=r"holds config\.yaml already"):
            write_repository(checkpoint, checkpoint, "me/m")
        with pytest.raises(InputError, match="came from no checkpoint"):
            FusionSAM(debug, "memory", {}).push_to_hub("me/m")
        with pytest.raises(InputError, match="expected owner/name"):
            FusionSAM.from_pretrained(checkpoint).push_to_hub("me/m/n")
        with pytest.raises(InputError, match="revision v1: is for owner/name"):
            FusionSAM.from_pretrained(checkpoint, revision="v1")


def test_names_of_repositories_and_paths_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert [n for n in ("a/b", "runs/b", "hf://runs/b", "./b", "/a/b", "a/b/c", "a", "a/..", "a/b@v1.2") if
            hub.is_repository(n)] == ["a/b", "hf://runs/b", "a/b@v1.2"]  # fmt: skip
    assert hub.split_name("hf://a/b@x/y") == ("a/b", "x/y")
    with pytest.raises(InputError, match="weights runs/b: no such folder; give"):
        locate("runs/b")


class Endpoint(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload and a download need: repositories of one commit each, in memory."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.headers.get("authorization") != "Bearer hf_test":
            return self.answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.repositories.setdefault(f"{asked['organization']}/{asked['name']}", {})
            return self.answer({"url": f"{self.base}/{asked['organization']}/{asked['name']}"})
        if self.path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        repository, action = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(\w+)/main", self.path).groups()
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self.answer({"commitUrl": f"{self.base}/{repository}/commit/{SHA}", "commitOid": SHA, "success": True})

    def do_GET(self) -> None:
        listing = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/?]+))?(?:\?.*)?", self.path)
        if listing:
            if listing[1] not in self.repositories:
                return self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if listing[3] not in (None, "main", SHA):
                return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = self.repositories[listing[1]]
            if listing[2] == "tree":
                return self.answer(
                    [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]
                )
            return self.answer({"id": listing[1], "sha": SHA, "siblings": [{"rfilename": name} for name in files]})
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path)
        content = file and self.repositories[file[1]].get(file[2])
        if content is None:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        return self.answer(content, 200, {"X-Repo-Commit": SHA, "ETag": f'"{etag(content)}"'})

    do_HEAD = do_GET

    def answer(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(raw)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


SHA = "1" * 40


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class TestEndpoint:
    @pytest.fixture
    def endpoint(self):
        server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
        Endpoint.base, Endpoint.repositories = f"http://127.0.0.1:{server.server_port}", {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Endpoint
        server.shutdown()
        server.server_close()

    @pytest.fixture
    def run(self, endpoint, tmp_path):
        """Python with its words, in an environment whose hub is the endpoint."""

        def call(*words: object, token: str = "hf_test") -> subprocess.CompletedProcess[str]:
            own = {
                "HF_ENDPOINT": endpoint.base,
                "HF_HOME": str(tmp_path / "home"),
                "HF_TOKEN": token,
                "HF_HUB_OFFLINE": "0",
            }
            own |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
            return subprocess.run(
                [sys.executable, *map(str, words)],
                env={**os.environ, **own},
                cwd=tmp_path,
                capture_output=True,
                text=True,
            )

        return call

    def test_what_was_pushed_is_loaded_by_its_name(self, endpoint, run, checkpoint, tmp_path, pair):
        done = run("-c", PUSH, checkpoint, "me/model", report(tmp_path, checkpoint))
        assert (done.returncode, done.stdout.strip()) == (0, f"{endpoint.base}/me/model"), done.stderr
        held = endpoint.repositories["me/model"]
        assert {WEIGHTS, "config.json", "training.json", "README.md"} == set(held)
        assert b"value: 37.13" in held["README.md"]
        torch.save(pair, tmp_path / "pair.pt")
        code = (
            "import sys, torch, numpy; from fusionsam import FusionSAM; v, i = torch.load('pair.pt')\n"
            "numpy.save('got.npy', FusionSAM.from_pretrained('me/model', revision='main').predict(v[0], i[0]).labels)"
        )
        done = run("-c", code)
        assert done.returncode == 0, done.stderr
        local = FusionSAM.from_pretrained(FusionSAM.from_pretrained(checkpoint).save_pretrained(tmp_path / "local"))
        assert np.array_equal(np.load(tmp_path / "got.npy"), local.predict(pair[0][0], pair[1][0]).labels)

    def test_the_commands_take_names_and_say_what_is_wrong_with_them(self, endpoint, run, checkpoint):
        held = endpoint.repositories["me/model"] = {}
        for path in FusionSAM.from_pretrained(checkpoint).save_pretrained(checkpoint / "hub").iterdir():
            held[path.name] = path.read_bytes()
        endpoint.repositories["me/other"] = {"README.md": b"# not ours"}
        command = ("-m", "fusionsam", "info", "--weights")
        done = run(*command, "me/model")
        assert done.returncode == 0, done.stderr
        assert "weights me/model" in done.stdout
        for name, sentence in (
            ("me/absent", "no such repository on"),
            ("me/model@v9", "me/model has no revision v9"),
            ("me/other", "a repository without model.safetensors and config.json"),
        ):
            done = run(*command, name)
            assert (done.returncode, done.stdout) == (2, "")
            assert sentence in done.stderr.splitlines()[-1]

    def test_a_refused_upload_is_one_line(self, run, checkpoint):
        code = PUSH.replace('token="hf_test"', 'token="hf_wrong"')
        done = run("-c", code, checkpoint, "me/model")
        assert "InputError: repository me/model: the hub answered:" in done.stderr.splitlines()[-1]
        assert "401" in done.stderr.splitlines()[-1]
