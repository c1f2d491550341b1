"""Which cat a picture shows: the nearest of all 287,550 cats of `--dataset cats`, part by part, and how near it is.

A picture of the data set is its own nearest cat, at distance 0. Of drawn pictures this tells what was asked for and is there,
what is a copy of a training picture, and what is no cat at all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.cats import COUNTS, KINDS, PLAIN, SCARVES, layers

ALL = "all"  # in place of a kind
PAIRS_TRIED, UNCLEAR = 3, 2.0  # of a body and an accessory: the likeliest one, and those with at most twice its squared error
SWEEPS = 4  # over the parts, at most
AT_ONCE = 256  # pictures, for the cache of the processor


class Recognized(NamedTuple):
    cats: Tensor  # the parts of the nearest cat, int64 [B, 5], in the order of KINDS; under a scarf the first mouth
    distance: Tensor  # root mean square difference to its picture, of values in [0, 1], float32 [B]


class CatRecognizer:
    """Recognizes cats in pictures of one size."""

    def __init__(self, side: int):
        self.side = side
        whole = {kind: torch.from_numpy(layers(side)[kind]).permute(0, 3, 1, 2).flatten(2) for kind in KINDS}  # [parts, 4, P]
        self._supports = {kind: whole[kind][:, 3].amax(dim=0).nonzero()[:, 0] for kind in KINDS}
        self._supports[ALL] = torch.arange(side**2)
        # premultiplied colours and alpha of each kind of part, at the pixels that another kind can have
        self._layers = {name: {kind: whole[kind][:, :, where] for kind in KINDS} for name, where in self._supports.items()}
        self._factors = {kind: _factors(self._layers[kind][kind]) for kind in KINDS}
        pairs = torch.cartesian_prod(torch.arange(COUNTS[0]), torch.arange(COUNTS[4]))
        self._pairs = torch.tensor([[0, PLAIN, 0, 0, 0]]).repeat(len(pairs), 1)
        self._pairs[:, 0], self._pairs[:, 4] = pairs.T
        # what no fur, eyes and mouth can cover, or what the accessory covers: [16, P]
        free = torch.stack([1 - whole[kind][:, 3].amax(dim=0) for kind in ("fur", "eyes", "mouth")]).prod(dim=0)
        covered = whole["accessory"][:, 3]
        self._weights = covered + (1 - covered) * free
        self._weights /= self._weights.sum(dim=1, keepdim=True)
        weights, pictures = self._weights[self._pairs[:, 4], None], self._painted(self._pairs, ("body", "accessory"))
        self._weighted = (weights * pictures).flatten(1)  # [240, 3 P]
        self._constant = (weights * pictures.square()).flatten(1).sum(dim=1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Recognized:
        """The nearest cats of images [B, 3, side, side] in [-1, 1]. Raises ValueError for another shape."""
        if images.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"the images are {tuple(images.shape)}; this recognizer takes [B, 3, {self.side}, {self.side}].")
        pixels = (images.cpu().float() / 2 + 0.5).flatten(2)
        found = [self._nearest(part) for part in pixels.split(AT_ONCE)]
        return Recognized(*map(torch.cat, zip(*found, strict=True)))

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = x.square().sum(dim=1) @ self._weights.T  # [B, 16]
        distances = squares[:, self._pairs[:, 4]] - 2 * x.flatten(1) @ self._weighted.T + self._constant  # [B, 240]
        nearest, ranked = distances.topk(PAIRS_TRIED, dim=1, largest=False)
        best, error = self._improved(x, self._pairs[ranked[:, 0]])
        for rank in range(1, PAIRS_TRIED):
            rows = (nearest[:, rank] < UNCLEAR * nearest[:, 0]).nonzero()[:, 0]
            cats, now = self._improved(x[rows], self._pairs[ranked[rows, rank]])
            better = now < error[rows]
            best[rows[better]], error[rows[better]] = cats[better], now[better]
        best[torch.isin(best[:, 4], torch.tensor(SCARVES)), 3] = 0
        return best, error.sqrt()

    def _improved(self, x: Tensor, cats: Tensor) -> tuple[Tensor, Tensor]:
        """Each part in turn chosen anew, given the others, until nothing changes; the mean squares [B] that are left."""
        for sweep in range(SWEEPS):
            before = cats.clone()
            for kind in ("eyes", "mouth", "fur", *(("body", "accessory") if sweep else ())):
                cats[:, KINDS.index(kind)] = self._best_part(x, cats, kind)
            if sweep and torch.equal(before, cats):
                break
        return cats, (x - self._painted(cats)).square().mean(dim=(1, 2))

    def _best_part(self, x: Tensor, cats: Tensor, kind: str) -> Tensor:
        """The part of this kind, given the others, whose picture is nearest, [B].

        With c and a for a part's colour and alpha, the picture is above + through (c + (1 - a) below). Its squared difference
        to x is a sum of products of what differs by picture and what differs by part, so that all parts take five products.
        """
        place = KINDS.index(kind)
        below = self._painted(cats, KINDS[:place], kind)
        above, through = torch.zeros_like(below), torch.ones_like(below[:, :1])
        for upper in KINDS[place + 1 :]:
            layer = self._layers[kind][upper][cats[:, KINDS.index(upper)]]
            above, through = layer[:, :3] + above * (1 - layer[:, 3:]), through * (1 - layer[:, 3:])
        rest = (x[:, :, self._supports[kind]] - above - through * below) * through
        below = through * below
        of_pictures = (rest, (rest * below).sum(dim=1), through.square(), through * below, below.square().sum(dim=1))
        signs = (-2, 2, 1, -2, 1)
        products = zip(signs, of_pictures, self._factors[kind], strict=True)
        return sum(sign * picture.flatten(1) @ part for sign, picture, part in products).argmin(dim=1)

    def _painted(self, cats: Tensor, kinds: Sequence[str] = KINDS, where: str = ALL) -> Tensor:
        """These kinds of the cats' parts on white, [B, 3, P], at the pixels that `where` can have."""
        picture = torch.ones(len(cats), 3, len(self._supports[where]))
        for kind in kinds:
            layer = self._layers[where][kind][cats[:, KINDS.index(kind)]]
            picture = layer[:, :3] + picture * (1 - layer[:, 3:])
        return picture


def _factors(layer: Tensor) -> list[Tensor]:
    """What a squared difference takes of each part's colour c and alpha a: c, a, c², c a, a², each [values, parts]."""
    colour, alpha = layer[:, :3], layer[:, 3:]
    factors = (colour, alpha, colour.square().sum(dim=1), colour * alpha, alpha.square())
    return [factor.flatten(1).T.contiguous() for factor in factors]
