"""Images for masked image modelling: one random crop in two views, or one of a few fixed ones; masks of whole batches.

Papers:
    BEiT, https://arxiv.org/abs/2106.08254, section 2.5; BEiT v2, https://arxiv.org/abs/2208.06366, appendix
Reference: https://github.com/microsoft/unilm (MIT licence), ``beit/datasets.py`` at 03380c8 and ``beit2/datasets.py``
at 80d673a. Written anew; what differs from the reference: colours change after the crop instead of before, which is
much cheaper for large photographs (contrast is then about the mean of the crop); images stay bytes, so that a batch is
small on its way to the device, which divides and normalises.

All random numbers come from torch's own generator, which a DataLoader seeds for each worker, and ``BEiTResumeHook`` for
each batch. Where an image has a number of fixed views, these are functions of a seed, the image and the view alone, so
that their tokens can be kept (``token_cache``).

Shapes: B images, C channels, H W pixels, h w grid in patches.
"""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter, RandomResizedCrop

from ..models.checks import height_and_width
from .image_list import ImageList
from .image_reading import read_rgb
from .masking import BlockMasking, RandomMasking
from .token_cache import TokenCache

__all__ = ['AllViews', 'ImageFiles', 'TwoViews', 'mim_collate']

INTERPOLATIONS = {name: Image.Resampling[name.upper()] for name in ('bilinear', 'bicubic', 'lanczos')}
_TRIES = 100  # at another image in place of one that cannot be read, before a training ends
Sample = dict[str, Tensor]


class TwoViews:
    """One random crop of an image for the encoder and for the tokenizer, which often wants another size.

    Args:
        size: pixels of the encoder's view, one number or (H, W).
        token_size: of the tokenizer's view; None where it looks at the encoder's.
        interpolation, token_interpolation: ``bilinear``, ``bicubic`` or ``lanczos``.
        scale: share of the image's area that a crop takes, lowest and highest; v1 0.08 to 1, v2 0.2 to 1.
        ratio: width over height of a crop, lowest and highest.
        color_jitter: how far brightness, contrast and saturation change, 0 to 1; v1 and v2 0.4.
        hflip: probability of a mirror image.

    Raises:
        ValueError: a size, share or probability out of range, or an unknown interpolation.
    """

    def __init__(
        self,
        size: int | Sequence[int] = 224,
        token_size: int | Sequence[int] | None = 112,
        *,
        interpolation: str = 'bicubic',
        token_interpolation: str = 'lanczos',
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        color_jitter: float = 0.4,
        hflip: float = 0.5,
    ) -> None:
        self.size = height_and_width('size', size)
        self.token_size = None if token_size is None else height_and_width('token_size', token_size)
        for name, value in (('interpolation', interpolation), ('token_interpolation', token_interpolation)):
            if value not in INTERPOLATIONS:
                raise ValueError(f'{name} must be one of {", ".join(INTERPOLATIONS)}, got {value!r}')
        if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
            raise ValueError(
                f'scale must be two shares of the area from above 0 to 1 and ratio two numbers above 0, lowest first, '
                f'got {tuple(scale)} and {tuple(ratio)}'
            )
        if not 0 <= color_jitter <= 1 or not 0 <= hflip <= 1:
            raise ValueError(f'color_jitter and hflip must be from 0 to 1, got {color_jitter} and {hflip}')
        self.filters = INTERPOLATIONS[interpolation], INTERPOLATIONS[token_interpolation]
        self.scale, self.ratio, self.color_jitter, self.hflip = list(scale), list(ratio), color_jitter, hflip
        self.jitter = ColorJitter(color_jitter, color_jitter, color_jitter) if color_jitter else None

    def __call__(self, image: Image.Image) -> Sample:
        """An RGB image to ``inputs`` and, where the tokenizer has its own, ``token_view``; (3, H, W) uint8 each."""
        return self.both(self.crop(image))

    def crop(self, image: Image.Image) -> Image.Image:
        """The random part: a crop of an RGB image, its colours changed, maybe mirrored, of its own size."""
        top, left, height, width = RandomResizedCrop.get_params(image, self.scale, self.ratio)  # type: ignore[arg-type]
        image = image.crop((left, top, left + width, top + height))
        image = self.jitter(image) if self.jitter else image
        if torch.rand(()) < self.hflip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image

    def center(self, image: Image.Image) -> Sample:
        """The views of the largest crop in the middle, as it is: the same each time."""
        width, height = image.size
        H, W = self.size
        share = min(width / W, height / H)
        left, top = (width - W * share) / 2, (height - H * share) / 2
        return self.both(image.crop((round(left), round(top), round(left + W * share), round(top + H * share))))

    def both(self, crop: Image.Image) -> Sample:
        """What ``__call__`` returns, of a crop."""
        sample = {'inputs': self.encoder_view(crop)}
        if self._for_tokens != (self.size, self.filters[0]):
            sample['token_view'] = self.token_view(crop)
        return sample

    def encoder_view(self, crop: Image.Image) -> Tensor:
        """(3, H, W) uint8."""
        return _resized(crop, self.size, self.filters[0])

    def token_view(self, crop: Image.Image) -> Tensor:
        """(3, H, W) uint8; where the tokenizer has no view of its own, that of the encoder."""
        return _resized(crop, *self._for_tokens)

    @property
    def _for_tokens(self) -> tuple[tuple[int, int], Image.Resampling]:
        return (self.size, self.filters[0]) if self.token_size is None else (self.token_size, self.filters[1])

    def about_tokens(self) -> dict[str, Any]:
        """All that the pixels of ``token_view`` depend on, but for the image and the random numbers."""
        size, resampling = self._for_tokens
        names = ('scale', 'ratio', 'color_jitter', 'hflip')
        own = {name: getattr(self, name) for name in names}
        return {'token_size': list(size), 'token_interpolation': resampling.name.lower(), **own}


class ImageFiles(Dataset[Sample]):
    """Images without labels, by their files.

    Args:
        roots: see ``image_list.ImageList``.
        views: what makes a sample of an RGB image.
        on_broken: called with the file and a sentence where one cannot be read; another image, at random, takes its
            place. None: the sentence is raised.
        num_views: of each image, drawn once and for all; a sample is one of them, at random. None: a new one each time.
        seed: of these views; by default 0.
        token_cache: a file of ``tools/cache_tokens.py``, which has ``num_views`` and ``seed``; samples then carry
            ``tokens`` (h, w) int64 in place of ``token_view``.

    Raises:
        ValueError: nothing there, a number below 1, a seed without views, or a cache of other images or views.
    """

    def __init__(
        self,
        roots: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        views: TwoViews,
        on_broken: Callable[[str, str], None] | None = None,
        num_views: int | None = None,
        seed: int | None = None,
        token_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        if (num_views is not None and num_views < 1) or (seed is not None and seed < 0):
            raise ValueError(f'num_views must be at least 1 and seed at least 0, got {num_views} and {seed}')
        if seed is not None and num_views is None and token_cache is None:
            raise ValueError(f'got seed={seed}, which is of fixed views: give their number as num_views, or no seed')
        self.files = ImageList(roots)
        self.views, self.on_broken = views, on_broken
        self.token_cache = None if token_cache is None else TokenCache(token_cache)
        if self.token_cache is not None:
            self.token_cache.check(self.about_tokens(num_views, seed))
            num_views, seed = self.token_cache.num_views, self.token_cache.seed
        self.num_views, self.seed = num_views, seed or 0

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> str:
        """File of an image; of a member of an archive ``ARCHIVE/member``."""
        return self.files.name(index)

    def about_tokens(self, num_views: int | None, seed: int | None) -> dict[str, Any]:
        """What tokens are of: images, views and, unless None, their number and seed."""
        given = {'num_views': num_views, 'seed': seed}
        return {
            'images': len(self),
            'names': self.files.digest(),
            **self.views.about_tokens(),
            **{name: value for name, value in given.items() if value is not None},
        }

    def __getitem__(self, index: int) -> Sample:
        for _ in range(_TRIES):
            try:
                return self._sample(index)
            except ValueError as error:
                if self.on_broken is None:
                    raise
                self.on_broken(self.path(index), str(error))
            index = int(torch.randint(len(self), ()))
        raise ValueError(
            f'none of {_TRIES} images in a row can be read, the last one is {self.path(index)}; check the disk'
        )

    def _sample(self, index: int) -> Sample:
        if self.num_views is None:
            return self.views(self.image(index))
        number = int(torch.randint(self.num_views, ()))
        if self.token_cache is None:
            return self.views.both(self.crop(self.image(index), index, number))
        tokens = self.token_cache.tokens(index, number)
        if tokens is None:
            raise ValueError(
                f'image {self.path(index)!r} has no tokens in {self.token_cache.path}, for it could not be read when '
                'they were made: make them anew'
            )
        return {'inputs': self.views.encoder_view(self.crop(self.image(index), index, number)), 'tokens': tokens}

    def image(self, index: int) -> Image.Image:
        """An RGB image, turned by its EXIF data; see ``image_inputs.read_rgb``.

        Raises:
            ValueError: a file that is missing, damaged or no image; the sentence names it.
        """
        return read_rgb(self.files.source(index), 'image')

    def crop(self, image: Image.Image, index: int, number: int) -> Image.Image:
        """A fixed view, before it gets a size; see ``TwoViews.crop``.

        Args:
            image: that of ``index``.
            index: of the image.
            number: of the view, from 0 to ``num_views`` - 1.
        """
        key = np.random.SeedSequence((self.seed, index, number)).generate_state(1, np.uint64)
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(int(key[0]))  # not torch's own, which is of all devices
            return self.views.crop(image)


class AllViews(Dataset[tuple[int, Tensor | None, str]]):
    """All fixed views of each image for the tokenizer.

    A sample is the number of the image, (num_views, 3, H, W) uint8, and nothing; or, where the image cannot be read,
    its number, None, and why.
    """

    def __init__(self, files: ImageFiles) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        files = self.files
        try:
            image = files.image(index)
        except ValueError as error:
            return index, None, str(error)
        crops = [files.crop(image, index, number) for number in range(files.num_views or 0)]
        return index, torch.stack([files.views.token_view(crop) for crop in crops]), ''


def mim_collate(
    samples: Sequence[Sample], masking: Mapping[str, Any] | None = None, generator: torch.Generator | None = None
) -> Sample:
    """Samples to a batch, and which of its patches are hidden.

    Args:
        samples: of equal sizes.
        masking: arguments of ``BlockMasking``, or with ``blockwise=False`` of ``RandomMasking``; None for no masks.
        generator: of the masks; by default torch's own, of the process that loads.

    Returns:
        The views of the samples with a dimension B before, and ``mask`` (B, h, w) bool, True where a patch is hidden.

    Raises:
        ValueError: what the masking raises.
    """
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    if masking is not None:
        draw = _masking(tuple(sorted((name, _hashable(value)) for name, value in masking.items())))
        batch['mask'] = draw(len(samples), torch.default_generator if generator is None else generator)
    return batch


@lru_cache(maxsize=8)  # its tables take longer to make than the masks of a batch
def _masking(options: tuple[tuple[str, Any], ...]) -> RandomMasking:
    given = dict(options)
    return (BlockMasking if given.pop('blockwise', True) else RandomMasking)(**given)


def _hashable(value: Any) -> Hashable:
    return tuple(value) if isinstance(value, list) else value


def _resized(image: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Tensor:
    """(3, H, W) uint8, contiguous."""
    pixels = np.array(image.resize((size[1], size[0]), resampling))  # H, W, 3
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
