"""LSTG: nearest codebook entries, straight-through gradients, eq. 6, absent modalities and the variants."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from fusionsam.config.schema import TokenizerConfig, preset
from fusionsam.errors import InputError
from fusionsam.models.autoencoder import PixelPatches
from fusionsam.models.network import FusionSAMNetwork
from fusionsam.models.tokenizer import Quantizer, ScalarQuantizer, Tokenizer, _nearest

SMALL = {"dim": 12, "width": 8, "blocks": 1, "codebook_size": 19, "codebook_dim": 6}
# plain = no projection: latents are compared as they are
PLAIN = {"dim": 2, "codebook_dim": 2, "codebook_size": 2, "kmeans_init": False, "dead_code_threshold": 0.0}


def tokenizer(**changes) -> Tokenizer:
    torch.manual_seed(3)
    return Tokenizer(TokenizerConfig(**{**SMALL, **changes}))


def hand_made(**changes) -> Quantizer:
    """Entries (0,0) and (1,1), compared without projection."""
    quantizer = Quantizer(TokenizerConfig(**{**PLAIN, **changes}))
    for table in (quantizer.codebook.data, quantizer.vq._codebook.embed_avg):
        table.copy_(torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))
    return quantizer


# tokens (0.9, 0.8) next to (1,1) and (0.1, -0.2) next to (0,0); squared distances .01+.04 each, mean .025
TOKENS = torch.tensor([[0.9, 0.1], [0.8, -0.2]]).reshape(1, 2, 1, 2)
ENTRIES = torch.tensor([[1.0, 0.0], [1.0, 0.0]]).reshape(1, 2, 1, 2)


@pytest.mark.parametrize(("codebooks", "width"), [(1, 6), (3, 6), (2, 12), (1, 12)])
def test_codes_are_the_nearest_entries(codebooks, width):
    torch.manual_seed(0)
    quantizer = Quantizer(TokenizerConfig(**{**SMALL, "codebooks": codebooks, "codebook_dim": width}))
    z = torch.randn(2, 12, 3, 5)
    with torch.no_grad():
        quantizer.train()(z)
        grid, codes, _ = quantizer.eval()(z)
        books = quantizer.codebook
        for b, y, x in [(b, y, x) for b in range(2) for y in range(3) for x in range(5)]:
            token = quantizer.vq.project_in(z[b, :, y, x])
            chosen = []
            for index, part in enumerate(token.split(width // codebooks)):
                distances = [float((part - entry).square().sum()) for entry in books[index]]
                assert codes[b, y, x, index] == distances.index(min(distances))
                chosen.append(books[index][codes[b, y, x, index]])
            torch.testing.assert_close(grid[b, :, y, x], quantizer.vq.project_out(torch.cat(chosen)))
        torch.testing.assert_close(quantizer.embed(codes), grid)


def test_of_two_entries_as_near_the_first_is_taken_and_nan_takes_one_that_exists():
    tokens = torch.tensor([[0.5], [2.0], [float("nan")]])
    assert _nearest(tokens, torch.tensor([[3.0], [1.0], [0.0], [1.0]])).tolist() == [1, 0, 0]
    torch.manual_seed(0)
    many = torch.randn(3000, 4)
    book = torch.randn(300, 4)
    assert torch.equal(_nearest(many, book), torch.cdist(many, book).argmin(-1))


@pytest.mark.parametrize("quantizer", ["vq", "fsq"])
def test_mixed_precision_chooses_the_same_codes(quantizer):
    lstg = tokenizer(quantizer=quantizer, codebook_size=256)
    image = torch.rand(2, 3, 32, 32)
    lstg.train()(image, None)
    lstg.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        z = lstg.encoders[0](image)
        _, codes, _ = lstg.encode(0, image)
    assert z.dtype == torch.bfloat16
    with torch.no_grad():
        _, nearest, _ = lstg.quantizers[0](z.float())
    assert torch.equal(codes, nearest)
    assert len(codes.unique()) > 20


@pytest.mark.parametrize("codebooks", [1, 3])
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_training_path_and_look_up_agree(codebooks, update):
    torch.manual_seed(1)
    config = TokenizerConfig(**{**SMALL, "codebooks": codebooks, "codebook_update": update, "kmeans_init": False})
    quantizer = Quantizer(config)
    z = torch.randn(2, 12, 5, 7, requires_grad=True)
    looked_up = quantizer.eval()(z)
    trained = quantizer.train()(z)
    for name, one, two in zip(("grid", "codes", "commitment"), looked_up, trained, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_straight_through_gradient_is_the_identity():
    quantizer = hand_made().train()
    z = TOKENS.clone().requires_grad_()
    grid, codes, _ = quantizer(z)
    torch.testing.assert_close(grid, ENTRIES)
    assert codes.flatten().tolist() == [1, 0]
    weights = torch.tensor([2.0, -3.0, 5.0, 7.0]).reshape(1, 2, 1, 2)
    (grid * weights).sum().backward()
    torch.testing.assert_close(z.grad, weights)


@pytest.mark.parametrize("training", [True, False])
def test_commitment_by_hand(training):
    # EMA moves the entries, so eq. 6 has only its second term: 0.25 * 0.025
    z = TOKENS.clone().requires_grad_()
    _, _, commitment = hand_made().train(training)(z)
    assert commitment.item() == pytest.approx(0.00625)
    commitment.backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (TOKENS - ENTRIES) / 4)


@pytest.mark.parametrize("training", [True, False])
def test_commitment_by_gradient_pulls_each_side_with_its_own_weight(training):
    quantizer = hand_made(codebook_update="gradient").train(training)
    z = TOKENS.clone().requires_grad_()
    _, _, commitment = quantizer(z)
    assert commitment.item() == pytest.approx(1.25 * 0.025)
    commitment.backward()
    torch.testing.assert_close(z.grad, 0.25 * 2 * (TOKENS - ENTRIES) / 4)
    # entry 0 chosen by (0.1,-0.2), entry 1 by (0.9, 0.8): 2 (entry - token) / 4
    torch.testing.assert_close(quantizer.codebook.grad, torch.tensor([[[-0.05, 0.1], [0.05, 0.1]]]))


def test_an_entry_that_no_token_needs_is_replaced_by_a_token():
    quantizer = hand_made(ema_decay=0.5, dead_code_threshold=0.2).train()
    far = torch.full_like(quantizer.codebook[0, 0], 50.0)
    quantizer.codebook.data[0, 0] = quantizer.vq._codebook.embed_avg.data[0, 0] = far
    tokens = TOKENS + torch.tensor([[0.0, 0.8], [0.0, 1.2]]).reshape(1, 2, 1, 2)  # both next to (1, 1)
    for _ in range(2):  # its count falls from 1 to 0.5 and 0.25
        quantizer(tokens)
    torch.testing.assert_close(quantizer.codebook[0, 0], far, rtol=1e-3, atol=0)
    quantizer(tokens)
    moved = quantizer.codebook[0, 0]
    assert min(float((moved - token).abs().max()) for token in tokens[0].flatten(1).T) < 1e-4


def test_a_codebook_begins_with_the_means_of_its_first_batch():
    torch.manual_seed(4)
    quantizer = Quantizer(TokenizerConfig(**{**PLAIN, "kmeans_init": True})).train()
    means = torch.tensor([[-3.0, 2.0], [5.0, 1.0]])
    tokens = (means[:, None] + 0.1 * torch.randn(2, 40, 2)).flatten(0, 1)
    quantizer(tokens.T.reshape(1, 2, 8, 10))
    found = quantizer.codebook[0][quantizer.codebook[0, :, 0].argsort()]
    torch.testing.assert_close(found, means, rtol=0, atol=0.1)


def test_ema_moves_entries_towards_their_tokens():
    quantizer = hand_made(ema_decay=0.5).train()
    quantizer(TOKENS)
    # counts and sums begin at one entry each: 0.5 * entry + 0.5 * token
    torch.testing.assert_close(quantizer.codebook, torch.tensor([[[0.05, -0.1], [0.95, 0.9]]]), rtol=1e-3, atol=1e-3)


def test_an_absent_image_is_its_learned_token():
    lstg = tokenizer().train()
    visible, infrared = torch.rand(2, 3, 20, 28), torch.rand(2, 1, 20, 28)
    alone = lstg(visible, None)
    assert alone.infrared_codes is None
    torch.testing.assert_close(alone.infrared, lstg.missing[1][None, :, None, None].expand(2, 12, 5, 7))
    alone.infrared.sum().backward()
    torch.testing.assert_close(lstg.missing.grad, torch.tensor([[0.0] * 12, [2.0 * 5 * 7] * 12]))

    lstg.eval()
    mixed = lstg(visible, infrared, torch.tensor([[True, False], [False, True]]))
    torch.testing.assert_close(mixed.visible[:1], lstg(visible[:1], None).visible)
    torch.testing.assert_close(mixed.infrared[1:], lstg(None, infrared[1:]).infrared)
    torch.testing.assert_close(mixed.visible[1], lstg.missing[0][:, None, None].expand(12, 5, 7))
    assert torch.equal(mixed.visible_codes[:1], lstg(visible[:1], None).visible_codes)
    assert (mixed.visible_codes[1] == -1).all()
    assert (mixed.infrared_codes[0] == -1).all()
    with pytest.raises(InputError, match="both None"):
        lstg(None, None)


def test_codebooks_never_learn_from_blank_frames():
    start = tokenizer().train()
    visible, infrared = torch.rand(3, 3, 20, 28), torch.rand(3, 1, 20, 28)
    present = torch.tensor([[True, True], [True, False], [True, True]])
    states = []
    for blank in (infrared, torch.where(present[:, 1, None, None, None], infrared, 0.7)):
        lstg = copy.deepcopy(start)
        torch.manual_seed(5)
        lstg(visible, blank, present)
        states.append(lstg.state_dict())
    moved = [n for n in states[0] if not torch.equal(states[0][n], start.state_dict()[n])]
    assert "quantizers.1.vq._codebook.embed" in moved
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    # nothing there at all: nothing learned at all
    untouched = copy.deepcopy(start)
    untouched(None, infrared, torch.tensor([[False, False]] * 3))
    for name, value in untouched.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name


@pytest.mark.parametrize("kind", [{}, {"codebook_tokens": 16}, {"codebook_update": "gradient"}, {"quantizer": "fsq"}])
def test_nothing_is_learned_of_cells_that_a_camera_does_not_reach(kind):
    start = tokenizer(**kind).train()
    # an encoder whose cells see their own pixels alone: what is seen beyond the border is another matter
    start.encoders = torch.nn.ModuleList(PixelPatches(channels, 12) for channels in (3, 1))
    visible, infrared = torch.rand(3, 3, 20, 28), torch.rand(3, 1, 20, 28)
    cells = torch.rand(3, 2, 5, 7) < 0.6
    cells[1, 1] = False
    here = cells[:, 1:].repeat_interleave(4, 2).repeat_interleave(4, 3)
    for present in (None, torch.tensor([[True, True], [True, True], [True, False]])):
        learnt = []
        for other in (infrared, torch.where(here, infrared, 9.0)):
            lstg = copy.deepcopy(start)
            torch.manual_seed(5)
            for _ in range(3):  # k-means, then moving averages
                found = lstg(visible, other, present, cells)
            (found.commitment + found.infrared.square().mean()).backward()
            learnt.append({**lstg.state_dict(), **{n: p.grad for n, p in lstg.named_parameters()}})
        for name, value in learnt[0].items():
            assert value is learnt[1][name] is None or torch.equal(value, learnt[1][name]), name
    nowhere = copy.deepcopy(start)
    found = nowhere(visible, infrared, None, torch.zeros_like(cells))
    assert found.commitment.item() == 0
    for name, value in nowhere.state_dict().items():
        assert torch.equal(value, start.state_dict()[name]), name


def test_the_infrared_codebook_does_not_move_with_visible_pixels_out_of_its_reach():
    torch.manual_seed(3)
    start = FusionSAMNetwork(preset("debug")).train()
    tokens = start.config.tokenizer
    start.tokenizer.encoders = torch.nn.ModuleList(PixelPatches(channels, tokens.dim) for channels in (3, 1))
    visible, infrared = torch.rand(2, 3, 64, 96), torch.rand(2, 1, 64, 96)
    covered = torch.ones(2, 2, 64, 96, dtype=torch.bool)
    covered[:, 1, :, 40:] = False
    books = []
    for other in (visible, torch.where(covered[:, 1:], visible, 1 - visible)):
        network = copy.deepcopy(start)
        torch.manual_seed(5)
        for _ in range(2):
            network.sources(other, infrared, covered=covered)
        books.append(network.tokenizer.quantizers)
    assert torch.equal(books[0][1].codebook, books[1][1].codebook)
    assert not torch.equal(books[0][0].codebook, books[1][0].codebook)  # its own camera saw them


def test_shared_codebook_is_one_codebook():
    own, shared = tokenizer(), tokenizer(shared_codebook=True)
    assert own.quantizers[0] is not own.quantizers[1]
    assert shared.quantizers[0] is shared.quantizers[1]
    visible, infrared = torch.rand(2, 3, 20, 28), torch.rand(2, 1, 20, 28)
    with torch.no_grad():
        shared.train()(visible, infrared)
        latents = shared.eval()(visible, infrared)
    torch.testing.assert_close(shared.quantizers[0].embed(latents.infrared_codes), latents.infrared)


def test_continuous_tokens_are_the_encoders():
    lstg = tokenizer(tokens="continuous").eval()
    image = torch.rand(1, 3, 20, 28)
    latents = lstg(image, torch.rand(1, 1, 20, 28))
    assert torch.equal(latents.visible, lstg.encoders[0](image))
    assert latents.visible_codes is None
    assert latents.commitment == 0
    assert not any("vq" in name for name in lstg.state_dict())


def test_pixel_tokens_are_one_linear_map_of_a_patch():
    lstg = tokenizer(tokens="pixels")
    image = torch.rand(2, 3, 20, 28)
    grid = lstg(image, None).visible
    patch = 2 * image[1, :, 8:12, 20:24] - 1  # cell (2, 5)
    weight, bias = lstg.encoders[0].embed.weight, lstg.encoders[0].embed.bias
    torch.testing.assert_close(grid[1, :, 2, 5], weight.flatten(1) @ patch.flatten() + bias)
    with pytest.raises(InputError, match=r"model\.tokenizer\.tokens.*pixels.*decoder"):
        lstg.reconstruct(0, grid)


def test_finite_scalar_quantisation():
    torch.manual_seed(2)
    quantizer = ScalarQuantizer(TokenizerConfig(**{**SMALL, "codebook_size": 239, "quantizer": "fsq"}))
    assert quantizer.size == 8 * 6 * 5
    z = (3 * torch.randn(2, 12, 5, 7)).requires_grad_()
    grid, codes, commitment = quantizer(z)
    assert commitment == 0
    assert codes.min() >= 0
    assert codes.max() < quantizer.size
    torch.testing.assert_close(quantizer.fsq.indices_to_codes(codes[..., 0]), grid)
    assert len(codes.unique()) > 10
    grid.sum().backward()
    assert z.grad.abs().max() > 0
    with pytest.raises(InputError, match=r"model\.tokenizer\.codebook_size: 20000"):
        ScalarQuantizer(TokenizerConfig(codebook_size=20000))


@pytest.mark.parametrize(("asked", "made"), [(256, 240), (1024, 1000), (4096, 4375), (8192, 4375), (8400, 15360)])
def test_the_levels_of_scalar_quantisation_are_those_nearest_to_what_was_asked(asked, made):
    assert ScalarQuantizer(TokenizerConfig(codebook_size=asked)).size == made


def test_scalar_quantisation_starts_from_the_first_batch_of_a_training_and_only_there():
    torch.manual_seed(3)
    z = 0.01 * torch.randn(2, 64, 24, 24) + 0.5  # as a new encoder gives them: close together, off centre
    started, plain = ScalarQuantizer(TokenizerConfig()), ScalarQuantizer(TokenizerConfig(kmeans_init=False))
    untouched = started.fsq.project_in.weight.clone()
    started.eval()(z)
    assert torch.equal(started.fsq.project_in.weight, untouched)
    used = {name: len(q.train()(z)[1].unique()) for name, q in (("started", started), ("plain", plain))}
    assert used["started"] > 300 > 30 > used["plain"]
    x = started.fsq.project_in(z.flatten(2).transpose(1, 2)).flatten(0, 1)
    torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(x.std(0), torch.ones(4), atol=1e-3, rtol=0)
    kept = started.fsq.project_in.weight.clone()
    started(5 * z)  # a later batch starts nothing again, nor does a checkpoint that was loaded
    loaded = ScalarQuantizer(TokenizerConfig())
    loaded.load_state_dict(started.state_dict())
    loaded.train()(5 * z)
    assert torch.equal(started.fsq.project_in.weight, kept)
    assert torch.equal(loaded.fsq.project_in.weight, kept)


def test_codebooks_must_divide_the_widths():
    with pytest.raises(InputError, match=r"model\.tokenizer\.codebooks: 5 .* 12 "):
        Quantizer(TokenizerConfig(**{**SMALL, "codebooks": 5}))


@pytest.mark.parametrize("index", [0, 1])
def test_one_image_is_learned_by_heart(index):
    torch.manual_seed(0)
    lstg = Tokenizer(TokenizerConfig(dim=16, width=8, blocks=1, codebook_size=32, codebook_dim=8)).train()
    y, x = torch.meshgrid(torch.linspace(0, 1, 20), torch.linspace(0, 1, 28), indexing="ij")
    image = torch.stack([y, x, (y > x).float()])[None, : lstg.CHANNELS[index]]
    optimiser = torch.optim.Adam(lstg.parameters(), lr=5e-3)

    def step() -> float:
        latents, _, commitment = lstg.encode(index, image)
        rebuilt = lstg.reconstruct(index, latents)
        assert rebuilt.shape == image.shape
        error = F.mse_loss(rebuilt, image)
        optimiser.zero_grad()
        (error + 0.25 * commitment).backward()
        optimiser.step()
        return -10 * error.log10().item()

    first = step()
    for _ in range(60):
        last = step()
    assert last > first + 8
    assert last > 18
