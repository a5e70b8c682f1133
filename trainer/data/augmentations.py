"""Named augmentation sets: what happens to each view. Literal data; `crops`, `colours` and `augment` apply it.

A view is cut by RandomResizedCrop and flipped, then, in this order: colour jitter (its four operations in random
order), grayscale, blur, solarise, normalise. All parameters are drawn for each image and view on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Of one view. Probabilities are per image; the defaults change nothing but the crop's size.

    `scale` is RandomResizedCrop's range of areas; None resizes the short side and cuts the centre instead.
    `jitter` is the probability of the four colour operations with strengths `brightness` to `hue` (torchvision's
    `ColorJitter`). `blur_sigma` is in pixels of the view itself; the kernel is `blur_kernel` pixels (width, height),
    or where None, a tenth of the view's side, odd (23 at 224 px, 9 at 96, 3 at 32; SimCLR, appendix A).
    """

    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    square: bool = False  # square boxes only: the reader of the DiffMix reference, whose crop is always square
    flip: float = 0.0
    jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: tuple[int, int] | None = None
    solarize: float = 0.0
    solarize_threshold: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class AugmentationSet:
    """Of all views of an image: `views[i]` for global view i (the last one repeats), `local` for the small crops.

    Without `local`, small crops take `views[0]` with `LOCAL_SCALE`.
    """

    views: tuple[Augmentation, ...]
    local: Augmentation | None = None
    source: str = ""  # where its numbers come from


LOCAL_SCALE = (0.05, 0.4)
PLAIN = Augmentation()

_SIMCLR = Augmentation(
    scale=(0.08, 1.0),
    flip=0.5,
    jitter=0.8,
    brightness=0.8,
    contrast=0.8,
    saturation=0.8,
    hue=0.2,
    grayscale=0.2,
    blur=0.5,
)
_BYOL = Augmentation(
    scale=(0.08, 1.0),
    flip=0.5,
    jitter=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale=0.2,
    blur=1.0,
)
_WHOLE = (23, 23)  # pixels that hold every sigma: codes that blur by PIL cut nothing off, whatever the view's side
_SYMMETRIC = replace(_SIMCLR, blur_kernel=_WHOLE)
_WEAK = replace(_SYMMETRIC, scale=(0.2, 1.0), jitter=0.4, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1)
_DINO = replace(_BYOL, blur_kernel=_WHOLE)
_ASYMMETRIC = replace(_BYOL, blur=0.0)
_WEAK_ASYMMETRIC = replace(_ASYMMETRIC, scale=(0.2, 1.0), jitter=0.4)
_DIFFMIX = replace(_BYOL, square=True, blur=0.0)

_DIGITS = Augmentation(scale=(0.5, 1.0), jitter=0.8, brightness=0.4, contrast=0.4, blur=0.2, blur_sigma=(0.1, 1.0))

AUGMENTATIONS: dict[str, AugmentationSet] = {
    "none": AugmentationSet(views=(PLAIN,), source="short side resized, centre cut, nothing else"),
    "symmetric": AugmentationSet(
        views=(_SYMMETRIC,),
        source="solo-learn, CIFAR-10, SimCLR and SwAV: SimCLR's, blurred as by PIL; the default of AdaInf's comparison",
    ),
    "weak": AugmentationSet(
        views=(_WEAK,),
        source="AdaInf (arXiv 2403.12448), symmetric, its released yaml; made for training on inflated data",
    ),
    "weak-asymmetric": AugmentationSet(
        views=(_WEAK_ASYMMETRIC, replace(_WEAK_ASYMMETRIC, solarize=0.2)),
        source="AdaInf (arXiv 2403.12448), asymmetric, its released yaml: of Barlow Twins and BYOL on inflated data",
    ),
    "digits": AugmentationSet(
        views=(_DIGITS,),
        local=replace(_DIGITS, scale=(0.2, 0.5), blur=0.0),
        source="ours, for the embedded digits: mirrored or cut small they are other digits",
    ),
    "finetune": AugmentationSet(
        views=(Augmentation(scale=(0.08, 1.0), flip=0.5),),
        source="the usual training crop of supervised ImageNet (arXiv 1409.4842, section 6) and flip, nothing else",
    ),
    "finetune-digits": AugmentationSet(
        views=(Augmentation(scale=(0.7, 1.0)),),
        source="ours, for digits and other signs: mirrored or cut small they are other ones",
    ),
    "simclr": AugmentationSet(
        views=(_SIMCLR,),
        source="SimCLR (arXiv 2002.05709, appendix A): strength 1, blur on half of the views",
    ),
    "simclr-cifar": AugmentationSet(
        views=(replace(_SIMCLR, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, blur=0.0),),
        source="SimCLR (arXiv 2002.05709, appendix B.9, CIFAR-10): strength 0.5, no blur",
    ),
    "barlow-twins": AugmentationSet(
        views=(_BYOL, replace(_BYOL, blur=0.1, solarize=0.2)),
        source="Barlow Twins (arXiv 2103.03230) and BYOL (arXiv 2006.07733, table 6): asymmetric",
    ),
    "barlow-twins-cifar": AugmentationSet(
        views=(_ASYMMETRIC, replace(_ASYMMETRIC, solarize=0.2)),
        source="solo-learn, CIFAR-10, Barlow Twins and BYOL: asymmetric, no blur; the default of AdaInf's comparison",
    ),
    "dino": AugmentationSet(
        views=(replace(_DINO, scale=(0.4, 1.0)), replace(_DINO, scale=(0.4, 1.0), blur=0.1, solarize=0.2)),
        local=replace(_DINO, scale=LOCAL_SCALE, blur=0.5),
        source="DINO (arXiv 2104.14294), released defaults",
    ),
    "swav": AugmentationSet(
        views=(replace(_SYMMETRIC, scale=(0.14, 1.0)),),
        local=replace(_SYMMETRIC, scale=(0.05, 0.14)),
        source="SwAV (arXiv 2006.09882), released multi-crop; it normalises red by a deviation of .228, we by .229",
    ),
    "mae": AugmentationSet(
        views=(Augmentation(scale=(0.2, 1.0), flip=0.5),),
        source="MAE (arXiv 2111.06377), the authors' code: crop and flip, nothing else",
    ),
    "diffmix": AugmentationSet(
        views=(replace(_DIFFMIX, blur=1.0, blur_kernel=(5, 9)), replace(_DIFFMIX, solarize=0.2)),
        source=(
            "DiffMix (arXiv 2406.12368), its released loader: blur on branch 1 (there one sigma a batch), solarise on "
            "branch 2, square boxes only; the paper's figure draws branch 2 without augmentation"
        ),
    ),
}
