"""Pairs of a manifest: the results table, going on after a kill, addresses elsewhere, and Ray."""

from __future__ import annotations

import csv
import http.server
import json
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from conftest import build_debug
from fusionsam.cli.main import main
from fusionsam.data import storage
from fusionsam.data.manifests import Listed, read_manifest
from fusionsam.data.storage import Folder
from fusionsam.errors import InputError
from fusionsam.inference import ray_engine, shards
from fusionsam.inference.predictor import FusionSAM
from fusionsam.inference.shards import Shard
from fusionsam.weights.checkpoint import save_checkpoint

BROKEN = 3
SIZES = {0: (64, 64), 1: (72, 80)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Seven pairs of two sizes, of which number BROKEN has a damaged infrared file, and weights."""
    root = tmp_path_factory.mktemp("archive")
    save_checkpoint(root / "weights", build_debug(), {})
    random = np.random.default_rng(0)
    for number in range(7):
        height, width = SIZES[number % 2]
        for camera, shape in (("rgb", (9, 8, 3)), ("th", (9, 8))):
            small = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8))
            small.resize((width, height)).save(root / f"n{number}_{camera}.png")
    (root / f"n{BROKEN}_th.png").write_bytes(b"damaged")
    with (root / "pairs.csv").open("w") as file:
        names = [(f"n{number}_rgb.png", f"n{number}_th.png", f"n{number}") for number in range(7)]
        csv.writer(file).writerows([("visible", "infrared", "id"), *names])
    return root


def predict(archive, out, *more, manifest=None):
    flags = {"--manifest": manifest or archive / "pairs.csv", "--weights": archive / "weights", "--device": "cpu"}
    flags |= {"--out": out, "--shard": 2}
    return main(["predict", *(str(part) for flag in flags.items() for part in flag), *map(str, more)])


def table(out):
    return pq.ParquetDataset(out / "results").read().to_pylist()


def contents(out, *leave_out):
    """Name -> bytes of all files below a folder."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name not in leave_out)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def whole(archive):
    """What one unbroken run writes."""
    out = archive / "whole"
    assert predict(archive, out) == 3
    return out


def one_line(capsys, *said):
    errors = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in errors if line.startswith("fusionsam: error:")]
    assert len(lines) == 1, errors
    assert not any("Traceback" in line for line in errors)
    for text in said:
        assert text in lines[0]


def test_the_table_tells_what_the_pictures_show(archive, whole):
    rows = table(whole)
    assert [row["id"] for row in rows] == [f"n{number}" for number in range(7)]
    assert [row["id"] for row in rows if row["error"]] == [f"n{BROKEN}"]
    assert f"n{BROKEN}_th.png: is not a readable image" in rows[BROKEN]["error"]
    assert (rows[BROKEN]["files"], rows[BROKEN]["confidence"]) == ([], None)
    model = FusionSAM.from_pretrained(archive / "weights", "cpu")
    for number in (0, 1):
        row, expected = rows[number], model.predict(archive / f"n{number}_rgb.png", archive / f"n{number}_th.png")
        labels = np.array(Image.open(whole / row["files"][1]))
        np.testing.assert_array_equal(labels, expected.labels)
        assert (row["height"], row["width"]) == SIZES[number]
        for index, name in enumerate(expected.classes):
            assert row[f"share_{name}"] == pytest.approx(100 * (labels == index).mean(), abs=1e-4)
        assert row["confidence"] == pytest.approx(float(expected.confidence.mean()), abs=1e-4)
        assert all((whole / name).is_file() for name in row["files"])
    # what a folder's run writes, but for the time it took
    assert main(["predict", "--visible", str(archive / "n1_rgb.png"), "--infrared", str(archive / "n1_th.png"), "--out",
                 str(archive / "alone"), "--weights", str(archive / "weights"), "--device", "cpu"]) == 0  # fmt: skip
    assert (archive / "alone/n1_rgb_fused.png").read_bytes() == (whole / "n1_fused.png").read_bytes()
    alone, ours = (json.loads(path.read_text()) for path in (archive / "alone/n1_rgb.json", whole / "n1.json"))
    assert alone.pop("seconds") > 0
    assert {**alone, "name": "n1"} == ours


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_run_that_ends_at_any_write_goes_on_to_the_same_bytes(archive, tmp_path, monkeypatch, batch_size):
    more = ("--batch-size", batch_size)
    assert predict(archive, tmp_path / "whole", *more) == 3
    written, write = [], Folder.write

    def failing(self, name, data):
        written.append(name)
        if len(written) == end:
            raise KeyboardInterrupt
        write(self, name, data)

    out, end = tmp_path / "out", 4
    monkeypatch.setattr(Folder, "write", failing)
    codes = []
    for step in (4, 9, 6, 10_000):
        written, end = [], step
        codes.append(predict(archive, out, *more))
    assert codes == [130, 130, 130, 3]
    assert contents(out) == contents(tmp_path / "whole")
    # what is finished is not made again: the shard with the damaged pair is looked at, the others stay
    written, end = [], 10_000
    assert predict(archive, out, *more) == 3
    assert written == ["results/part-000001.parquet"]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pair_that_failed_is_tried_again(archive, tmp_path, batch_size):
    for path in archive.glob("n*_*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    manifest = tmp_path / "pairs.csv"
    manifest.write_bytes((archive / "pairs.csv").read_bytes())
    more = ("--batch-size", batch_size)
    assert predict(archive, tmp_path / "out", *more, manifest=manifest) == 3
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")}
    Image.open(archive / "n1_th.png").save(tmp_path / f"n{BROKEN}_th.png")
    assert predict(archive, tmp_path / "out", *more, manifest=manifest) == 0
    touched = {name for name in before if (tmp_path / "out" / name).stat().st_mtime_ns != before[name]}
    assert touched <= {"results/part-000001.parquet", *(name for name in before if name.startswith("n2"))}
    assert predict(archive, tmp_path / "new", *more, manifest=manifest) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "new")


def test_other_options_pairs_and_files_are_refused_and_added_rows_are_done(archive, whole, tmp_path, capsys):
    rows = (archive / "pairs.csv").read_text().splitlines()
    manifest = archive / "grows.csv"
    manifest.write_text("\n".join(rows[:4]))
    out = tmp_path / "out"
    assert predict(archive, out, manifest=manifest) == 0
    manifest.write_text("\n".join(rows))
    assert predict(archive, out, manifest=manifest) == 3
    assert contents(out) == contents(whole)
    capsys.readouterr()
    assert predict(archive, out, "--prompts", "none", manifest=manifest) == 2
    one_line(
        capsys,
        "these results were made with another prompts (self, now none); choose another --out, or --overwrite",
    )
    assert predict(archive, out, "--batch-size", 2, manifest=manifest) == 2
    one_line(capsys, "made with another batch size (1, now 2);")
    assert predict(archive, out, "--precision", "bf16", manifest=manifest) == 2
    one_line(capsys, "made with another precision (fp32, now bf16);")
    manifest.write_text("\n".join(rows[:4]))
    assert predict(archive, out, manifest=manifest) == 2
    one_line(capsys, "which the manifest does not list")
    manifest.write_text("\n".join([*rows[:-1], "n0_rgb.png,n0_th.png,n6"]))
    assert predict(archive, out, manifest=manifest) == 2
    one_line(capsys, "n6 is of other files than the manifest lists")
    assert predict(archive, out, "--overwrite", manifest=manifest) == 3
    assert table(out)[6]["visible"].endswith("n0_rgb.png")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/n1_labels.png").write_bytes(b"somebody's")
    assert predict(archive, tmp_path / "theirs") == 2
    one_line(capsys, "n1_labels.png: is there, and no results/_run.json of ours tells of it")


def test_a_run_that_goes_wrong_is_stopped(archive, tmp_path, capsys):
    manifest = archive / "wrong.csv"
    manifest.write_text("visible,infrared\n" + "".join(f"n{i}_rgb.png,absent{i}.png\n" for i in range(7)))
    assert predict(archive, tmp_path / "a", "--max-failure-rate", 0.5, manifest=manifest) == 2
    one_line(capsys, "7 of 7 pairs failed, more than --max-failure-rate 0.5; the first: n0_rgb: ", "absent0.png")
    assert predict(archive, tmp_path / "b", "--max-failure-rate", 0.5) == 3
    capsys.readouterr()
    assert predict(archive, tmp_path / "c", "--stop-on-error") == 2
    one_line(capsys, f"n{BROKEN}_th.png: is not a readable image")


def test_ids_stay_as_rows_are_added_and_patterns_find_pairs(archive, tmp_path):
    rows = "visible,infrared\na/v.png,a/t.png\nb/v.png,b/t.png\n/else/where/v.png,\n"
    (tmp_path / "m.csv").write_text(rows)
    found = read_manifest(str(tmp_path / "m.csv"))
    assert [pair.id for pair in found] == ["v", "b__v", "where__v"]
    assert found[0] == Listed("v", str(tmp_path / "a/v.png"), str(tmp_path / "a/t.png"))
    assert found[2].infrared is None
    pq.write_table(pa.table({"RGB": ["s3://b/x.png"], "thermal": ["y.png"]}), tmp_path / "m.parquet")
    (pair,) = read_manifest(str(tmp_path / "m.parquet"))
    assert pair == Listed("x", "s3://b/x.png", str(tmp_path / "y.png"))
    for day in ("d1", "d2"):
        for name in ("vi/1.png", "ir/1.png", "vi/2.png"):
            path = tmp_path / "set" / day / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    found = read_manifest(f"{tmp_path}/set/**/*.png", ("vi/{id}", "ir/{id}.png"))
    assert [pair.id for pair in found] == ["d1__1", "d1__2", "d2__1", "d2__2"]
    assert found[0] == Listed("d1__1", f"{tmp_path}/set/d1/vi/1.png", f"{tmp_path}/set/d1/ir/1.png")
    assert found[1].infrared is None
    assert found[1].alone == f"{tmp_path}/set/**/*.png: no infrared file for 'd1__2'; files are paired by --match"


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_a_file_that_both_patterns_fit_is_of_the_one_that_says_more(tmp_path, capsys):
    touch(tmp_path, "a.png", "a_th.png", "b_th.jpg", "b.png", "._a.png", "notes.txt")
    found = read_manifest(f"{tmp_path}/*", ("{id}", "{id}_th"))
    assert found == [
        Listed(n, f"{tmp_path}/{n}.png", f"{tmp_path}/{n}_th.{end}") for n, end in (("a", "png"), ("b", "jpg"))
    ]
    assert (
        capsys.readouterr().err == f"{tmp_path}/*: left aside, of no pattern of --match: 1 files, the first notes.txt\n"
    )
    assert (
        read_manifest(f"{tmp_path}/*.png", ("{id}.png", "{id}_th"))[0] == found[0]
    )  # an ending says less than letters
    touch(tmp_path, "c_a_b.png")
    with pytest.raises(InputError, match=r"c_a_b\.png: fits both patterns of --match c_{id} {id}_b alike; write more"):
        read_manifest(f"{tmp_path}/*.png", ("c_{id}", "{id}_b"))


def test_endings_in_the_patterns_tell_the_cameras_apart(tmp_path):
    touch(tmp_path, "a.JPG", "a.png", "b.jpg", "b.png")
    found = read_manifest(f"{tmp_path}/*", ("{id}.jpg", "{id}.png"))
    assert found[0] == Listed("a", f"{tmp_path}/a.JPG", f"{tmp_path}/a.png")
    assert [pair.id for pair in found] == ["a", "b"]
    with pytest.raises(InputError, match=r"are both the visible file of 'a'; put the ending into the pattern"):
        read_manifest(f"{tmp_path}/*", ("{id}", "{id}_th"))


def test_folders_and_names_that_make_one_id_are_refused(tmp_path):
    touch(tmp_path, "a/x_v.png", "a/x_t.png", "a__x_v.png", "a__x_t.png")
    with pytest.raises(InputError, match=r"a/x and a__x would both be named 'a__x' in the results; rename one of them"):
        read_manifest(f"{tmp_path}/**/*.png", ("{id}_v", "{id}_t"))
    (tmp_path / "a__x_v.png").unlink()
    (tmp_path / "a/x_t.png").unlink()
    with pytest.raises(InputError, match="would both be named 'a__x'"):  # the two are no pair
        read_manifest(f"{tmp_path}/**/*.png", ("{id}_v", "{id}_t"))


def test_cameras_alone_in_a_pattern_fail_until_their_partner_comes(archive, tmp_path, capsys):
    for name in ("n0_rgb.png", "n0_th.png", "n1_rgb.png", "n2_RGB.png"):
        (tmp_path / name).write_bytes((archive / name.lower()).read_bytes())
    match = ("--match", "{id}_rgb", "{id}_th")
    assert predict(archive, tmp_path / "out", *match, manifest=f"{tmp_path}/*.png") == 3
    told = capsys.readouterr().err
    assert f"n1: {tmp_path}/*.png: no infrared file for 'n1'; files are paired by --match" in told
    assert "of no pattern of --match: 1 files, the first n2_RGB.png" in told
    assert [(row["id"], row["error"] is None) for row in table(tmp_path / "out")] == [("n0", True), ("n1", False)]
    assert not (tmp_path / "out/n1_labels.png").exists()
    (tmp_path / "n1_th.png").write_bytes((archive / "n1_th.png").read_bytes())
    assert predict(archive, tmp_path / "out", *match, manifest=f"{tmp_path}/*.png") == 0
    assert [row["error"] for row in table(tmp_path / "out")] == [None, None]
    (tmp_path / "n0_th.png").rename(tmp_path / "m_th.png")
    (tmp_path / "n1_th.png").unlink()
    assert predict(archive, tmp_path / "new", *match, manifest=f"{tmp_path}/*.png") == 2
    one_line(capsys, "no visible file for 'm'; files are paired by --match (all 3 lack one); write the patterns as")


@pytest.mark.parametrize(
    ("name", "said"),
    [("\udcff", "is not UTF-8; rename it"), ("y" * 241, "_rgb.png: id 'y+'... has 241 bytes, expected at most 240")],
)
def test_a_name_that_no_result_can_have_is_told_before_the_run(tmp_path, name, said):
    touch(tmp_path, "a_rgb.png", "a_th.png", f"{'x' * 240}_rgb.png", f"{'x' * 240}_th.png")
    match = ("{id}_rgb", "{id}_th")
    assert len(read_manifest(f"{tmp_path}/*.png", match)) == 2
    touch(tmp_path, f"{name}_rgb.png")
    with pytest.raises(InputError, match=said):
        read_manifest(f"{tmp_path}/*.png", match)


@pytest.mark.parametrize(
    ("content", "match", "said"),
    [
        (None, (), "no such manifest"),
        ("a,b\n1,2\n", (), "expected visible, infrared (or radiometric) and perhaps id"),
        ("visible,infrared\n", (), "lists no pair"),
        ("visible,infrared\n,\n", (), "row 1 names neither"),
        ("visible,radiometric\na.png,b.jpg\n", (), "row 1 names a radiometric file, which holds both pictures, and"),
        ("visible,id\na.png,1\nb.png,1\n", (), "id '1' occurs more than once"),
        ("visible,id\na.png,../1\n", (), "is no file name"),
        ("visible,id\na.png,1\nb.png,2\0\n", (), r"row 2: id '2\x00' is no file name"),
        ("visible\na.png\nb\0.png\n", (), "row 2: the path "),
        (
            f"visible,id\na.png,1\nb.png,{'é' * 121}\n",
            (),
            "row 2: id 'éééééééééééééééééééééééééééééé'... has 242 bytes",
        ),
        ("*", (), "name the two files of a pair by --match"),
        ("*", ("{id}_a", "{id}"), "no file fits '{id}_a', the visible pattern of --match (there is no picture)"),
        ("*", ("a", "{id}"), "expected two patterns"),
    ],
)
def test_a_manifest_that_lists_nothing_is_told_in_one_line(tmp_path, content, match, said):
    manifest = tmp_path / ("*.png" if content == "*" else "m.csv")
    if content not in (None, "*"):
        manifest.write_text(content)
    with pytest.raises(InputError) as caught:
        read_manifest(str(manifest), match)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value) or "--match" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--manifest", "gs://b/m.csv"), "gs:// needs another package; pip install 'gcsfs'"),
        (("--manifest", "nothing://b/m.csv"), "no address that fsspec knows"),
        (("--manifest", "http://127.0.0.1:9/m.csv"), "http://127.0.0.1:9/m.csv: cannot be read"),
        (("--visible", "a.png", "--engine", "ray"), "--engine: is of a table of pairs; give --manifest with it"),
        (("--manifest", "m.csv", "--workers", "2"), "--workers: is of --engine ray"),
        (("--manifest", "m.csv", "--batch-size", "0"), "--batch-size 0: expected at least 1"),
        (("--manifest", "m.csv", "--max-failure-rate", "5"), "expected a share from 0 to 1"),
        (("--manifest", "m.csv", "--match", "{id}_a", "{id}_b"), "--match: is of folders"),
    ],
)
def test_requests_that_cannot_be_met_end_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert main(["predict", *flags, "--out", "o"]) == 2
    one_line(capsys, said)


def test_addresses_of_other_machines_are_for_tables_alone(archive, capsys):
    pair = ("--visible", str(archive / "n0_rgb.png"), "--infrared", str(archive / "n0_th.png"))
    assert main(["predict", *pair, "--out", "s3://b/o", "--weights", str(archive / "weights")]) == 2
    one_line(capsys, "--out s3://b/o: is for --manifest")


@pytest.fixture(scope="module")
def s3(archive):
    """The pictures and the manifest in a bucket of a server on this machine."""
    moto = pytest.importorskip("moto.server", reason="needs moto[server], of the extra dev")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs, of the extra s3")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1,localhost,0.0.0.0",
        }.items():
            patch.setenv(name, value)
        files = s3fs.S3FileSystem(skip_instance_cache=True)
        files.mkdir("bucket")
        for path in [*archive.glob("n*.png"), archive / "pairs.csv"]:
            files.pipe_file(f"bucket/in/{path.name}", path.read_bytes())
        yield files
    server.stop()


def test_pictures_manifest_and_results_may_lie_in_a_bucket(archive, whole, s3, tmp_path, capsys):
    assert predict(archive, "s3://bucket/out", manifest="s3://bucket/in/pairs.csv") == 3
    stored = {name.removeprefix("bucket/out/"): s3.cat_file(name) for name in s3.find("bucket/out")}
    ours = contents(whole)
    assert stored.keys() == ours.keys()
    for name in ours:
        if name.endswith(".png"):
            assert stored[name] == ours[name]
    told = json.loads(stored["n1.json"])
    assert told["run"]["visible"] == ["s3://bucket/in/n1_rgb.png", (archive / "n1_rgb.png").stat().st_size, None]
    rows = pq.read_table("bucket/out/results", filesystem=s3).to_pylist()
    assert [row["id"] for row in rows] == [f"n{number}" for number in range(7)]
    assert rows[BROKEN]["error"].startswith("s3://bucket/in/n3_th.png: is not a readable image")
    assert rows[1]["confidence"] == table(whole)[1]["confidence"]
    capsys.readouterr()
    assert predict(archive, "s3://bucket/out", manifest="s3://bucket/in/pairs.csv") == 3
    assert "6 of 7 pairs were already in s3://bucket/out/results" in capsys.readouterr().err
    match = ("--match", "{id}_rgb", "{id}_th")
    assert predict(archive, tmp_path / "o", *match, manifest="s3://bucket/in/*.png") == 3
    for name in (name for name in ours if name.endswith(".png")):
        assert (tmp_path / "o" / name).read_bytes() == ours[name]
    assert predict(archive, "s3://bucket/in", *match, manifest="s3://bucket/in/*.png") == 2
    one_line(capsys, "is where s3://bucket/in/*.png looks for inputs")


def test_buckets_that_cannot_be_used_are_told_in_one_line(archive, s3, monkeypatch, capsys):
    assert predict(archive, "s3://absent/out") == 2
    one_line(capsys, "s3://absent/out")
    assert predict(archive, "s3://bucket/o", manifest="s3://bucket/absent.csv") == 2
    one_line(capsys, "s3://bucket/absent.csv: no such file, folder or bucket")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    type(s3).clear_instance_cache()
    assert predict(archive, "s3://bucket/o2", manifest="s3://bucket/in/pairs.csv") == 2
    one_line(capsys, "s3://bucket/in/pairs.csv: cannot be read", "credentials")
    type(s3).clear_instance_cache()


def test_manifest_and_pictures_may_come_over_http(archive, whole, tmp_path):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(archive))
    handler.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert predict(archive, tmp_path, manifest=f"http://127.0.0.1:{server.server_port}/pairs.csv") == 3
    finally:
        server.shutdown()
    assert [row["id"] for row in table(tmp_path)] == [f"n{number}" for number in range(7)]
    for path in whole.glob("*.png"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_ray_that_is_not_installed_is_named(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert predict(archive, tmp_path, "--engine", "ray") == 2
    one_line(capsys, "--engine ray: Ray is not installed; pip install 'fusionsam[ray]'")


def test_a_worker_of_ray_does_as_the_local_one(archive, whole, tmp_path, monkeypatch):
    requests: list[tuple[bytes, str, list[Shard]]] = []

    def work(request, out, shards):  # what Ray would be given, pickled
        requests.append((pickle.dumps(request), out, shards))
        worker = ray_engine.RayWorker(pickle.dumps(request), out)
        for shard in reversed(shards):
            yield pickle.loads(worker({"shard": ray_engine.packed(shard)})["done"])

    monkeypatch.setattr(ray_engine, "work", work)
    monkeypatch.chdir(archive)
    flags = ("--engine", "ray", "--weights", "weights")
    assert predict(archive, tmp_path / "out", *flags, manifest=Path("pairs.csv")) == 3
    assert contents(tmp_path / "out") == contents(whole)
    request, out, shards = requests[0]
    copy = pickle.loads(request)
    elsewhere = ray_engine.RayWorker(pickle.dumps(replace(copy, settings={**copy.settings, "weights": "others"})), out)
    assert (
        "differ from machine to machine"
        in pickle.loads(elsewhere({"shard": ray_engine.packed(shards[0])})["done"]).fatal
    )


@pytest.mark.slow
def test_two_workers_of_ray_write_the_same_bytes(archive, whole, tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="needs Ray, of the extra ray")
    monkeypatch.chdir(archive)
    assert predict(archive, tmp_path, "--engine", "ray", "--workers", 2, manifest=Path("pairs.csv")) == 3
    assert contents(tmp_path) == contents(whole)


@pytest.mark.slow
def test_an_archive_that_is_killed_comes_out_whole():
    pytest.importorskip("ray", reason="needs Ray, of the extra ray")
    script = Path(__file__).parents[1] / "benchmarks/archive.py"
    given = ["--pairs", "60", "--large", "1", "--kills", "2", "--shard", "8"]
    done = subprocess.run([sys.executable, script, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"bytes_equal_to_local": true' in done.stdout


def test_patterns_that_begin_with_a_star_find_all(tmp_path, monkeypatch):
    for name in ("*a_rgb.png", "b_rgb.png", "deep/c_rgb.png", "deep/er/d_rgb.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for pattern, count in (("*.png", 2), ("*_rgb.png", 2), ("*/*.png", 1), ("**/*.png", 4), ("./**/*_rgb.png", 4)):
        assert len(storage.find(pattern)) == count, pattern
        assert len(storage.find(f"{tmp_path}/{pattern}")) == count


def test_a_name_that_begins_with_a_tilde_is_a_name():
    assert storage.local_path("~nobody-of-that-name/x.png") == Path("~nobody-of-that-name/x.png")
    assert storage.local_path("~/x.png") == Path.home() / "x.png"


def test_copies_of_remote_files_go_by_their_address_in_json_too(tmp_path):
    copy = tmp_path / "größe.png"
    pair = Listed("x", "s3://bucket/größe.png", None, None)
    read = shards._Coming(pair, {"visible": copy})
    notice = f"{copy}: was turned"
    assert shards._by_address(notice, read) == "s3://bucket/größe.png: was turned"
    told = json.loads(shards._by_address(json.dumps({"notices": [notice]}), read, in_json=True))
    assert told == {"notices": ["s3://bucket/größe.png: was turned"]}
