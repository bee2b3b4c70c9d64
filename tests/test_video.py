"""`fusionsam predict --video`: every frame is the single prediction, in order, and nothing half-written stays."""

import json
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fusionsam.alignment.rig import Rig
from fusionsam.cli.main import main
from fusionsam.config.schema import preset
from fusionsam.data import palettes
from fusionsam.data.images import write_png
from fusionsam.data.infrared import InfraredOptions, to_heat
from fusionsam.data.stretch import find_range, given_range, stretch
from fusionsam.data.synthetic.scenes import draw_scene
from fusionsam.errors import InputError
from fusionsam.inference.films import Film, pair_frames
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.video import Source, frame_picture, open_source, overlay_video
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.weights.checkpoint import save_checkpoint

H, W = 67, 83
NAMES = ["f1", "f2", "f10"]  # in this order, not in that of the alphabet


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    return save_checkpoint(tmp_path_factory.mktemp("w") / "small", FusionSAMNetwork(preset("debug")).eval(), {})


@pytest.fixture(scope="module")
def model(weights):
    return FusionSAM.from_pretrained(weights, "cpu")


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(5, index, (H, W)) for index in range(3)]


@pytest.fixture
def folders(scenes, tmp_path):
    for name, scene in zip(NAMES, scenes, strict=True):
        write_png(tmp_path / "visible" / f"{name}.png", scene.visible)
        write_png(tmp_path / "infrared" / f"{name}.png", scene.infrared)
    return tmp_path / "visible", tmp_path / "infrared"


def film(path, frames, form, rate=Fraction(7)):
    """A lossless film of arrays."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "bgr0" if form == "rgb24" else "gray"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format=form)):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def films(scenes, folder, visible=3, infrared=3):
    folder.mkdir(exist_ok=True)
    shown = [scene.visible.permute(1, 2, 0).contiguous().numpy() for scene in scenes]
    heat = [scene.infrared[0].numpy() for scene in scenes]
    return film(folder / "drive.mkv", shown[:visible], "rgb24"), film(folder / "heat.mkv", heat[:infrared], "gray")


def decoded(path):
    with av.open(str(path)) as container:
        rate = container.streams.video[0].average_rate
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)], rate


def predict(*arguments):
    return main(["predict", "--video", *map(str, arguments)])


def test_each_frame_is_the_prediction_of_its_pair_in_natural_order(model, weights, scenes, folders, tmp_path, capsys):
    visible, infrared = folders
    out = tmp_path / "out"
    given = ("--visible", visible, "--infrared", infrared, "--out", out, "--weights", weights, "--fps", 5)
    assert predict(*given) == 0
    assert "3 frames" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["visible_overlay.json", "visible_overlay.mp4"]
    told = json.loads((out / "visible_overlay.json").read_text())
    assert (told["frames"], told["frames_a_second"], told["pairing"]) == (3, 5.0, {"by": "name"})
    frames, rate = decoded(out / "visible_overlay.mp4")
    assert rate == 5
    expected = [frame_picture(model.predict(scene.visible, scene.infrared)) for scene in scenes]
    distance = [[np.square(e.astype(float) - f).mean() for e in expected] for f in frames]
    assert [int(np.argmin(row)) for row in distance] == [0, 1, 2]
    for index in range(3):
        assert 10 * np.log10(255**2 / distance[index][index]) > 24  # decibels: lossy, but no other picture


def test_films_are_their_frames(weights, scenes, folders, tmp_path):
    pair = films(scenes, tmp_path / "films")
    assert predict("--visible", pair[0], "--infrared", pair[1], "--out", tmp_path / "a", "--weights", weights) == 0
    given = ("--visible", folders[0], "--infrared", folders[1], "--out", tmp_path / "b", "--weights", weights)
    assert predict(*given, "--fps", 7) == 0
    from_films, rate = decoded(tmp_path / "a" / "drive_overlay.mp4")
    from_folders, _ = decoded(tmp_path / "b" / "visible_overlay.mp4")
    assert rate == 7
    np.testing.assert_array_equal(np.stack(from_films), np.stack(from_folders))


def test_a_film_is_named_after_its_whole_folder_and_replaced_only_when_asked(
    weights, scenes, folders, tmp_path, capsys
):
    renamed = folders[0].rename(tmp_path / "run.1")
    given = ("--visible", renamed, "--out", tmp_path / "o", "--weights", weights)
    assert predict(*given) == 0
    film = tmp_path / "o" / "run.1_overlay.mp4"
    before = film.read_bytes()
    assert predict(*given, "--fps", 3) == 2
    assert f"{film}: is there; choose another --out, or --overwrite" in capsys.readouterr().err
    assert film.read_bytes() == before
    assert predict(*given, "--fps", 3, "--overwrite") == 0
    assert decoded(film)[1] == 3
    before = film.read_bytes()
    heat = film.rename(film.parent / "x_overlay.mp4")
    pair = ("--visible", shutil.copy(heat, tmp_path / "x.mp4"), "--infrared", heat, "--overwrite")
    assert predict(*pair, "--out", film.parent, "--weights", weights) == 2
    assert f"{heat}: would be overwritten by the film of that name" in capsys.readouterr().err
    assert heat.read_bytes() == before


def test_film_and_record_of_a_file_address_lie_together(weights, scenes, tmp_path, monkeypatch):
    heat = films(scenes, tmp_path / "films")[1]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert predict("--infrared", heat, "--out", f"file://{tmp_path / 'o'}", "--weights", weights) == 0
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["heat_overlay.json", "heat_overlay.mp4"]
    assert not list((tmp_path / "here").iterdir())


def test_one_film_alone(model, weights, scenes, tmp_path):
    heat = films(scenes, tmp_path / "films")[1]
    assert predict("--infrared", heat, "--out", tmp_path / "o", "--weights", weights) == 0
    frames, _ = decoded(tmp_path / "o" / "heat_overlay.mp4")
    expected = frame_picture(model.predict(None, scenes[2].infrared))
    assert np.square(expected.astype(float) - frames[2]).mean() < 255**2 / 10**2.4
    told = json.loads((tmp_path / "o" / "heat_overlay.json").read_text())
    assert told["infrared"]["size"] == [H, W]
    assert told["infrared_read_as"]["polarity"]["hot"] == "white"
    (tmp_path / "o" / "heat_overlay.mp4").unlink()  # its JSON is ours, and goes with the next film
    assert predict("--infrared", heat, "--out", tmp_path / "o", "--weights", weights) == 0
    (tmp_path / "o" / "heat_overlay.mp4").unlink()
    (tmp_path / "o" / "heat_overlay.json").write_text("{}")
    assert predict("--infrared", heat, "--out", tmp_path / "o", "--weights", weights) == 2


@pytest.mark.parametrize("counts", [(3, 2), (1, 3)])
def test_films_of_two_lengths_keep_the_frames_they_share(weights, scenes, tmp_path, capsys, counts):
    pair = films(scenes, tmp_path / "films", *counts)
    given = ("--visible", pair[0], "--infrared", pair[1], "--weights", weights)
    assert predict(*given, "--out", tmp_path / "o") == 3
    longer = ("drive.mkv", "heat.mkv")[counts[1] > counts[0]]
    captured = capsys.readouterr()
    assert f"{longer}: its last {max(counts) - min(counts)} of {max(counts)} frames have no partner" in captured.err
    assert f"{min(counts)} frames" in captured.out
    assert len(decoded(tmp_path / "o" / "drive_overlay.mp4")[0]) == min(counts)
    assert predict(*given, "--out", tmp_path / "s", "--stop-on-error") == 2
    assert "cut the films to the same frames" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def timed(path, frames, form, seconds):
    """A lossless film whose frames are shown at given times."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "gray16le" if form == "gray16le" else "gray" if form == "gray" else "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for frame, time in zip(frames, seconds, strict=True):
            shown = av.VideoFrame.from_ndarray(frame, format=form)
            shown.pts, shown.time_base = round(1000 * time), Fraction(1, 1000)
            for packet in stream.encode(shown):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return path


def test_times_of_frames_are_kept_and_pair_films_of_two_rates(model, scenes, tmp_path):
    shown = [scene.visible.permute(1, 2, 0).contiguous().numpy() for scene in scenes]
    heat = [np.full((H, W), value, np.uint8) for value in range(0, 240, 40)]
    seconds = [0, 0.1, 1.1]
    visible = timed(tmp_path / "v.mkv", shown, "rgb24", seconds)
    infrared = timed(tmp_path / "i.mkv", heat, "gray", [0, 0.05, 0.11, 0.5, 1.08, 1.13])
    source = open_source(visible, infrared)
    assert source.times == pytest.approx(seconds)
    told = source.told()
    assert (told["times"], told["pairing"]) == ("kept", {"by": "time", "pairs": 3})
    assert (told["visible"]["variable_rate"], told["infrared"]["frames"], told["infrared"]["turned"]) == (True, 6, 0)
    frames = list(source.frames)
    assert [int(frame[3][0, 0]) for frame in frames] == [0, 80, 160]
    overlay_video(model, open_source(visible, infrared), tmp_path / "o.mp4")
    with av.open(str(tmp_path / "o.mp4")) as container:
        assert [frame.time for frame in container.decode(video=0)] == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize("rates", [(Fraction(30), Fraction(30000, 1001)), (Fraction(30000, 1001), Fraction(30))])
def test_rates_that_all_but_agree_pair_by_time_once_they_drift(tmp_path, rates):
    dark = [np.zeros((16, 16), np.uint8)] * 700
    pair = [Film(film(tmp_path / f"{index}.mkv", dark, "gray", rate)) for index, rate in enumerate(rates)]
    found = pair_frames(*pair)
    assert found.by_time
    apart = [abs(first / rates[0] - second / rates[1]) for first, second in found.frames]
    assert max(apart) < 0.52 / 30  # half a frame, and the milliseconds of the container
    assert (697, 697) not in found.frames
    short = [Film(film(tmp_path / f"s{index}.mkv", dark[:400], "gray", rate)) for index, rate in enumerate(rates)]
    found = pair_frames(*short)
    assert (found.by_time, found.frames) == (False, [(index, index) for index in range(400)])


def test_films_that_tell_no_times_are_named(tmp_path):
    dark = [np.zeros((16, 16), np.uint8)] * 3
    known = Film(film(tmp_path / "i.mkv", dark, "gray"))
    raw = Film(film(tmp_path / "v.mkv", dark, "gray"))
    raw.times = []  # as of a bare stream
    for pair in ((raw, known), (known, raw)):
        with pytest.raises(InputError, match=r"v\.mkv: tells no times of its frames"):
            pair_frames(*pair)


def test_what_a_cut_film_hides_is_not_counted(tmp_path):
    whole, cut = tmp_path / "whole.mp4", tmp_path / "cut.mp4"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        shades = [av.VideoFrame.from_ndarray(np.full((48, 64), 100 + index, np.uint8), "gray") for index in range(10)]
        for shade in [*shades, None]:
            for packet in stream.encode(shade):
                container.mux(packet)
    with av.open(str(whole)) as container, av.open(str(cut), "w") as out:
        stream = container.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.size:  # four frames before 0, which an edit list hides
                packet.pts -= round(Fraction(4, 10) / stream.time_base)
                packet.dts, packet.stream = packet.pts, copy
                out.mux(packet)
    assert Film(cut).times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    source = open_source(cut, cut)
    assert source.count == len(list(source.frames)) == 6


def test_a_film_of_counts_is_read_as_its_frames_with_one_range(tmp_path):
    counts = [np.linspace(low, low + 2000, H * W).reshape(H, W).astype(np.uint16) for low in (21000, 21000, 23000)]
    path = timed(tmp_path / "i.mkv", counts, "gray16le", [0, 0.1, 0.2])
    source = open_source(None, path)
    together = find_range(np.concatenate(counts))
    for counted, frame in zip(counts, source.frames, strict=True):
        np.testing.assert_array_equal(frame[3], stretch(counted, together))
    assert source.heat.facts["range"]["how"] == "film"
    assert source.told()["infrared_read_as"]["range"]["high"] == pytest.approx(together.high, abs=1e-3)
    assert source.told()["infrared"]["bits"] == "more than 8"
    fixed = open_source(None, path, reading=InfraredOptions(limits=(20000, 30000)))
    first = next(iter(fixed.frames))[3]
    np.testing.assert_array_equal(first, stretch(counts[0], given_range(counts[0], 20000, 30000)))


def test_a_folder_of_counts_is_one_film_with_one_range(tmp_path):
    (tmp_path / "i").mkdir()
    ramp = np.linspace(0, 2000, H * W).reshape(H, W)
    lows = [*range(21000, 22200, 100), 40000]  # the last is of a closed shutter
    for index, low in enumerate(lows):
        Image.fromarray((ramp + low).astype(np.uint16)).save(tmp_path / "i" / f"{index:02}.png")
    source = open_source(None, tmp_path / "i")
    frames = [frame[3][0].numpy() for frame in source.frames]
    assert source.heat.facts["range"]["how"] == "film"
    slopes = [np.polyfit(ramp.ravel(), frame.ravel(), 1)[0] for frame in frames[:3]]
    assert np.ptp(slopes) < 0.02 * slopes[0]  # the same count is the same grey value in every frame
    assert frames[11].mean() > frames[0].mean() + 60


def test_a_coloured_folder_is_read_as_its_first_frame(scenes, tmp_path):
    heat = scenes[0].infrared[0].numpy()
    # whatever the scene looks like, and where a frame of one colour tells no palette
    frames = [heat, 255 - heat, np.full_like(heat, 200)]
    for index, frame in enumerate(frames):
        write_png(tmp_path / "i" / f"{index}.png", palettes.table("rainbow")[frame])
    source = open_source(None, tmp_path / "i")
    seen = [frame[3][0].numpy().astype(int) for frame in source.frames]
    told = source.told()["infrared_read_as"]
    assert (told["palette"]["name"], told["polarity"]["how"]) == ("rainbow", "guessed by the scene")
    turned = told["polarity"]["hot"] == "black"
    for frame, found in zip(frames, seen, strict=True):
        assert np.abs(found - (255 - frame if turned else frame)).max() <= 2
    # a palette that was asked for stays, where the first frame is grey
    write_png(tmp_path / "i" / "0.png", np.zeros_like(heat))
    asked = list(open_source(None, tmp_path / "i", reading=InfraredOptions(palette="rainbow", polarity="white")).frames)
    assert np.abs(asked[1][3][0].numpy().astype(int) - frames[1]).max() <= 2


def test_what_does_not_fit_is_named(scenes, folders, tmp_path):
    drive, heat = films(scenes, tmp_path / "films")
    other = film(tmp_path / "films" / "small.mkv", [np.zeros((H, W - 1), np.uint8)], "gray")
    (tmp_path / "notes.mp4").write_text("no film")
    (tmp_path / "empty").mkdir()
    for pair, words in [
        ((drive, other), ["drive.mkv is 83x67", "small.mkv 82x67"]),
        ((tmp_path / "notes.mp4", None), ["notes.mp4", "cannot be decoded"]),
        ((drive, folders[1]), ["one is a folder and one a file"]),
        ((tmp_path / "gone.mp4", None), ["gone.mp4", "no such file"]),
        ((None, tmp_path / "empty"), ["empty", "no image"]),
        ((None, None), ["at least one"]),
    ]:
        with pytest.raises(InputError) as error:
            open_source(*pair)
        assert all(word in str(error.value) for word in words)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--fps: 0"):
        open_source(drive, heat, 0.0)


def test_frames_are_read_one_by_one_and_a_failure_keeps_the_old_video(model, scenes, tmp_path):
    read, predicted = [], []

    class Watched:
        def predict(self, visible, infrared, prompts=None, *, covered=None):
            predicted.append(len(read))
            return model.predict(visible, infrared)

    def frames(last):
        for index, scene in enumerate(scenes):
            read.append(index)
            size = scene.size if index < 2 else last
            yield scene.id, scene.size, scene.visible[:, : size[0]], scene.infrared[:, : size[0]], None

    out = tmp_path / "v.mp4"
    assert overlay_video(Watched(), Source(frames((H, W)), 3, Fraction(5)), out)[0] == 3
    assert predicted == [1, 2, 3]
    before = out.read_bytes()
    with pytest.raises(
        InputError, match=rf"frame 3 .*is {W}x{H - 2} pixels, the first is {W}x{H}; give one size a film"
    ):
        overlay_video(model, Source(frames((H - 2, W)), 3, Fraction(5)), out)
    assert [path.name for path in tmp_path.iterdir()] == ["v.mp4"]
    assert out.read_bytes() == before
    source = Source(frames((H - 2, W)), 3, Fraction(5))
    assert overlay_video(model, source, out, keep=True)[0] == 2
    assert source.alone[0].endswith("the 2 frames before it are kept")


def test_a_black_beginning_does_not_decide_for_a_film(scenes, tmp_path):
    heat = scenes[0].infrared[0].numpy()
    frames = [palettes.table("jet")[frame] for frame in (np.zeros_like(heat), heat, heat // 2 + 60, heat)]
    frames[0][:] = 0
    for index, frame in enumerate(frames):
        write_png(tmp_path / "i" / f"{index}.png", frame)
    seen = film(tmp_path / "jet.mkv", frames, "rgb24")
    for path in (tmp_path / "i", seen):
        told = open_source(None, path).told()
        assert told["infrared_read_as"]["palette"]["name"] == "jet"
        assert any("jet" in line for line in told["notices"])
    (tmp_path / "i" / "2.png").write_bytes(b"damaged")  # the frames before it are kept
    source = open_source(None, tmp_path / "i")
    with pytest.raises(InputError, match=r"2\.png"):
        list(source.frames)
    flat = film(tmp_path / "flat.mkv", [np.zeros((H, W), np.uint8)] * 2, "gray")
    assert "no frame of the infrared film shows enough" in open_source(None, flat).told()["notices"][-1]


def test_a_black_hot_film_is_stretched_by_its_own_values(tmp_path):
    frame = np.linspace(20, 90, H * W).reshape(H, W).astype(np.uint8)
    path = film(tmp_path / "i.mkv", [frame, frame], "gray")
    reading = InfraredOptions(limits="auto", polarity="black")
    source = open_source(None, path, reading=reading)
    assert source.heat.facts["range"]["low"] < 30
    assert source.heat.facts["range"]["high"] < 95
    shown = next(iter(source.frames))[3]
    np.testing.assert_array_equal(shown, to_heat(frame, reading).pixels)


def test_what_a_film_has_beyond_the_others_end_is_told(tmp_path):
    frames = [np.full((H, W), 10 * index, np.uint8) for index in range(20)]
    long = timed(tmp_path / "long.mkv", frames, "gray", [index / 10 for index in range(20)])
    short = timed(tmp_path / "short.mkv", frames[:5], "gray", [index / 5 for index in range(5)])
    for one, two in ((long, short), (short, long)):
        pairing = pair_frames(Film(one), Film(two))
        assert pairing.by_time
        assert len(pairing.frames) == 5
        assert pairing.alone == [f"{long}: its last 9 of 20 frames come after the end of short.mkv"]
    slow = timed(tmp_path / "slow.mkv", frames, "gray", [index / 5 for index in range(20)])
    fast = timed(tmp_path / "fast.mkv", frames[:10], "gray", [index / 10 for index in range(10)])
    pairing = pair_frames(Film(fast), Film(slow))
    assert [pair[1] for pair in pairing.frames] == [0, 1, 2, 3, 4, 5]
    assert pairing.alone == [f"{slow}: 14 of 20 frames have none of the other film near in time"]


def test_the_json_of_a_film_tells_how_it_was_made_and_how_the_cameras_lay(weights, scenes, folders, tmp_path, capsys):
    rig = Rig((H, W), (H, W), np.eye(3))
    (tmp_path / "rig.json").write_text(json.dumps(rig.as_dict()))
    given = ("--visible", folders[0], "--infrared", folders[1], "--weights", weights, "--align", tmp_path / "rig.json")
    assert predict(*given, "--out", tmp_path / "o", "--prompts", "none") == 0
    told = json.loads((tmp_path / "o" / "visible_overlay.json").read_text())
    assert told["run"]["prompts"] == "none"
    assert told["run"]["align"] == [rig.digest, "visible", True]
    assert told["alignment"]["rig"] == rig.digest
    assert (told["alignment"]["frames"], told["alignment"]["applied"]) == (3, True)
    for path in folders[1].iterdir():  # upside down: no edge agrees
        Image.open(path).rotate(180).save(path)
    assert predict(*given, "--out", tmp_path / "p") == 0
    assert "the edges of the two cameras hardly agree" in capsys.readouterr().err
    alone = (*given[:2], *given[4:])
    assert predict(*alone, "--out", tmp_path / "q") == 0
    assert "the rig was not used" in capsys.readouterr().err
    assert not json.loads((tmp_path / "q" / "visible_overlay.json").read_text())["alignment"]["applied"]


def test_frames_without_a_partner_are_left_out_and_told(weights, scenes, folders, tmp_path, capsys):
    visible, infrared = folders
    (infrared / "f2.png").unlink()
    given = ("--visible", visible, "--infrared", infrared, "--weights", weights, "--out", tmp_path / "o")
    assert predict(*given, "--stop-on-error") == 2
    assert f"{infrared}: no infrared file for 'f2'" in capsys.readouterr().err
    assert predict(*given) == 3
    captured = capsys.readouterr()
    assert f"{infrared}: no infrared file for 'f2'" in captured.err
    assert "2 frames" in captured.out
    assert len(decoded(tmp_path / "o" / "visible_overlay.mp4")[0]) == 2
    assert len(json.loads((tmp_path / "o" / "visible_overlay.json").read_text())["left_out"]) == 1
    for path in infrared.iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    assert predict(*given, "--overwrite") == 2
    assert "no infrared file for 'f1'; files are paired by name (5 of 5 frames lack one)" in capsys.readouterr().err


def test_a_rig_is_read_for_one_film_too(weights, scenes, tmp_path, capsys):
    heat = films(scenes, tmp_path / "films")[1]
    given = ("--infrared", heat, "--weights", weights, "--out", tmp_path / "o")
    assert predict(*given, "--align", tmp_path / "nope.json") == 2
    assert "nope.json" in capsys.readouterr().err
    assert predict(*given, "--align", "auto") == 2
    assert "heat.mkv: is one film, and --align auto looks at two" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
