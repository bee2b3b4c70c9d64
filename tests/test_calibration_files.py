"""Calibration files of cameras: every kind gives the same lens, and what cannot be used is one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fusionsam.alignment.calibration import read_camera
from fusionsam.alignment.geometry import centre, similarity
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.rig import Rig, read_rig
from fusionsam.alignment.warp import Warp, undistorted
from fusionsam.errors import InputError

LENS = Lens(500.5, 501.0, 319.0, 241.0, (-0.21, 0.05, 0.001, -0.002, 0.0))
OPENCV = """%YAML:1.0
---
calibration_time: "Sun Nov 29 09:00:00 2020"
image_width: 640
image_height: 480
camera_matrix: !!opencv-matrix
   rows: 3
   cols: 3
   dt: d
   data: [ 500.5, 0., 319., 0., 501., 241., 0., 0., 1. ]
distortion_coefficients: !!opencv-matrix
   rows: 5
   cols: 1
   dt: d
   data: [ -2.1e-01, 5.0e-02, 1.0e-03, -2.0e-03, 0. ]
avg_reprojection_error: 3.1e-01
"""
XML = """<?xml version="1.0"?>
<opencv_storage>
<image_width>640</image_width>
<image_height>480</image_height>
<camera_matrix type_id="opencv-matrix">
  <rows>3</rows><cols>3</cols><dt>d</dt>
  <data>500.5 0. 319. 0. 501. 241. 0. 0. 1.</data></camera_matrix>
<distortion_coefficients type_id="opencv-matrix">
  <rows>1</rows><cols>4</cols><dt>d</dt><data>-0.21 0.05 0.001 -0.002</data></distortion_coefficients>
</opencv_storage>
"""
STEREO = """%YAML:1.0
M1: !!opencv-matrix {rows: 3, cols: 3, dt: d, data: [900., 0., 400., 0., 900., 300., 0., 0., 1.]}
D1: !!opencv-matrix {rows: 1, cols: 5, dt: d, data: [0., 0., 0., 0., 0.]}
M2: !!opencv-matrix {rows: 3, cols: 3, dt: d, data: [500.5, 0., 319., 0., 501., 241., 0., 0., 1.]}
D2: !!opencv-matrix {rows: 1, cols: 5, dt: d, data: [-0.21, 0.05, 0.001, -0.002, 0.]}
R: !!opencv-matrix {rows: 3, cols: 3, dt: d, data: [1., 0., 0., 0., 1., 0., 0., 0., 1.]}
T: !!opencv-matrix {rows: 3, cols: 1, dt: d, data: [-0.1, 0., 0.]}
"""
ROS = """image_width: 640
image_height: 480
camera_name: thermal
camera_matrix:
  rows: 3
  cols: 3
  data: [500.5, 0, 319, 0, 501, 241, 0, 0, 1]
distortion_model: plumb_bob
distortion_coefficients:
  rows: 1
  cols: 5
  data: [-0.21, 0.05, 0.001, -0.002, 0]
"""
KALIBR = """cam0:
  camera_model: pinhole
  intrinsics: [900.0, 900.0, 400.0, 300.0]
  distortion_model: radtan
  distortion_coeffs: [0, 0, 0, 0]
  resolution: [800, 600]
cam1:
  T_cn_cnm1:
  - [1.0, 0.0, 0.0, -0.1]
  - [0.0, 1.0, 0.0, 0.0]
  - [0.0, 0.0, 1.0, 0.0]
  - [0.0, 0.0, 0.0, 1.0]
  camera_model: pinhole
  distortion_coeffs: [-0.21, 0.05, 0.001, -0.002]
  distortion_model: radtan
  intrinsics: [500.5, 501.0, 319.0, 241.0]
  resolution: [640, 480]
"""
JSON = json.dumps(
    {
        "camera_matrix": {"type_id": "opencv-matrix", "dt": "d", "data": [500.5, 0, 319, 0, 501, 241, 0, 0, 1]},
        "distortion_coefficients": {"rows": 4, "cols": 1, "dt": "d", "data": [-0.21, 0.05, 0.001, -0.002]},
    }
)  # fmt: skip


def written(folder: Path, text: str, name: str = "camera.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "part", "size", "unused"),
    [
        (OPENCV, "", (480, 640), ()),
        (XML, "", (480, 640), ()),
        (ROS, "", (480, 640), ()),
        (JSON, "", None, ()),
        (STEREO, ":2", None, ("R", "T")),
        (KALIBR, ":cam1", (480, 640), ("T_cn_cnm1",)),
    ],
    ids=["opencv yaml", "opencv xml", "ros", "opencv json", "opencv stereo", "kalibr"],
)
def test_every_kind_of_file_gives_the_same_lens(
    tmp_path: Path, text: str, part: str, size: tuple[int, int] | None, unused: tuple[str, ...]
) -> None:
    camera = read_camera(f"{written(tmp_path, text)}{part}")
    assert camera.lens == LENS
    assert (camera.size, camera.unused) == (size, unused)
    notes = " ".join(camera.notes())
    assert ("tells no picture size" in notes) == (size is None)
    assert ("is not used" in notes) == bool(unused)
    if size is not None:
        half = camera.lens_for((240, 320))
        assert (half.fx, half.cx) == pytest.approx((250.25, 159.25))
        with pytest.raises(InputError, match="480x640"):
            camera.lens_for((480, 600))


@pytest.mark.filterwarnings("ignore")
def test_what_opencv_itself_writes_is_read(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    for ending in ("yml", "xml", "json"):
        path = tmp_path / f"own.{ending}"
        file = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
        file.write("image_width", 640)
        file.write("image_height", 480)
        file.write("camera_matrix", np.array([[500.5, 0, 319], [0, 501, 241], [0, 0, 1]]))
        file.write("distortion_coefficients", np.array([[-0.21, 0.05, 0.001, -0.002, 0]]))
        file.release()
        camera = read_camera(path)
        assert camera.lens == LENS
        assert camera.size == (480, 640)


@pytest.mark.parametrize(
    ("text", "part", "said"),
    [
        ("a: [1", "", "cannot be read"),
        ("<a><b></a>", "", "cannot be read"),
        ("- 1\n", "", "holds list"),
        ("a: 1\n", "", "holds no camera"),
        (KALIBR, "", "holds 2 cameras (cam0, cam1); name one"),
        (KALIBR, ":cam7", "no camera 'cam7'"),
        (KALIBR.replace("radtan", "equidistant"), ":cam1", "equidistant distortion is not known"),
        (KALIBR.replace("pinhole", "omni"), ":cam1", "model omni"),
        (KALIBR.replace("[500.5, 501.0, 319.0, 241.0]", "[500.5]"), ":cam1", "1 numbers, expected fx"),
        (KALIBR.replace("[640, 480]", "[640]"), ":cam1", "its picture size is"),
        (ROS.replace("[500.5, 0, 319,", "[500.5, 319,"), "", "8 numbers, expected 3 x 3"),
        (ROS.replace("-0.21", "many"), "", "finite numbers"),
        (ROS.replace("500.5", "-500.5"), "", "focal lengths"),
        (ROS.replace("0.001, -0.002, 0]", "0.001, -0.002, 0, 0.3, 0, 0]"), "", "8 coefficients"),
        (ROS.replace("plumb_bob", "equidistant"), "", "equidistant distortion"),
        (OPENCV + "fisheye_model: 1\n", "", "fisheye distortion"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, part: str, said: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_camera(f"{path}{part}")
    assert said in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_too_large_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_camera(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="at most"):
        read_camera(written(tmp_path, "#" * (1 << 21)))


def test_undistorted_points_lie_where_an_ideal_lens_puts_them() -> None:
    picture = torch.zeros(1, 480, 640)
    ideal = np.array([[150.0, 120.0]])
    (x, y), = LENS.distorted(ideal).round().astype(int)  # fmt: skip
    picture[0, y - 2 : y + 3, x - 2 : x + 3] = 1
    seen = undistorted(picture, LENS)[0]
    rows, columns = (seen > 0.5).nonzero(as_tuple=True)
    assert (float(columns.float().mean()), float(rows.float().mean())) == pytest.approx((150, 120), abs=1)


def test_align_takes_the_lens_off_and_the_rig_puts_it_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusionsam.cli.main import main
    from fusionsam.data.images import write_png
    from fusionsam.data.synthetic.scenes import draw_scene

    size, other = (120, 160), (102, 134)
    x, y = centre(other)
    lens = Lens(90.0, 90.0, x, y, (-0.25, 0.0, 0.0, 0.0, 0.0))
    truth = Rig(size, other, np.linalg.inv(similarity(0.8, 2.0, centre(size), (x + 3, y - 2))), None, lens)
    warp = Warp(truth, "infrared")
    for number in range(4):
        scene = draw_scene(5, 2 * number, size)
        assert scene.visible is not None
        assert scene.infrared is not None
        write_png(tmp_path / "visible" / f"{number}.png", scene.visible)
        write_png(tmp_path / "infrared" / f"{number}.png", warp(scene.infrared).image)
    file = written(tmp_path, ROS.replace("640", "134").replace("480", "102"))
    text = file.read_text().replace("[500.5, 0, 319, 0, 501, 241, 0, 0, 1]", f"[90, 0, {x}, 0, 90, {y}, 0, 0, 1]")
    file.write_text(text.replace("[-0.21, 0.05, 0.001, -0.002, 0]", "[-0.25, 0, 0, 0, 0]"))
    pair = ["align", "--visible", str(tmp_path / "visible"), "--infrared", str(tmp_path / "infrared")]
    grid = np.stack(np.meshgrid(np.arange(10.0, 160, 10), np.arange(10.0, 120, 10)), -1).reshape(-1, 2)
    there = truth.visible_to_infrared(grid)
    grid = grid[((there >= 0) & (there <= np.array(other)[::-1] - 1)).all(1)]

    def error(*more: str) -> float:
        out = tmp_path / "rig.json"
        assert main([*pair, "--out", str(out), "--overwrite", *more]) == 0
        mine = read_rig(out)
        moved = truth.infrared_to_visible_points(mine.visible_to_infrared(grid))
        return float(np.linalg.norm(moved - grid, axis=1).max())

    assert error("--infrared-calibration", str(file)) < 0.6 * error()
    points = tmp_path / "points.csv"
    chosen = grid[[0, 8, 20, 33, -9, -1]]
    rows = np.c_[chosen, truth.visible_to_infrared(chosen)]
    points.write_text("\n".join(",".join(f"{value:.4f}" for value in row) for row in rows))
    assert error("--points", str(points), "--infrared-calibration", str(file)) < 0.1
    capsys.readouterr()
    assert main([*pair, "--out", str(tmp_path / "x.json"), "--visible-calibration", str(file)]) == 2
    assert "102x134" in capsys.readouterr().err
    assert main([*pair, "--out", str(tmp_path / "x.json"), "--lens", "--infrared-calibration", str(file)]) == 2
