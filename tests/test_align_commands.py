"""A rig in every command that takes pairs: two cameras of two sizes go in, and what comes out is what `predict` says of
the aligned pair with its mask."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import build_debug
from fusionsam.alignment.apply import Aligned, Aligner
from fusionsam.alignment.geometry import centre, similarity
from fusionsam.alignment.rig import Rig, read_rig
from fusionsam.alignment.warp import Warp
from fusionsam.cli.main import main
from fusionsam.data.images import read_infrared, read_visible, write_png
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.inference.predictor import FusionSAM

SIZE, OTHER = (120, 160), (102, 134)
PAIRS = 4


@pytest.fixture(scope="module")
def rig() -> Rig:
    """Infrared covers a part of the visible frame."""
    matrix = similarity(0.8, 2.0, centre(SIZE), (centre(OTHER)[0] + 25, centre(OTHER)[1] - 4))
    return Rig(SIZE, OTHER, np.linalg.inv(matrix))


@pytest.fixture(scope="module")
def cameras(tmp_path_factory: pytest.TempPathFactory, rig: Rig) -> Path:
    """visible/, infrared/ of another size, labels/, lists, classes.yaml and rig.json."""
    root, warp = tmp_path_factory.mktemp("cameras"), Warp(rig, "infrared")
    for number in range(PAIRS):
        scene = draw_scene(5, 2 * number, SIZE)
        assert scene.visible is not None
        assert scene.infrared is not None
        assert scene.label is not None
        write_png(root / "visible" / f"p{number}.png", scene.visible)
        write_png(root / "infrared" / f"p{number}.png", warp(scene.infrared).image)
        write_png(root / "labels" / f"p{number}.png", scene.label.to(torch.uint8))
    (root / "train.txt").write_text("p0\np1\np2\n")
    (root / "val.txt").write_text("p3\n")
    names = ["unlabeled", "car", "person", "bike", "curve", "car_stop", "guardrail", "color_cone", "bump"]
    colors = [[20 * i, 255 - 20 * i, 7 * i] for i in range(len(names))]
    (root / "classes.yaml").write_text(json.dumps({"classes": names, "palette": colors}))
    rig.write(root / "rig.json")
    return root


@pytest.fixture(scope="module")
def model() -> FusionSAM:
    return FusionSAM(build_debug(), "debug", {})


def pair_of(cameras: Path, number: int = 0) -> tuple[Path, Path]:
    return cameras / "visible" / f"p{number}.png", cameras / "infrared" / f"p{number}.png"


def aligned(cameras: Path, number: int = 0) -> Aligned:
    visible, infrared = pair_of(cameras, number)
    return Aligner(read_rig(cameras / "rig.json"))(read_visible(visible), read_infrared(infrared))


class TestServe:
    @pytest.fixture(scope="class")
    def client(self, model: FusionSAM, cameras: Path) -> Any:
        from starlette.testclient import TestClient

        from fusionsam.server.app import create_app
        from fusionsam.server.run import RIG

        with TestClient(create_app(model, aligner=Aligner(read_rig(cameras / "rig.json"), RIG))) as client:
            yield client

    @staticmethod
    def form(paths: tuple[Path, Path]) -> dict[str, tuple[str, bytes, str]]:
        return {n: ("x.png", p.read_bytes(), "image/png") for n, p in zip(("visible", "infrared"), paths, strict=True)}

    def test_an_upload_of_two_sizes_is_answered_as_the_aligned_pair_with_its_mask(
        self, client: Any, model: FusionSAM, cameras: Path
    ) -> None:
        pair = aligned(cameras)
        assert not pair.covered[1].all()
        expected = model.predict(pair.visible, pair.infrared, covered=pair.covered)
        assert (expected.fused != model.predict(pair.visible, pair.infrared).fused).any()  # the mask matters
        for path in ("/v1/predict", "/v1/sessions"):
            answer = client.post(path, files=self.form(pair_of(cameras)), params={"images": "fused,labels"}).json()
            found = {k: np.asarray(Image.open(io.BytesIO(base64.b64decode(v)))) for k, v in answer["images"].items()}
            assert np.array_equal(found["fused"], expected.fused)
            assert np.array_equal(found["labels"], expected.labels)
            assert answer["alignment"] == json.loads(json.dumps(pair.told))
        clicks = {"points": [[30, 40]], "labels": [1]}
        steered = client.post(f"/v1/sessions/{answer['id']}/prompts?images=labels", json=clicks).json()
        found["labels"] = np.asarray(Image.open(io.BytesIO(base64.b64decode(steered["images"]["labels"]))))
        wanted = model.predict(pair.visible, pair.infrared, clicks, covered=pair.covered)
        assert np.array_equal(found["labels"], wanted.labels)
        assert client.get("/v1/model").json()["rig"]["infrared"] == list(OTHER)

    def test_one_camera_alone_is_answered_and_other_cameras_are_refused_in_one_line(
        self, client: Any, model: FusionSAM, cameras: Path
    ) -> None:
        visible, _ = pair_of(cameras)
        alone = client.post("/v1/predict", files={"visible": ("x", visible.read_bytes())}).json()
        assert "alignment" not in alone
        answer = client.post("/v1/predict", files=self.form((visible, visible)))
        assert answer.status_code == 422
        said = answer.json()["error"]
        assert "this server's rig: is of infrared pictures of 102x134" in said
        assert str(cameras) not in said
        assert "\n" not in said

    def test_a_batch_keeps_each_pair_its_own_mask(self, model: FusionSAM, cameras: Path) -> None:
        from fusionsam.server.jobs import Engine, Images, Predict

        pairs = [aligned(cameras, number) for number in range(2)]
        pairs[1].covered[1, :, :70] = False
        jobs = [Predict(Images(pair.visible, pair.infrared, covered=pair.covered), "self") for pair in pairs]
        assert jobs[0].key == jobs[1].key
        assert jobs[0].key != Predict(Images(pairs[0].visible, pairs[0].infrared), "self").key
        for pair, found in zip(pairs, Engine(model)(jobs), strict=True):
            expected = model.predict(pair.visible, pair.infrared, "self", covered=pair.covered)
            assert (found.labels == expected.labels).mean() > 0.999
            assert np.abs(found.fused.astype(int) - expected.fused).max() <= 1

    def test_a_bad_rig_stops_the_command_before_its_port_is_taken(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "rig.json").write_text("{}")
        for command in ("serve", "demo"):
            assert main([command, "--port", "0", "--align", str(tmp_path / "rig.json")]) == 2
            assert "is no rig file" in capsys.readouterr().err


class TestDemo:
    def test_an_upload_is_aligned_and_a_drawn_pair_is_not(
        self, model: FusionSAM, cameras: Path, tmp_path: Path
    ) -> None:
        from fusionsam.page.handlers import Handlers

        ask, rig = Handlers(model, tmp_path), Aligner(read_rig(cameras / "rig.json"), "rig.json")
        page: Any = SimpleNamespace(session_hash="p")
        pair = aligned(cameras)
        session, *_, status, _, _ = ask.open_pair(*map(str, pair_of(cameras)), rig, "both", [], page)
        expected = model.predict(pair.visible, pair.infrared, covered=pair.covered)
        assert np.array_equal(session.now.fused, expected.fused)
        assert np.array_equal(session.now.labels, expected.labels)
        assert "infrared covers" in status
        session.take("visible")
        assert session.lost() == pytest.approx(100 * (session.own.labels != expected.labels).mean())
        session, *_, status, _, _ = ask.open_pair(*ask.scene(0), rig, "both", [], page)
        assert session.alignment == {}
        assert "infrared covers" not in status

    def test_other_cameras_are_refused_in_one_line(self, model: FusionSAM, cameras: Path, tmp_path: Path) -> None:
        from fusionsam.page.handlers import Handlers

        ask, rig = Handlers(model, tmp_path), Aligner(read_rig(cameras / "rig.json"), "rig.json")
        page: Any = SimpleNamespace(session_hash="p")
        visible = str(pair_of(cameras)[0])
        status = ask.open_pair(visible, visible, rig, "both", [], page)[4]
        assert "rig.json: is of infrared pictures of 102x134" in status


@pytest.mark.parametrize("stage", ["segmentation", "tokenizer"])
def test_a_training_step_tells_the_network_where_infrared_is(
    cameras: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusionsam.models.network import FusionSAMNetwork

    seen: list[tuple[bool, bool]] = []
    encode = FusionSAMNetwork.encode

    def watched(self: Any, visible: Any, infrared: Any, present: Any = None, covered: Any = None) -> Any:
        seen.append((self.training, covered is not None and not bool(covered.all())))
        return encode(self, visible, infrared, present, covered)

    monkeypatch.setattr(FusionSAMNetwork, "encode", watched)
    root, out = cameras, tmp_path / "run"
    flags = ["--data.dataset=pairs", f"--data.class_file={root / 'classes.yaml'}", f"--data.root={root}"]
    flags += [f"--data.align={root / 'rig.json'}", "--data.crop=[96,128]", "--data.scale=[0.9,1.0]", "--data.workers=0"]
    flags += [f"--train.stage={stage}", f"--train.out={out}", "--train.max_steps=2", "--train.accelerator=cpu"]
    flags += ["--loss.perceptual_weight=0"]
    debug = Path(__file__).parents[1] / "configs" / "debug.yaml"
    assert main(["train", "--config", str(debug), *flags]) == 0
    if stage == "segmentation":
        assert {(True, True), (False, True)} <= set(seen)  # a training step, and the validation
    assert (out / "final" / "model.safetensors").is_file()


def pair_flags(cameras: Path) -> list[str]:
    rig = ["--align", str(cameras / "rig.json")]
    return ["--visible", str(cameras / "visible"), "--infrared", str(cameras / "infrared"), *rig]


def test_fusion_metrics_measure_the_aligned_pair(
    cameras: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusionsam.alignment.apply import filled
    from fusionsam.evaluation.simple_fusions import average
    from fusionsam.metrics.fusion import fusion_metrics, prepare

    folders = ["--visible", str(cameras / "visible"), "--infrared", str(cameras / "infrared")]
    fused = ["--fused", str(cameras / "visible"), "--workers", "1"]
    assert main(["fusion-metrics", *folders, *fused, "--out", str(tmp_path / "no")]) == 2
    assert "or --align" in capsys.readouterr().err
    assert main(["fusion-metrics", *pair_flags(cameras), *fused, "--out", str(tmp_path / "out")]) == 0
    pairs = [aligned(cameras, number) for number in range(PAIRS)]
    wanted = []
    for pair in pairs:
        visible, infrared = (array.numpy() for array in filled(pair.visible, pair.infrared, pair.covered))  # type: ignore[union-attr]
        wanted.append(fusion_metrics(prepare(visible, "v"), prepare(infrared, "i"), average(visible, infrared))["SSIM"])
    found = json.loads((tmp_path / "out" / "fusion_metrics.json").read_text())["average"]
    assert found["SSIM"] == pytest.approx(np.mean(wanted))


def test_robustness_takes_a_rig_and_tells_what_realigning_gives_back(cameras: Path, tmp_path: Path) -> None:
    from fusionsam.weights.checkpoint import save_checkpoint

    weights = save_checkpoint(tmp_path / "debug", build_debug(), {})
    flags = ["--dataset", "pairs", "--root", str(cameras), "--class-file", str(cameras / "classes.yaml")]
    flags += ["--split", "val", "--weights", str(weights), "--align", str(cameras / "rig.json"), "--bootstrap", "0"]
    flags += ["--conditions", "infrared shifted 8 px", "infrared shifted 8 px, realigned"]
    assert main(["robustness", *flags, "--out", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "robustness.json").read_text())
    assert told["align"]["rig"] == read_rig(cameras / "rig.json").digest
    assert set(told["conditions"]) == {"full", *flags[-2:]}


def test_a_realigned_shift_is_taken_off() -> None:
    from fusionsam.evaluation.conditions import disturb

    scene = draw_scene(5, 6, (240, 320))
    assert scene.visible is not None
    assert scene.infrared is not None
    visible, infrared = scene.visible.float() / 255, scene.infrared.float() / 255
    inner = (slice(None), slice(24, -24), slice(24, -24))

    def off(name: str) -> float:
        moved = disturb(name, visible, infrared, "x")[1]
        assert moved is not None
        return float((moved - infrared)[inner].abs().mean())

    assert off("infrared shifted 8 px, realigned") < 0.3 * off("infrared shifted 8 px")


def test_label_shows_the_pair_as_the_rig_lays_it_and_tells_where_infrared_is(
    cameras: Path, model: FusionSAM, tmp_path: Path
) -> None:
    from fusionsam.data.labelling.folder import LabelFolder
    from fusionsam.data.splits import pair_entries
    from fusionsam.server.labelling.workspace import Workspace

    align = Aligner(read_rig(cameras / "rig.json"))
    entries = pair_entries(cameras / "visible", cameras / "infrared")
    classes, palette = ["nothing", "car"], [(0, 0, 0), (9, 9, 9)]
    folder = LabelFolder(tmp_path / "out", entries, classes, palette, rig=cameras / "rig.json")
    sam: Any = None
    workspace = Workspace(folder, model, sam, align=align)
    assert workspace.show(0)["size"] == list(SIZE)
    pair = aligned(cameras)
    expected = model.predict(pair.visible, pair.infrared, covered=pair.covered)
    assert np.array_equal(workspace.pair(0).prediction()[0], expected.fused)
    workspace.close()


class TestAligningByHand:
    @pytest.fixture
    def taken(self, cameras: Path) -> Any:
        from fusionsam.page.aligning import Aligning

        visible, infrared = pair_of(cameras)
        return Aligning(read_visible(visible), read_infrared(infrared))

    def test_points_make_the_rig_they_were_clicked_with_and_each_one_helps(self, taken: Any, rig: Rig) -> None:
        infrared = np.array([[45.0, 12.0], [125.0, 20.0], [120.0, 90.0], [50.0, 80.0], [85.0, 50.0]])
        visible = rig.infrared_to_visible_points(infrared)

        def error() -> float:
            moved = taken.rig().infrared_to_visible_points(infrared)
            return float(np.linalg.norm(moved - visible, axis=1).mean())

        errors = [error()]
        for (u, v), (x, y) in zip(infrared, visible, strict=True):
            taken.click("infrared", u, v)
            assert "in the visible picture" in taken.says()
            taken.click("visible", x, y)
            errors.append(error())
        assert errors[1] < 0.9 * errors[0]  # a shift
        assert errors[2] < 0.3 * errors[1]  # a scale and a turn
        assert max(errors[3:]) < 1e-6  # all that this rig has
        assert taken.finished().infrared_to_visible == pytest.approx(rig.infrared_to_visible, abs=1e-6)
        assert "5 points" in taken.says()
        taken.undo()
        assert "Now click point 5 in the visible picture" in taken.says()
        taken.clear()
        assert error() == errors[0]

    def test_a_rig_is_not_finished_before_somebody_did_something(self, taken: Any) -> None:
        from fusionsam.errors import InputError

        with pytest.raises(InputError, match="0 points"):
            taken.finished()
        taken.click("visible", 3, 4)
        taken.click("infrared", 3, 4)
        with pytest.raises(InputError, match="1 points"):
            taken.finished()
        taken.clear()
        taken.nudge("ArrowLeft")
        assert "by hand" in taken.finished().told["verdict"]
        with pytest.raises(InputError, match="outside of the infrared picture"):
            taken.click("infrared", SIZE[1] - 1, 3)

    def test_keys_move_the_edges_by_what_they_say(self, taken: Any) -> None:
        middle = np.array([centre(OTHER)])
        before = np.asarray(taken.picture()).copy()
        (x, y), = taken.rig().infrared_to_visible_points(middle)  # fmt: skip
        taken.nudge("ArrowRight", far=True)
        taken.nudge("ArrowUp")
        assert taken.rig().infrared_to_visible_points(middle)[0] == pytest.approx((x + 10, y - 1), abs=1e-6)
        assert (np.asarray(taken.picture()) != before).any()
        area = np.linalg.det(taken.rig().infrared_to_visible[:2, :2])
        for key in ("*", "]", "x"):
            taken.nudge(key)
        matrix = taken.rig().infrared_to_visible
        assert np.linalg.det(matrix[:2, :2]) / area == pytest.approx(1.002**2)
        assert np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])) == pytest.approx(0.1, abs=0.02)

    def test_a_search_is_gone_on_from_and_unrelated_pictures_change_nothing(self, taken: Any, rig: Rig) -> None:
        from fusionsam.errors import InputError
        from fusionsam.page.aligning import Aligning

        noise = torch.randint(0, 256, (1, *OTHER), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        blind = Aligning(taken.visible, noise)
        blind.nudge("+")
        with pytest.raises(InputError, match=r"refused.*click points"):
            blind.search()
        assert blind.start is None
        assert (blind.nudges != np.eye(3)).any()
        found = Aligning(taken.visible, taken.infrared, rig)
        found.nudge("ArrowLeft")
        lens_free = found.finished()
        assert lens_free.infrared_to_visible_points(np.zeros((1, 2)))[0, 0] == pytest.approx(
            rig.infrared_to_visible_points(np.zeros((1, 2)))[0, 0] - 1
        )
