"""Clicks on the pictures of a pair: the masks are SAM's own, bad prompts are one line."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from fusionsam.errors import InputError
from fusionsam.inference.interactive import MAX_POINTS, InteractivePair, InteractiveSAM, locate
from fusionsam.inference.predictor import FusionSAM

H, W = 79, 113


@pytest.fixture(scope="module")
def picture():
    return np.asarray(Image.effect_mandelbrot((W, H), (-2, -1, 1, 1), 90)).copy()


@pytest.mark.parametrize("kind", ["sam", "sam2"])
def test_points_box_and_fed_back_mask_reach_the_model_as_its_authors_send_them(request, kind, picture):
    model, folder = request.getfixturevalue(kind)
    ours = InteractiveSAM.from_pretrained(folder)
    encoded = ours.encode(picture)
    points, labels, box = [[17.0, 5.0], [101.0, 70.0]], [1, 0], [11.0, 13.0, 71.0, 53.0]
    first = ours.mask(encoded, points[:1])
    second = ours.mask(encoded, points, labels, box, first.logits[first.best])
    x, y = (64 / W, 64 / H) if kind == "sam2" else (64 / W, round(64 * H / W) / H)
    scale = torch.tensor([x, y])
    given = {
        "image_embeddings": encoded.embeddings if kind == "sam2" else encoded.embeddings[0],
        "input_points": (torch.tensor(points) * scale)[None, None],
        "input_labels": torch.tensor(labels)[None, None],
        "input_boxes": (torch.tensor(box) * scale.repeat(2))[None, None],
        "input_masks": first.logits[first.best][None, None],
        "multimask_output": False,
    }
    with torch.inference_mode():
        wanted = model(**given)
    torch.testing.assert_close(second.logits, wanted.pred_masks[0, 0], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(second.scores, wanted.iou_scores[0, 0].numpy(), atol=1e-5)
    assert first.masks.shape == (3, H, W)
    assert second.masks.shape == (1, H, W)
    for left_out in ({"labels": [1, 1]}, {"box": None}, {"previous": None, "several": False}):  # each of them counts
        asked = {"points": points, "labels": labels, "box": box, "previous": first.logits[first.best], **left_out}
        assert not torch.allclose(ours.mask(encoded, **asked).logits, second.logits, rtol=0, atol=1e-6)


def test_an_answer_has_gradients_where_the_same_click_has_none(sam, picture):
    ours = InteractiveSAM.from_pretrained(sam[1])
    encoded = ours.encode(picture)
    encoded.embeddings = [one.clone() for one in encoded.embeddings]  # tensors of inference know no gradients
    spot, on = torch.tensor([[50.0, 40.0]]), torch.ones(1)
    logits, scores = ours.sam.decode(encoded, spot, on)
    (logits.sum() + scores.sum()).backward()
    assert ours.sam.model.mask_decoder.iou_token.weight.grad.abs().sum() > 0
    clicked = ours.mask(encoded, [[50, 40]])
    assert not clicked.logits.requires_grad
    torch.testing.assert_close(logits.detach(), clicked.logits, rtol=1e-5, atol=1e-5)


def test_arrays_tensors_bytes_and_floats_are_the_same_picture(sam, picture):
    ours = InteractiveSAM.from_pretrained(sam[1])
    wanted = ours.mask(ours.encode(picture), [[50, 40]])
    grey = torch.from_numpy(picture)
    for same in (grey, grey[None], grey.float() / 255, np.dstack([picture] * 3), grey.expand(3, -1, -1)):
        torch.testing.assert_close(ours.mask(ours.encode(same), [[50, 40]]).logits, wanted.logits)
    for wrong in (np.zeros((4, 5, 2), np.uint8), np.full((4, 5), 3.0), np.full((4, 5), np.nan), np.zeros((0, 5))):
        with pytest.raises(InputError, match="picture"):
            ours.encode(wrong)


BAD = {
    "nothing": ({}, "no point and no box"),
    "outside": ({"points": [[W, 3]]}, "outside of the picture"),
    "negative": ({"points": [[5, -0.1]]}, "outside of the picture"),
    "nan": ({"points": [[np.nan, 3]]}, "nan or infinity"),
    "infinite": ({"box": [0, 0, np.inf, 3]}, "nan or infinity"),
    "words": ({"points": [["a", "b"]]}, "no list of numbers"),
    "ragged": ({"points": [[1, 2], [3]]}, "no list of numbers"),
    "three numbers": ({"points": [[1, 2, 3]]}, "2 numbers each"),
    "3,000 points": ({"points": [[1, 1]] * 3000}, f"at most {MAX_POINTS}"),
    "labels short": ({"points": [[1, 1], [2, 2]], "labels": [1]}, "found 1 for 2 points"),
    "label 2": ({"points": [[1, 1]], "labels": [2]}, "expected 1"),
    "label word": ({"points": [[1, 1]], "labels": ["on"]}, "expected 1"),
    "labels alone": ({"labels": [1]}, "without points"),
    "inverted box": ({"box": [9, 3, 4, 8]}, "x0 < x1"),
    "flat box": ({"box": [4, 3, 4, 8]}, "x0 < x1"),
    "box outside": ({"box": [4, 3, W + 1, 8]}, "outside of the picture"),
    "two boxes": ({"box": [[1, 1, 2, 2], [3, 3, 4, 4]]}, "found 2 boxes"),
    "previous of another size": ({"points": [[1, 1]], "previous": torch.zeros(8, 8)}, "previous"),
    "previous nan": ({"points": [[1, 1]], "previous": torch.full((16, 16), torch.nan)}, "previous"),
    "previous bool": ({"points": [[1, 1]], "previous": np.zeros((16, 16), bool)}, "previous"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_prompt_is_one_line_that_says_what_was_expected(sam, picture, name):
    asked, words = BAD[name]
    ours = InteractiveSAM.from_pretrained(sam[1])
    with pytest.raises(InputError, match=words) as caught:
        ours.mask(ours.encode(picture), **asked)
    assert "\n" not in str(caught.value)


def test_a_pair_is_encoded_once_a_picture_even_when_asked_for_in_the_background(sam, picture):
    ours = InteractiveSAM.from_pretrained(sam[1])
    seen, encode = [], ours.encode
    ours.encode = lambda image: (seen.append(image.mean()), encode(image))[1]
    pair = InteractivePair(ours, {"visible": picture, "fused": 255 - picture})
    with ThreadPoolExecutor(2) as pool:
        for on in ("fused", "visible", "fused", "visible"):
            pool.submit(pair.encoded, on)
        answers = [ours.mask(pair.encoded("fused"), [[50, 40]]).logits for _ in range(3)]
    other = ours.mask(pair.encoded("visible"), [[50, 40]]).logits
    assert len(seen) == 2
    torch.testing.assert_close(answers[0], answers[2])
    assert not torch.allclose(answers[0], other, atol=1e-3)
    with pytest.raises(InputError, match="no such picture; choose one of visible, fused"):
        pair.encoded("infrared")
    with pytest.raises(InputError, match="expected one of"):
        InteractivePair(ours, {"depth": picture})


def test_a_picture_that_cannot_be_encoded_says_so_at_every_prompt(sam):
    pair = InteractivePair(InteractiveSAM.from_pretrained(sam[1]), {"visible": np.zeros((3, 4, 5))})
    for _ in range(2):
        with pytest.raises(InputError, match="picture"):
            pair.encoded("visible")


def test_the_weights_that_ship_take_a_bright_disc_by_one_click_and_give_way_to_a_second():
    y, x = np.mgrid[:H, :W]
    disc = (y - 40) ** 2 + (x - 60) ** 2 < 20**2
    drawn = np.where(disc, 220, 40).astype(np.uint8)
    sam = InteractiveSAM.from_pretrained()
    encoded = sam.encode(drawn)
    first = sam.mask(encoded, [[60, 40]])
    ious = [(mask & disc).sum() / (mask | disc).sum() for mask in first.masks]
    assert max(ious) > 0.9
    ground = sam.mask(encoded, [[5, 5]], previous=None)
    assert not ground.masks[ground.best][40, 60]
    boxed = sam.mask(encoded, box=[40, 20, 80, 60], several=False).masks[0]
    assert (boxed & disc).sum() / (boxed | disc).sum() > 0.9


def test_a_name_that_is_no_file_is_told(tmp_path):
    assert locate("sam").is_file()
    with pytest.raises(InputError, match=r"nothere\.pth"):
        InteractiveSAM.from_pretrained(tmp_path / "nothere.pth")


def test_a_session_gives_masks_of_its_pair_on_each_of_its_pictures(sam, picture, make_debug):
    visible, infrared = np.dstack([picture] * 3), 255 - picture
    model = FusionSAM(make_debug(), "debug", {})
    session, ours = model.encode(visible, infrared), InteractiveSAM.from_pretrained(sam[1])
    for on, image in (("visible", visible), ("infrared", infrared), ("fused", session.encoded.fused[0])):
        wanted = ours.mask(ours.encode(image), [[50, 40]])
        found = session.mask([[50, 40]], on=on, sam=ours)
        torch.testing.assert_close(found.logits, wanted.logits)
        assert found.masks.shape == (3, H, W)
        assert session.mask([[50, 40]], on=on, previous=found.logits[0], sam=ours).masks.shape == (1, H, W)
    with pytest.raises(InputError, match="no such picture; choose one of fused, visible"):
        model.encode(visible, None).mask([[1, 1]], on="infrared", sam=ours)
