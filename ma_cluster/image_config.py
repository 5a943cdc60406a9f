"""How a photograph becomes network input: the numbers of decoding, of the field of view (FOV) and of contrast.

A part of config.py, which hands it out. Those of the FOV are ours [U]; their lengths, `fov_diameter_px` aside, are
pixels of the reduced photograph on which it is searched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ma_cluster.errors import UsageError

LIMITS = frozenset({"max_bytes", "max_pixels"})
"""Fields that only say what a machine can bear: they refuse a photograph, and never change the answer to one."""

DICOM_PHOTOGRAPHS = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.77.1.5.1",  # Ophthalmic Photography 8 Bit
        "1.2.840.10008.5.1.4.1.1.77.1.4",  # VL Photographic
        "1.2.840.10008.5.1.4.1.1.7",  # Secondary Capture
        "1.2.840.10008.5.1.4.1.1.7.2",  # Multi-frame Grayscale Byte Secondary Capture
        "1.2.840.10008.5.1.4.1.1.7.4",  # Multi-frame True Color Secondary Capture
    }
)
"""SOP classes of the DICOM objects that are read; all others are no colour photographs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageConfig:
    """How a photograph becomes network input."""

    fov_diameter_px: float = 3410.0
    """Diameter of the field of view at canonical 1x, pixels: the median of IDRiD's photographs (measured)."""
    fov_degrees: float = 50.0
    """The angle that `fov_diameter_px` shows at canonical 1x: IDRiD's (published)."""
    field_degrees: float = 0.0
    """Angle of a photograph's disc, where it is known; 0 assumes `fov_degrees`. Nothing in the picture tells it
    within a tenth: by the width of vessels HRF's 60 degrees are 70, and IDRiD's 50 lie between 42 and 56; by the optic
    disc, drawn by hand on IDRiD's 54, 50 degrees are found within a tenth on 80 of 100, between 43 and 56 on 90 of
    100, as optic discs differ so much (measured)."""
    no_surround: bool = False
    """The photograph is retina from edge to edge, no disc is looked for: `field_degrees` lie across its longer side."""
    max_field_degrees: float = 100.0
    """Wider is ultra-widefield, whose projection has no one scale [U]."""
    scale_tolerance: float = 0.03
    """Photographs whose FOV diameter is within this share of the canonical one are cropped but not resampled [U]."""
    contrast_gain: float = 4.0
    """alpha in I' = alpha I - alpha (G * I) + 128 (van Grinsven 2016) [S]."""
    sigma_ratio: float = 1 / 30
    """Standard deviation of G over the FOV diameter, at either scale [U]; 512/30 on 512x512 images in the source."""
    vessel_contrast: float = 0.098
    """Contrast of the vessels on a well exposed photograph, 0..1: the median of IDRiD's, of HRF's and of e-ophtha's
    (measured, 0.099, 0.098 and 0.097). A dim or hazy photograph is brought there."""
    least_exposure: float = 0.125
    """Dim is what lies below, the geometric mean of brightness and vessel contrast, 0..1: IDRiD's lie above but for
    the darkest 5 of 54, IDRiD's at half their brightness below (measured)."""
    least_contrast: float = 0.05
    """Hazy is what has less vessel contrast, 0..1; the least of IDRiD's is 0.051 (measured)."""
    least_depth: float = 0.165
    """Or less vessel contrast for its brightness, which light alone does not change; the least of the validation
    photographs is 0.184, of IDRiD's 0.172 (measured)."""
    largest_gain: float = 8.0
    """A photograph is brightened no further [U]: the grey levels of one that is darker are too few."""
    max_bytes: int = 64 * 2**20
    """Larger objects are refused unread, bytes [U]."""
    max_pixels: int = 80_000_000
    """Larger photographs are refused undecoded, pixels [U]; the largest fundus cameras give about 45 million."""
    min_side_px: int = 256
    """Photographs with a shorter side are refused [U]: a microaneurysm would be under two pixels across."""
    fov_search_px: int = 512
    """Longest side of that reduced photograph: a circle through hundreds of border pixels is right to a part of one."""
    fov_kernel_px: int = 5
    """Side of the blur and of the opening before the threshold's component: noise and thin bridges go."""
    fov_dark_percentile: float = 1.0
    """Percentile of the brightest channel that is the surround's grey level."""
    fov_bright_percentile: float = 95.0
    """Percentile of the brightest channel that is the retina's, highlights left out."""
    fov_max_surround: float = 60.0
    """A brighter surround is none, grey levels: an overexposed scan, or no fundus photograph."""
    fov_contrast_share: float = 0.15
    """The FOV begins at this share of the way from surround to retina: dark rims belong to it, stray light does not."""
    fov_min_contrast: float = 8.0
    """And at so many grey levels above the surround, more than JPEG and sensor noise."""
    fov_cut_px: int = 2
    """Border pixels so near the bounding box are a straight side where the camera cut the disc, no arc."""
    fov_min_arc_px: int = 40
    """A circle through fewer border pixels would not be sure."""
    fov_outlier_px: float = 2.0
    """Border pixels farther from the first circle are outliers to the second,"""
    fov_outlier_share: float = 0.02
    """or, on large discs, farther than this share of the radius."""
    fov_min_arc_share: float = 0.5
    """With more outliers than the rest of the border it is no disc."""
    fov_core: float = 0.9
    """Share of the radius within which the retina is looked at: the rim differs from the rest even on a blank disc."""
    fov_min_inside: float = 0.95
    """Share of the visible part that must lie in the circle."""
    fov_min_disc: float = 0.5
    """Share of the circle that must be visible."""
    fov_min_photograph: float = 0.03
    """Share of the photograph that must be disc."""
    fov_second_disc: float = 0.4
    """Another bright component of this share of the disc's area is a second disc."""
    fov_margin: float = 0.03
    """Share of the photograph's shorter side that is left out where its edge hides the disc."""
    fov_min_texture: float = 2.0
    """Standard deviation of a retina, grey levels; below it the disc is blank."""
    fov_rim_px: float = 1.5
    """Left out at the rim, where the lens's shading and the JPEG's ringing are no retina."""

    def __post_init__(self) -> None:
        require(self.fov_diameter_px >= 256, "image.fov_diameter_px must be at least 256 pixels")
        require(self.field_degrees == 0 or self.field_degrees >= 10, "image.field_degrees must be at least 10")
        known = self.field_degrees > 0 or not self.no_surround
        require(known, "image.no_surround needs image.field_degrees: without a disc nothing tells the scale")
        require(0 <= self.scale_tolerance < 0.2, "image.scale_tolerance must lie in [0, 0.2)")
        require(0 < self.sigma_ratio < 0.5, "image.sigma_ratio must lie in (0, 0.5)")
        require(self.max_pixels >= self.min_side_px**2, "image.max_pixels is below min_side_px squared")
        require(self.fov_search_px >= 64, "image.fov_search_px must be at least 64 pixels")
        require(self.fov_kernel_px % 2 == 1, "image.fov_kernel_px must be odd")
        percentiles = 0 <= self.fov_dark_percentile < self.fov_bright_percentile <= 100
        require(percentiles, "image.fov_dark_percentile must lie below fov_bright_percentile, both in 0 to 100")


@dataclass(frozen=True, slots=True)
class KnownField:
    """What is known of the field of photographs before they are looked at."""

    degrees: float = 0.0
    """Angle of the disc, or, without a surround, across the longer side; 0 where it is not known."""
    no_surround: bool = False
    """They are retina from edge to edge."""

    def __post_init__(self) -> None:
        if self.no_surround and not self.degrees:
            raise UsageError("without a surround nothing tells the scale: give the angle across it, --field-degrees")
        if self.degrees and not 10 <= self.degrees <= 360:
            raise UsageError(f"a field of {self.degrees:g} degrees: no camera has it; give one from 10 to 360")

    def told(self, image: ImageConfig) -> ImageConfig:
        """How photographs of this field are read."""
        return replace(image, field_degrees=self.degrees, no_surround=self.no_surround) if self.degrees else image


def require(condition: bool, message: str) -> None:
    """Raises ValueError where a setting is out of range."""
    if not condition:
        raise ValueError(message)
