"""Alignment: geometry by hand-worked values, the search on drawn scenes with a hidden rig, files that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fusionsam.alignment.apply import Aligner, filled
from fusionsam.alignment.choose import Candidate, choose
from fusionsam.alignment.estimate import estimate, working
from fusionsam.alignment.geometry import apply, centre, corners, from_points, moved_corners, rescaling, similarity
from fusionsam.alignment.judge import judge
from fusionsam.alignment.lens import Lens
from fusionsam.alignment.points import read_points, rig_from_points
from fusionsam.alignment.residual import residual
from fusionsam.alignment.rig import Rig, read_rig
from fusionsam.alignment.warp import Warp
from fusionsam.data.storage import Folder
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError


def draw_pair(index: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """uint8 (3,H,W) and (1,H,W) of one drawn scene by day."""
    sample = draw_scene(5, 2 * index, size)
    assert sample.visible is not None
    assert sample.infrared is not None
    return sample.visible, sample.infrared


SIZE, OTHER = (120, 160), (102, 134)


@pytest.fixture(scope="module")
def hidden() -> tuple[list[Tensor], list[Tensor], np.ndarray]:
    """Four drawn scenes seen by two cameras: visible of SIZE, infrared of OTHER, turned, moved and scaled."""
    matrix = similarity(0.8, 2.0, centre(SIZE), (centre(OTHER)[0] + 5, centre(OTHER)[1] - 4))
    rig = Rig(SIZE, OTHER, np.linalg.inv(matrix))
    warp = Warp(rig, "infrared")
    visible, infrared = [], []
    for seed in range(4):
        pair = draw_pair(seed, SIZE)
        visible.append(pair[0])
        infrared.append(warp(pair[1]).image)
    return visible, infrared, matrix


def found(visible: list[Tensor], infrared: list[Tensor]):
    return estimate([working(v, True) for v in visible], [working(t, False) for t in infrared], SIZE, OTHER)


def test_a_hidden_rig_is_found_from_four_pairs(hidden: tuple[list[Tensor], list[Tensor], np.ndarray]) -> None:
    visible, infrared, matrix = hidden
    result = found(visible, infrared)
    off = np.linalg.norm(apply(np.linalg.inv(matrix) @ result.matrix, corners(SIZE)) - corners(SIZE), axis=1)
    assert off.mean() < 2
    assert judge(result, SIZE, OTHER).accepted
    assert result.score > 2 * abs(result.shuffled)


def test_a_lens_that_bends_lines_is_found_when_asked_for(hidden: tuple[list[Tensor], list[Tensor], np.ndarray]) -> None:
    visible, _, matrix = hidden
    x, y = centre(OTHER)
    half = float(np.hypot(x, y))
    truth = Rig(SIZE, OTHER, np.linalg.inv(matrix), None, Lens(half, half, x, y, (-0.1, 0.0, 0.0, 0.0, 0.0)))
    # the scenes' infrared picture lies in the visible frame: each infrared pixel looks there
    warp = Warp(truth, "infrared")
    infrared = [warp(draw_pair(seed, SIZE)[1]).image for seed in range(4)]
    pictures = [working(v, True) for v in visible], [working(t, False) for t in infrared]
    y, x = np.mgrid[4 : SIZE[0] : 8, 4 : SIZE[1] : 8]
    grid = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    there = truth.visible_to_infrared(grid)
    grid = grid[((there >= 0) & (there <= np.array(OTHER)[::-1] - 1)).all(1)]

    def error(lens: bool) -> float:
        found = estimate(*pictures, SIZE, OTHER, lens)
        mine = Rig(SIZE, OTHER, np.linalg.inv(found.matrix), None, found.lens)
        return float(
            np.linalg.norm(truth.infrared_to_visible_points(mine.visible_to_infrared(grid)) - grid, axis=1).max()
        )

    assert error(True) < 0.7 * error(False)


def test_pictures_that_do_not_belong_together_are_refused() -> None:
    generator = torch.Generator().manual_seed(7)
    noise = [torch.randint(0, 256, (1, *OTHER), generator=generator, dtype=torch.uint8) for _ in range(3)]
    visible = [draw_pair(seed, SIZE)[0] for seed in range(3)]
    verdict = judge(found(visible, noise), SIZE, OTHER)
    assert not verdict.accepted
    assert "refused" in verdict.text


def test_the_warp_moves_a_dot_to_where_the_matrix_says() -> None:
    rig = Rig((41, 61), (23, 31), similarity(2.0, 0.0, (10.0, 7.0), (30.0, 20.0)))
    heat = torch.zeros(1, 23, 31, dtype=torch.uint16)
    heat[0, 7, 10] = 40000
    warped = Warp(rig)(heat)
    assert warped.image.dtype == torch.uint16
    assert int(warped.image[0, 20, 30]) == 40000
    assert int(warped.image.to(torch.int64)[0].sum()) == pytest.approx(4 * 40000, rel=0.01)
    # infrared x 0 - 0.5 lies at visible x 30 - 2 * 10.5 = 9
    assert not warped.inside[20, 8]
    assert warped.inside[20, 9]


def test_a_finer_source_is_averaged_not_skipped() -> None:
    rig = Rig((20, 30), (60, 90), rescaling((60, 90), (20, 30)))
    stripes = torch.zeros(1, 60, 90)
    stripes[:, :, ::3] = 90
    warped = Warp(rig)(stripes).image
    assert float((warped - 30).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["visible", "infrared"])
def test_both_ways_of_a_rig_with_lenses_are_inverse(kind: str) -> None:
    lens = Lens(100.0, 102.0, 79.0, 61.0, (-0.12, 0.03, 0.001, -0.002, 0.0))
    lenses = (lens, None) if kind == "visible" else (None, lens)
    rig = Rig(SIZE, SIZE, similarity(1.1, 3.0, (80.0, 60.0), (76.0, 63.0)), *lenses)
    points = np.array([[20.0, 30.0], [140.0, 100.0], [80.0, 60.0]])
    assert rig.infrared_to_visible_points(rig.visible_to_infrared(points)) == pytest.approx(points, abs=1e-3)


def test_a_rig_serves_resized_copies_and_refuses_other_cameras() -> None:
    rig = Rig((480, 640), (256, 320), similarity(2.0, 1.0, (160.0, 128.0), (320.0, 240.0)))
    half = rig.at((240, 320), (256, 320))
    full = apply(rig.infrared_to_visible, np.array([[40.0, 50.0]]))
    assert apply(half.infrared_to_visible, np.array([[40.0, 50.0]])) == pytest.approx((full + 0.5) / 2 - 0.5)
    with pytest.raises(InputError, match=r"visible pictures of 480x640.*480x480"):
        rig.at((480, 480), (256, 320))


def test_a_rig_file_comes_back_as_it_was(tmp_path: Path) -> None:
    lens = Lens(500.0, 500.0, 319.5, 239.5, (-0.1, 0.0, 0.0, 0.0, 0.0))
    rig = Rig((480, 640), (256, 320), similarity(2.0, 1.0, (160.0, 128.0), (320.0, 240.0)), None, lens)
    again = read_rig(rig.write(tmp_path / "rig.json"))
    assert again.digest == rig.digest
    assert again.infrared_lens == lens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "else"}, "no rig file"),
        ({"version": 9}, "version 9"),
        ({"infrared_to_visible": [[1, 0], [0, 1]]}, "3 x 3"),
        ({"infrared_to_visible": [[1, 0, 0], [0, 1, 0], [0, 0, None]]}, "3 x 3"),
        ({"visible_size": [480]}, "visible_size"),
        ({"visible_size": [480, True]}, "visible_size"),
        ({"infrared_to_visible": [[2.1, 0, 0], [0, 2, 0], [0, 0, 1]]}, "digest"),
        ({"infrared_to_visible": [[-2, 0, 0], [0, 2, 0], [0, 0, 1]], "digest": None}, "mirrors"),
        ({"infrared_to_visible": [[0, 0, 0], [0, 0, 0], [0, 0, 1]], "digest": None}, "inverted"),
        ({"lens": {"infrared": {"fx": 1}}}, "lens.infrared"),
        ({"lens": []}, "digest|lens"),
    ],
)
def test_a_bad_rig_file_is_refused_in_one_line(tmp_path: Path, change: dict, said: str) -> None:
    path = Rig((480, 640), (240, 320), np.diag([2.0, 2.0, 1.0])).write(tmp_path / "rig.json")
    values = {**json.loads(path.read_text()), **change}
    values = {key: value for key, value in values.items() if value is not None}
    if "lens" in change and not change["lens"]:
        values["lens"] = "no object"
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=said) as error:
        read_rig(path)
    assert str(path) in str(error.value)


def test_points_give_the_homography_they_were_made_with(tmp_path: Path) -> None:
    moves = torch.tensor([[3.0, -2], [-4, 5], [6, 1], [2, -3]]).double()
    matrix = moved_corners(SIZE, moves).numpy()
    infrared = np.array([[10.0, 12], [140, 20], [120, 100], [20, 90], [80, 60]])
    assert from_points(infrared, apply(matrix, infrared)) == pytest.approx(matrix, abs=1e-6)
    rows = np.c_[apply(matrix, infrared), infrared]
    file = tmp_path / "points.csv"
    file.write_text(
        "visible_x,visible_y,infrared_x,infrared_y\n"
        + "\n".join(",".join(f"{value:.6f}" for value in row) for row in rows)
    )
    rig = rig_from_points(*read_points(file), (200, 200), SIZE, str(file))
    assert rig.infrared_to_visible == pytest.approx(matrix, abs=1e-4)
    assert rig.told["point_error"] < 1e-3
    turned = [",".join(f"{row[i]:.6f}" for i in (2, 3, 1, 0)) for row in rows]
    file.write_text("Infrared_x, infrared_y, visible_y, visible_x\n" + "\n".join(turned))
    assert rig_from_points(*read_points(file), (200, 200), SIZE, "").infrared_to_visible == pytest.approx(
        matrix, abs=1e-4
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1,2,3,4\n5,6,7,8\n9,9,9,9\n", "at least 4"),
        ("1,2,3\n", "four columns"),
        ("62px,1,2,3\n1,1,1,1\n150,2,2,2\n3,90,3,3\n9,9,4,4\n", "'62px'"),
        ("vx,vy,ix,l4\n2,1,2,3\n", "found the columns vx, vy, ix, l4; expected"),
        ("visible_x,visible_y,infrared_x,infrared_y\nb2,1,2,3\n", "'b2'"),
        ("visible_x,visible_y,infrared_x,visible_x\n2,1,2,3\n", "found the columns"),
        ("l62,1,2,3\n1,1,1,1\n150,2,2,2\n3,90,3,3\n9,9,4,4\n", "'l62'"),
        ("nan,nan,nan,nan\n1,1,1,1\n150,2,2,2\n3,90,3,3\n9,9,4,4\n", "shapes"),
        (",,,\n1,1,1,1\n150,2,2,2\n3,90,3,3\n9,9,4,4\n", "float: ''"),
        (f"{'1' * 200_000},1,2,3\n", "field larger than"),
        ('{"visible": [[1, 2]]}', "infrared"),
        ('{"visible": [[1, 2]], "infrared": [[1, 2], [3, 4]]}', "shapes"),
        ("1,1,1,1\n2,2,2,2\n3,3,3,3\n4,4,4,4\n", "one line"),
        ("1,1,1,1\n150,2,2,2\n3,90,3,3\n500,4,4,4\n", "outside"),
    ],
)
def test_bad_points_are_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "points.csv"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        rig_from_points(*read_points(file), SIZE, SIZE, str(file))


def test_the_residual_is_the_shift_that_was_made() -> None:
    visible, infrared = draw_pair(3, (240, 320))[:2]
    shifted = torch.roll(infrared, (-3, 5), (1, 2))
    measured = residual(visible, shifted)
    assert (measured.x, measured.y) == pytest.approx((-5, 3), abs=0.7)
    assert measured.believed
    assert not residual(visible, infrared).believed


def test_an_aligner_takes_a_pairs_own_shift_off_and_can_be_told_not_to() -> None:
    size = (240, 320)
    visible, infrared = draw_pair(3, size)[:2]
    shifted = torch.roll(infrared, (-3, 5), (1, 2))
    rig = Rig(size, size, np.eye(3))
    moved = Aligner(rig)(visible, shifted)
    assert moved.told["shift"] == pytest.approx([-5, 3], abs=0.7)
    assert moved.infrared is not None
    inner = (slice(None), slice(20, -20), slice(20, -20))
    assert (moved.infrared[inner].float() - infrared[inner].float()).abs().mean() < 3
    plain = Aligner(rig, refine=False)(visible, shifted)
    assert plain.infrared is not None
    assert torch.equal(plain.infrared, shifted)
    assert "shift" not in plain.told


def test_what_infrared_does_not_reach_is_told_and_filled_from_the_other_camera() -> None:
    visible, infrared = draw_pair(1, SIZE)[:2]
    rig = Rig(SIZE, SIZE, np.array([[1.0, 0, 100], [0, 1, 0], [0, 0, 1]]))
    pair = Aligner(rig, refine=False)(visible, infrared)
    assert pair.covered[0].all()
    assert not pair.covered[1][:, :99].any()
    assert pair.covered[1][:, 101:].all()
    assert pair.told["covered"] == pytest.approx(60 / 160, abs=0.01)
    _, heat = filled(pair.visible, pair.infrared, pair.covered)
    assert heat is not None
    red, green, blue = visible.float()
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (heat[0, :, :99].float() - luma[:, :99]).abs().max() <= 1


def test_one_camera_alone_passes_through() -> None:
    visible = draw_pair(1, SIZE)[0]
    pair = Aligner(Rig((10, 10), (10, 10), np.eye(3)))(visible, None)
    assert pair.visible is visible
    assert pair.infrared is None


def test_chosen_pairs_are_sharp_and_differ() -> None:
    looks = torch.eye(3)
    pool = [Candidate(1.0, looks[0]), Candidate(0.99, looks[0]), Candidate(0.9, looks[1]), Candidate(0.0, looks[2])]
    assert choose(pool, 2) == [0, 2]
    assert choose(pool, 9) == [0, 1, 2, 3]


# -- the network and the command ---------------------------------------------------------------------------------


def test_where_infrared_does_not_reach_its_values_change_nothing() -> None:
    from fusionsam.inference.predictor import FusionSAM

    model = FusionSAM.from_pretrained("tiny", "cpu")
    visible, infrared = draw_pair(1, (96, 128))
    covered = torch.ones(2, 96, 128, dtype=torch.bool)
    covered[1, :, 64:] = False
    other = infrared.clone()
    other[:, :, 64:] = 255 - other[:, :, 64:]
    one, two = (model.predict(visible, heat, covered=covered) for heat in (infrared, other))
    assert np.array_equal(one.labels, two.labels)
    assert np.array_equal(one.fused, two.fused)
    nowhere = torch.stack([covered[0], torch.zeros(96, 128, dtype=torch.bool)])
    alone, blind = model.predict(visible, None), model.predict(visible, infrared, covered=nowhere)
    assert np.array_equal(alone.labels, blind.labels)
    assert (model.predict(visible, infrared).fused != blind.fused).any()


def test_latent_cells_that_are_not_covered_hold_the_missing_token() -> None:
    from fusionsam.inference.predictor import FusionSAM

    network = FusionSAM.from_pretrained("tiny", "cpu").network
    covered = torch.ones(1, 2, 64, 96, dtype=torch.bool)
    covered[:, 1, :33] = False
    with torch.no_grad():
        latents = network.encode(torch.rand(1, 3, 64, 96), torch.rand(1, 1, 64, 96), covered=covered).latents
    token = network.tokenizer.missing[1][:, None, None]
    assert torch.equal(latents.infrared[0, :, :8, :24], token.expand(-1, 8, 24))
    assert not torch.equal(latents.infrared[0, :, 8:16, :24], token.expand(-1, 8, 24))
    with pytest.raises(InputError, match=r"covered.*bool"):
        network.encode(torch.rand(1, 3, 64, 96), torch.rand(1, 1, 64, 96), covered=covered[:, :1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, hidden: tuple[list[Tensor], list[Tensor], np.ndarray]) -> Path:
    from fusionsam.data.images import write_png

    root = tmp_path_factory.mktemp("two_cameras")
    for number, (visible, infrared) in enumerate(zip(*hidden[:2], strict=True)):
        write_png(root / "visible" / f"p{number}.png", visible)
        write_png(root / "infrared" / f"p{number}.png", infrared)
    return root


def test_align_then_predict_on_two_sizes(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusionsam.cli.main import main

    pair = ["--visible", str(folders / "visible"), "--infrared", str(folders / "infrared")]
    assert main(["predict", *pair, "--out", str(tmp_path / "no")]) == 3  # pairs that failed are listed
    assert "--align auto" in capsys.readouterr().err
    rig = tmp_path / "rig.json"
    assert main(["align", *pair, "--out", str(rig)]) == 0
    assert "accepted" in capsys.readouterr().out
    assert rig.with_suffix(".png").is_file()
    assert main(["align", *pair, "--out", str(rig)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    # the picture beside a rig replaces nobody's either
    (tmp_path / "mine.png").write_bytes(b"mine")
    assert main(["align", *pair, "--out", str(tmp_path / "mine.json")]) == 2
    assert "mine.png: is there" in capsys.readouterr().err
    of_pair = str(folders / "visible" / "p0.json")
    assert main(["align", *pair, "--out", of_pair, "--overwrite"]) == 2
    assert "p0.png: would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine.png").read_bytes() == b"mine"
    for frame, size in (("visible", SIZE), ("infrared", OTHER)):
        out = tmp_path / frame
        assert main(["predict", *pair, "--out", str(out), "--align", str(rig), "--frame", frame]) == 0
        told = json.loads((out / "p0.json").read_text())
        assert told["size"] == list(size)
        assert told["alignment"]["rig"] == json.loads(rig.read_text())["digest"]
        assert 0.3 < told["alignment"]["covered"] < 1
    capsys.readouterr()
    assert main(["predict", *pair, "--out", str(tmp_path / "visible"), "--align", str(rig)]) == 0
    assert "already done" in capsys.readouterr().out


def test_a_rig_of_other_cameras_is_one_line(folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusionsam.cli.main import main

    rig = Rig((480, 480), (200, 200), np.diag([2.0, 2.0, 1.0])).write(tmp_path / "rig.json")
    pair = ["--visible", str(folders / "visible"), "--infrared", str(folders / "infrared")]
    assert main(["predict", *pair, "--out", str(tmp_path / "out"), "--align", str(rig)]) == 3
    said = capsys.readouterr().err
    assert "p0" in said
    assert "480x480" in said
    assert "120x160" in said


def test_data_check_lists_the_pairs_that_lie_off(tmp_path: Path) -> None:
    from fusionsam.data.check import check
    from fusionsam.data.images import write_png

    for number, right in enumerate((0, 6, 0)):
        visible, infrared = draw_pair(number, (240, 320))
        write_png(tmp_path / "visible" / f"p{number}.png", visible)
        write_png(tmp_path / "infrared" / f"p{number}.png", torch.roll(infrared, right, 2))
    report = check("pairs", tmp_path, progress=False)
    assert [each["id"] for each in report["misaligned"]] == ["p1"]
    assert report["misaligned"][0]["x"] == pytest.approx(-6, abs=0.7)
    assert report["splits"]["all"]["shift_pixels"] == {"median": 0.0, "p90": 0.0}
    assert report["ok"]


def test_a_rig_that_auto_finds_replaces_no_other_one(tmp_path: Path) -> None:
    from fusionsam.data.rigs import keep

    out, rig = Folder(tmp_path), Rig((64, 96), (64, 96), np.eye(3))
    keep(rig, out, ["a"], overwrite=False)
    kept = (tmp_path / "rig.json").read_bytes()
    keep(rig, out, ["a"], overwrite=False)
    clicked = Rig((64, 96), (64, 96), np.diag([2.0, 2.0, 1.0]))
    for there in (json.dumps(clicked.as_dict()), "{", json.dumps({"by": "hand"})):
        (tmp_path / "rig.json").write_text(there)
        with pytest.raises(InputError, match=r"rig\.json: is another rig"):
            keep(rig, out, ["a"], overwrite=False)
        assert (tmp_path / "rig.json").read_text() == there
    keep(rig, out, ["a", "rig"], overwrite=True)  # a pair of that name
    assert (tmp_path / "rig.json").read_text() == there
    keep(rig, out, ["a"], overwrite=True)
    assert (tmp_path / "rig.json").read_bytes() == kept


def test_what_many_pairs_say_of_their_rig() -> None:
    from fusionsam.data.rigs import Agreement

    heard = Agreement()
    assert heard.lines("rig.json") == []
    for score in (0.4, 0.05, 0.02):
        heard.add({"score": score})
    heard.add({"covered": 0.2, "warning": "little"})
    said = heard.lines("rig.json")
    assert said[0].startswith("warning: rig.json: the edges of the two cameras hardly agree (score 0.05)")
    assert said[1] == "warning: in 1 of 4 pairs one camera covers 20% of the frame or little more"
