"""LSTG, latent space token generation (eq. 2-9): one VQ autoencoder a modality."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ, VectorQuantize

from fusionsam.config.schema import TokenizerConfig
from fusionsam.models.autoencoder import Decoder, Encoder, PixelPatches
from fusionsam.types import InputError, Latents

AT_ONCE = 1024
"""Tokens compared with a codebook at a time: their distances stay in a processor's cache, a third of the time."""


class Quantizer(nn.Module):
    """Quant of eq. 3 with straight-through gradient and the commitment term of eq. 6.

    The library's VectorQuantize keeps the codebook (EMA updates, k-means start, dead-code restart) while training; a
    plain nearest-neighbour look-up on the same codebook serves always, which traces and exports.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        if config.dim % config.codebooks or config.codebook_dim % config.codebooks:
            raise InputError(
                f"model.tokenizer.codebooks: {config.codebooks} must divide model.tokenizer.dim {config.dim} and "
                f"model.tokenizer.codebook_dim {config.codebook_dim}"
            )
        self.size = config.codebook_size
        self.beta = config.commitment_beta
        self.sample = config.codebook_tokens
        gradient = config.codebook_update == "gradient"
        self.learnable = gradient
        self.vq = VectorQuantize(
            dim=config.dim,
            codebook_size=config.codebook_size,
            codebook_dim=config.codebook_dim // config.codebooks,
            heads=config.codebooks,
            separate_codebook_per_head=config.codebooks > 1,
            decay=config.ema_decay,
            kmeans_init=config.kmeans_init,
            threshold_ema_dead_code=0 if gradient else config.dead_code_threshold,
            accept_image_fmap=False,
            rotation_trick=False,  # the paper's plain straight-through estimator
            ema_update=not gradient,
            learnable_codebook=gradient,
            commitment_weight=1.0,
        )

    @property
    def codebook(self) -> Tensor:
        """(codebooks, codebook_size, width) entries."""
        return self.vq._codebook.embed

    def forward(
        self, z: Float[Tensor, "B d h w"], there: Bool[Tensor, "B h w"] | None = None
    ) -> tuple[Float[Tensor, "B d h w"], Int[Tensor, "B h w codebooks"], Float[Tensor, ""]]:
        """z (B,d,h,w) -> quantised (B,d,h,w), codes (B,h,w,codebooks), commitment (scalar). The codebook learns, and
        the commitment is, of the cells that are `there`, all unless it is given."""
        batch, _, height, width = z.shape
        tokens = z.flatten(2).transpose(1, 2)
        there = None if there is None else there.flatten(1)
        begun = bool(self.vq._codebook.initted) if self.training else True
        if not begun:
            self._learn(tokens, there)
        quantised, codes, commitment = self.look_up(tokens, there)
        if self.training and begun and not self.learnable:
            self._learn(tokens, there)
        grid = quantised.transpose(1, 2).reshape(z.shape)
        return grid, codes.reshape(batch, height, width, -1), commitment

    @torch.no_grad()
    def _learn(self, tokens: Tensor, there: Tensor | None) -> None:
        """Library's k-means start, EMA update and dead-code restart on a random sample of the tokens (B,N,d) that are
        `there` (B,N): on all of them its distances and one-hot counts took a quarter of a training step."""
        flat = tokens.detach().flatten(0, 1) if there is None else tokens.detach()[there]
        if not len(flat):
            return
        if 0 < self.sample < len(flat):
            flat = flat[torch.randint(len(flat), (self.sample,), device=flat.device)]
        self.vq(flat[None])

    def look_up(
        self, tokens: Float[Tensor, "B N d"], there: Bool[Tensor, "B N"] | None = None
    ) -> tuple[Float[Tensor, "B N d"], Int[Tensor, "B N codebooks"], Float[Tensor, ""]]:
        """Nearest codebook entry of each token: (B,N,d) -> (B,N,d) with straight-through gradient (eq. 3), codes
        (B,N,codebooks) and the commitment term (eq. 6), of the tokens that are `there`."""
        x = self.vq.project_in(tokens)
        books = self.codebook
        parts = x.reshape(*x.shape[:2], books.shape[0], books.shape[2])
        with torch.no_grad():
            found = [_nearest(parts[:, :, index].flatten(0, 1), book) for index, book in enumerate(books)]
        codes = torch.stack(found, dim=-1).unflatten(0, x.shape[:2])
        nearest = self._entries(codes)
        passed = x + (nearest - x).detach() if self.training else nearest
        return self.vq.project_out(passed), codes, self.commitment(x, nearest, there)

    def commitment(self, x: Tensor, nearest: Tensor, there: Tensor | None = None) -> Tensor:
        """Eq. 6 as a mean over the tokens that are `there`, 0 where none is: beta pulls x to its entry; by gradient the
        entry comes too, EMA moves it on its own."""
        if there is not None:
            x, nearest = x[there], nearest[there]
            if not len(x):
                return x.sum()
        pull = self.beta * F.mse_loss(x, nearest.detach())
        return pull + F.mse_loss(nearest, x.detach()) if self.learnable else pull

    def embed(self, codes: Int[Tensor, "B h w codebooks"]) -> Float[Tensor, "B d h w"]:
        """Codes (B,h,w,codebooks) back to latents (B,d,h,w)."""
        return self.vq.project_out(self._entries(codes)).permute(0, 3, 1, 2)

    def _entries(self, codes: Tensor) -> Tensor:
        books = self.codebook
        return torch.cat([F.embedding(codes[..., i], books[i]) for i in range(books.shape[0])], dim=-1)


def _nearest(tokens: Float[Tensor, "N width"], book: Float[Tensor, "size width"]) -> Int[Tensor, " N"]:
    """The nearest entry of one codebook for each token."""
    half = book.square().sum(-1) / 2

    def distances(part: Tensor) -> Tensor:
        # half of |x - c|^2, less the |x|^2 that no choice changes
        return torch.addmm(half, part, book.T, alpha=-1)

    if torch.compiler.is_compiling():  # a graph has no loop over a number of tokens that it does not know
        return distances(tokens).argmin(-1)
    places = torch.arange(len(book), dtype=torch.float32, device=tokens.device)
    return torch.cat([_first_least(distances(part), places) for part in tokens.split(AT_ONCE)])


def _first_least(rows: Float[Tensor, "N size"], places: Float[Tensor, " size"]) -> Int[Tensor, " N"]:
    """`rows.argmin(-1)` by minima alone, in a third of the time on a CPU: whatever is more than the row's least
    lies `size` places farther. A row with nan, of a training that went astray, gives 0. `rows` is overwritten."""
    above = rows.sub_(rows.amin(-1, keepdim=True)).sign_()
    return torch.add(places, above, alpha=len(places)).amin(-1).nan_to_num_(0).long()


class ScalarQuantizer(nn.Module):
    """Finite scalar quantisation (arXiv 2309.15505) in the place of eq. 3; it needs no commitment term.

    The levels are the paper's for about 2^8, 2^10, 2^12, 2^14 codes: the set nearest to `codebook_size`. As k-means
    does for a codebook, the first batch of a training spreads the latents over the levels (mean 0, deviation 1 before
    the tanh): new encoders give small latents, which would all fall on the few codes in the middle.
    """

    LEVELS = ((8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5))

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        sizes = [math.prod(levels) for levels in self.LEVELS]
        if config.codebook_size > sizes[-1]:
            raise InputError(f"model.tokenizer.codebook_size: {config.codebook_size} exceeds fsq's largest {sizes[-1]}")
        choice = min(range(len(sizes)), key=lambda i: abs(math.log(sizes[i] / config.codebook_size)))
        self.size = sizes[choice]
        self.fsq = FSQ(levels=list(self.LEVELS[choice]), dim=config.dim)
        self.begun: Tensor
        self.register_buffer("begun", torch.tensor(not config.kmeans_init))

    @torch.no_grad()
    def _begin(self, z: Tensor, there: Tensor | None) -> None:
        """Scale project_in so that its output on the cells of z that are `there`, if there are two, has mean 0 and
        deviation 1 in every dimension."""
        layer = self.fsq.project_in
        x = layer(z.flatten(2).transpose(1, 2)).flatten(0, 1)
        if there is not None:
            x = x[there.flatten()]
        if len(x) < 2:
            return
        deviation = x.std(0).clamp(min=1e-6)
        layer.weight.div_(deviation[:, None])
        layer.bias.sub_(x.mean(0)).div_(deviation)
        self.begun.fill_(True)

    def forward(
        self, z: Float[Tensor, "B d h w"], there: Bool[Tensor, "B h w"] | None = None
    ) -> tuple[Float[Tensor, "B d h w"], Int[Tensor, "B h w codebooks"], Float[Tensor, ""]]:
        """z (B,d,h,w) -> quantised (B,d,h,w), codes (B,h,w,1), commitment 0. It begins by the cells that are `there`,
        all unless it is given."""
        if self.training and not bool(self.begun):
            self._begin(z, there)
        quantised, codes = self.fsq(z)
        return quantised, codes.long().unsqueeze(-1), z.new_zeros(())


ENCODER_SETTINGS = ("encoder_width", "separable")
"""Settings of model.tokenizer that E_i is built by and G_i is not."""


class Tokenizer(nn.Module):
    """LSTG: E_i, Quant and G_i for visible (i = 1) and infrared (i = 2)."""

    CHANNELS = (3, 1)
    STRIDE = 4

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        if config.tokens == "pixels":
            self.encoders = nn.ModuleList(PixelPatches(c, config.dim) for c in self.CHANNELS)
        else:
            shape = (config.dim, config.blocks)
            width = config.encoder_width or config.width
            self.encoders = nn.ModuleList(Encoder(c, width, *shape, config.separable) for c in self.CHANNELS)
            self.decoders = nn.ModuleList(Decoder(c, config.width, *shape) for c in self.CHANNELS)
        self.codebook_size: int | None = None
        """Entries of each codebook; None where nothing is quantised."""
        if config.tokens == "quantized":
            kind: type[Quantizer | ScalarQuantizer] = Quantizer if config.quantizer == "vq" else ScalarQuantizer
            first = kind(config)
            self.codebook_size = first.size
            self.quantizers = nn.ModuleList([first, first if config.shared_codebook else kind(config)])
        # what stands for a modality that is not there
        self.missing = nn.Parameter(torch.zeros(2, config.dim))
        nn.init.normal_(self.missing, std=0.02)

    def encode(
        self, index: int, image: Float[Tensor, "B C H W"], there: Bool[Tensor, "B h w"] | None = None
    ) -> tuple[Float[Tensor, "B d h w"], Int[Tensor, "B h w codebooks"] | None, Float[Tensor, ""]]:
        """Image (B,C_i,H,W) -> latents (B,d,h,w), codes (B,h,w,codebooks) or None, commitment (scalar). Of cells that
        are not `there` no codebook learns, and they have no share in the commitment."""
        z = self.encoders[index](image)
        if self.config.tokens == "quantized":
            if not torch.is_autocast_enabled(z.device.type):
                return self.quantizers[index](z, there)
            # bfloat16 cannot tell close codes apart: a training would learn other ones than evaluation chooses
            with torch.autocast(z.device.type, enabled=False):
                return self.quantizers[index](z.float(), there)
        return z, None, z.new_zeros(())

    def compared(self, index: int, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N width"]:
        """Image (B,C_i,H,W) -> latents before they are quantised (B,h*w,width), in the space where codes are compared:
        of `codebook_dim` channels with a codebook of vectors, of d else."""
        tokens = self.encoders[index](image).flatten(2).transpose(1, 2)
        quantizer = self.quantizers[index] if self.config.tokens == "quantized" else None
        return quantizer.vq.project_in(tokens) if isinstance(quantizer, Quantizer) else tokens  # type: ignore[no-any-return]

    def reconstruct(self, index: int, latents: Float[Tensor, "B d h w"]) -> Float[Tensor, "B C 4*h 4*w"]:
        """G_i (eq. 4): latents (B,d,h,w) -> image (B,C_i,4h,4w); pixel tokens (ablation A) have no decoder."""
        self.require_decoder()
        return self.decoders[index](latents)

    def require_decoder(self) -> None:
        """InputError for pixel tokens, which nothing rebuilds images from."""
        if self.config.tokens == "pixels":
            raise InputError("model.tokenizer.tokens: 'pixels' has no decoder to reconstruct with; use quantized")

    def rebuild(self, index: int, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """G(Quant(E(I))) of modality `index` (0 visible, 1 infrared) at the image's own size, as 8 bits would hold it.

        image (B,C_i,H,W) in [0,1] of any size -> rebuilt (B,C_i,H,W), multiples of 1/255 in [0,1], and codes
        (B,h,w,codebooks) or None. Sizes that are no multiple of 4 are padded at right and bottom and cut again.
        """
        height, width = image.shape[-2:]
        padded = F.pad(image, (0, -width % self.STRIDE, 0, -height % self.STRIDE), mode="replicate")
        latents, codes, _ = self.encode(index, padded)
        rebuilt = self.reconstruct(index, latents)[:, :, :height, :width]
        return (rebuilt.clamp(0, 1) * 255).round() / 255, codes

    @property
    def bits_per_pixel(self) -> float | None:
        """Bits a code index needs, times the codebooks, over the 16 pixels it stands for; None without a codebook."""
        if self.codebook_size is None:
            return None
        books = self.config.codebooks if self.config.quantizer == "vq" else 1
        return books * math.log2(self.codebook_size) / self.STRIDE**2

    def forward(
        self,
        visible: Tensor | None,
        infrared: Tensor | None,
        present: Tensor | None = None,
        cells: Tensor | None = None,
    ) -> Latents:
        """Both grids of latents; an absent modality (None, or false in `present`) becomes its learned token.

        visible (B,3,H,W) and infrared (B,1,H,W) in [0,1], H and W multiples of 4; present bool (B,2). `cells` bool
        (B,2,h,w) is false where a camera does not reach: the learned token stands there, too. What is absent has code
        -1.
        """
        images = (visible, infrared)
        given = next((image for image in images if image is not None), None)
        if given is None:
            raise InputError("visible and infrared are both None; give at least one of the two images")
        batch, _, height, width = given.shape
        grid = (batch, self.config.dim, height // self.STRIDE, width // self.STRIDE)
        latents: list[Tensor] = []
        codes: list[Tensor | None] = []
        commitment = given.new_zeros(())
        for index, image in enumerate(images):
            token = self.missing[index][None, :, None, None].to(given.dtype)
            covered = None if cells is None else cells[:, index]
            if image is None:
                latents.append(token.expand(grid))
                codes.append(None)
                continue
            if torch.compiler.is_exporting() and present is not None:  # a graph cannot leave rows out
                latent, code, term = self.encode(index, image, covered)
                there = present[:, index][:, None, None, None]
                latent = torch.where(there, latent, token)
                code = None if code is None else torch.where(there, code, -1)
            elif present is None or bool(present[:, index].all()):
                latent, code, term = self.encode(index, image, covered)
            else:
                # the codebook must never learn from a blank frame, so only what is there is encoded
                rows = present[:, index].nonzero()[:, 0]
                latent, code, term = token.expand(grid), None, given.new_zeros(())
                if len(rows):
                    part, code, term = self.encode(index, image[rows], None if covered is None else covered[rows])
                    latent = latent.index_copy(0, rows, part.to(latent.dtype))  # under autocast they may differ
                    if code is not None:
                        code = code.new_full((batch, *code.shape[1:]), -1).index_copy(0, rows, code)
            if covered is not None:
                latent = torch.where(covered[:, None], latent, token.to(latent.dtype))
                code = None if code is None else torch.where(covered[..., None], code, -1)
            latents.append(latent)
            codes.append(code)
            commitment = commitment + term
        return Latents(latents[0], latents[1], codes[0], codes[1], commitment)
