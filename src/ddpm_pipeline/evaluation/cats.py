"""Which cat a picture shows: the nearest of all 287,550 cats of `--dataset cats`, part by part, and how near it is.

A picture of the data set is its own nearest cat, at distance 0. Of drawn pictures this tells what was asked for and is there,
what is a copy of a training picture, and what is no cat at all: a cat is valid if nowhere it differs from its nearest one by
more than noise would make it differ.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data.cats import COUNTS, KINDS, PLAIN, SCARVES, layers

ALL = "all"  # in place of a kind
PAIRS_TRIED = 3  # of a body and an accessory, the likeliest ones
ORDER = ("eyes", "mouth", "fur", "body", "accessory")  # of the kinds within a sweep
OTHER_ORDER = ("fur", "eyes", "mouth", "body", "accessory")  # where the first ends in no cat, as eyes and fur hold each other
SWEEPS = 4  # over the parts, at most
AT_ONCE = 256  # pictures, for the cache of the processor

PLACES = (*KINDS, "picture")  # where a picture is compared with its nearest cat
TOLERATED_NOISE = 0.05  # standard deviation, of values in [0, 1]
RARE = 3.5  # standard deviations above the mean: what noise exceeds in 1 of 4,000 comparisons


class Recognized(NamedTuple):
    cats: Tensor  # the parts of the nearest cat, int64 [B, 5], in the order of KINDS; under a scarf the first mouth
    distance: Tensor  # root mean square difference to its picture, of values in [0, 1], float32 [B]
    excess: Tensor  # mean square difference at each of PLACES, in units of the largest that is tolerated, float32 [B, 6]

    @property
    def valid(self) -> Tensor:
        """Which pictures show a cat, bool [B]: those that are near it everywhere."""
        return (self.excess <= 1).all(dim=1)


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
        self._areas = self._weights.sum(dim=1)
        self._weights /= self._areas[:, None]
        weights, pictures = self._weights[self._pairs[:, 4], None], self._painted(self._pairs, ("body", "accessory"))
        self._weighted = (weights * pictures).flatten(1)  # [240, 3 P]
        self._constant = (weights * pictures.square()).flatten(1).sum(dim=1)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Recognized:
        """The nearest cats of images [B, 3, side, side] in [-1, 1]. Raises ValueError for another shape."""
        if images.shape[1:] != (3, self.side, self.side):
            raise ValueError(f"the images are {tuple(images.shape)}; this recognizer takes [B, 3, {self.side}, {self.side}].")
        pixels = (images.cpu().float() / 2 + 0.5).flatten(2)
        found = [self._recognized(part) for part in pixels.split(AT_ONCE)]
        return Recognized(*map(torch.cat, zip(*found, strict=True)))

    def _recognized(self, x: Tensor) -> Recognized:
        cats = self._nearest(x)
        squares = (x - self._painted(cats)).square().mean(dim=1)  # [B, P]
        return Recognized(cats, squares.mean(dim=1).sqrt(), self._excess(squares, cats))

    def _excess(self, squares: Tensor, cats: Tensor) -> Tensor:
        """Of squared differences [B, P] to the pictures of cats: their largest means over where a part is to be seen, and over
        where any part of its kind would be, and over the picture; in units of what is tolerated, [B, 6].
        """
        through, found = torch.ones_like(squares), [_in_tolerated(squares, torch.ones_like(squares))]
        for place, kind in reversed([*enumerate(KINDS)]):
            alphas = self._layers[ALL][kind][:, 3]
            alpha = alphas[cats[:, place]]
            found.append(torch.maximum(*(_in_tolerated(squares, some * through) for some in (alpha, alphas.amax(dim=0)))))
            through = through * (1 - alpha)
        return torch.stack(found[::-1], dim=1)

    def _nearest(self, x: Tensor) -> Tensor:
        squares = x.square().sum(dim=1) @ self._weights.T  # [B, 16]
        distances = squares[:, self._pairs[:, 4]] - 2 * x.flatten(1) @ self._weighted.T + self._constant  # [B, 240]
        nearest, ranked = distances.topk(PAIRS_TRIED, dim=1, largest=False)
        # the mean square that a pair leaves where no other part can be, so that it cannot leave less in all
        least = nearest * self._areas[self._pairs[ranked, 4]] / (3 * self.side**2)
        best, error = self._improved(x, self._pairs[ranked[:, 0]])
        for rank in (*range(1, PAIRS_TRIED), 0):
            likely = least[:, rank] < error if rank else error > TOLERATED_NOISE**2
            rows = likely.nonzero()[:, 0]
            cats, now = self._improved(x[rows], self._pairs[ranked[rows, rank]], ORDER if rank else OTHER_ORDER)
            better = now < error[rows]
            best[rows[better]], error[rows[better]] = cats[better], now[better]
        best[torch.isin(best[:, 4], torch.tensor(SCARVES)), 3] = 0
        return best

    def _improved(self, x: Tensor, cats: Tensor, order: Sequence[str] = ORDER) -> tuple[Tensor, Tensor]:
        """Each part in turn chosen anew, given the others, wherever one of these has changed since, until none has; the cats,
        and the mean squares [B] that are left.
        """
        stale = torch.ones(cats.shape, dtype=torch.bool)
        for _ in range(SWEEPS):
            for kind in order:
                place = KINDS.index(kind)
                rows = stale[:, place].nonzero()[:, 0]
                if len(rows):
                    parts = self._best_part(x[rows], cats[rows], kind)
                    stale[rows[parts != cats[rows, place]]] = True
                    cats[rows, place], stale[rows, place] = parts, False
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


def _in_tolerated(squares: Tensor, weights: Tensor) -> Tensor:
    """The weighted means of squares [B, P], each of three colours, in units of what TOLERATED_NOISE exceeds so RARE, [B]; 0
    where the weights are less than those of half a pixel.

    A weighted sum of squares of noise is taken for chi-square (Satterthwaite), and this for the cube of a normal variable
    (Wilson and Hilferty).
    """
    area = weights.sum(dim=1)
    part = 2 / 27 * weights.square().sum(dim=1) / area.square()  # 2 / 9 over the degrees of freedom
    tolerated = TOLERATED_NOISE**2 * (1 - part + RARE * part.sqrt()) ** 3
    return torch.where(area < 0.5, 0, (weights * squares).sum(dim=1) / area / tolerated)
