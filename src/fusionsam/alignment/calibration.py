"""Cameras from calibration files: OpenCV's FileStorage (YAML, XML or JSON), ROS camera_info, and Kalibr's camchain.

Of such a file the camera matrix and the distortion are used. How two cameras stand to each other (R and T of a stereo
calibration, T_cn_cnm1 of Kalibr) is not: the homography between two pictures depends on the distance of the scene, and
is found from pictures.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from fusionsam.alignment.geometry import Size
from fusionsam.alignment.lens import Lens
from fusionsam.types import InputError

MOST_BYTES = 1 << 20
EXPECTED = (
    "expected OpenCV's camera_matrix and distortion_coefficients (YAML, XML or JSON), a ROS camera_info, or Kalibr's "
    "camchain"
)
MATRICES = ("camera_matrix", "cameraMatrix", "Camera_Matrix", "intrinsic_matrix", "mtx", "K", "M")
DISTORTIONS = ("distortion_coefficients", "distCoeffs", "Distortion_Coefficients", "dist_coeffs", "dist", "D")
POSES = ("T_cn_cnm1", "R", "T", "E", "F")
"""Names of what tells how two cameras stand to each other."""
Node = object
"""What a YAML or XML file holds: mappings, lists, texts, numbers, arrays."""


@dataclass(frozen=True)
class Camera:
    """One camera of a calibration file."""

    name: str  # file and camera, for messages
    lens: Lens
    size: Size | None  # (H, W) of the pictures it was calibrated with, where the file tells it
    unused: tuple[str, ...] = ()  # names of what else it holds about two cameras

    def lens_for(self, size: Size) -> Lens:
        """The lens for pictures of (H, W), resized copies of those of the calibration. InputError for other shapes."""
        if self.size is None or self.size == size:
            return self.lens
        if abs(size[0] - self.size[0] * size[1] / self.size[1]) > 1 + 0.002 * size[0]:
            raise InputError(
                f"{self.name}: was calibrated with pictures of {self.size[0]}x{self.size[1]} (height x width), these "
                f"are {size[0]}x{size[1]}; give the calibration of this camera"
            )
        return self.lens.rescaled(self.size, size)

    def notes(self) -> list[str]:
        """What a person should know of how the file was read."""
        found = []
        if self.size is None:
            found.append(f"{self.name}: tells no picture size; it is taken for that of these pictures")
        if self.unused:
            found.append(
                f"{self.name}: {', '.join(self.unused)} (how two cameras stand to each other) is not used: the "
                "homography is found from the pictures, at the distance of their scenes"
            )
        return found


def read_camera(source: str | Path) -> Camera:
    """The camera of a calibration file FILE, or FILE:NAME for one of several (cam1 of Kalibr, 1 or 2 of OpenCV's stereo
    calibration).

    Raises:
        InputError: For a file that cannot be read, holds no camera, several where none is named, or a lens model other
            than pinhole with up to five radial-tangential coefficients.

    >>> read_camera("camchain.yaml:cam1").lens.distortion  # doctest: +SKIP
    """
    path, wanted = Path(source), ""
    if not path.exists() and ":" in str(source):
        head, wanted = str(source).rsplit(":", 1)
        path = Path(head)
    content = _content(path)
    cameras = _cameras(content)
    if not cameras:
        raise InputError(f"{path}: holds no camera; {EXPECTED}")
    if not wanted and len(cameras) > 1:
        first, names = next(iter(cameras)), ", ".join(cameras)
        raise InputError(f"{path}: holds {len(cameras)} cameras ({names}); name one, for example {path}:{first}")
    if wanted and wanted not in cameras:
        raise InputError(f"{path}: holds no camera {wanted!r}; expected one of {', '.join(cameras) or 'none'}")
    name = f"{path}:{wanted}" if wanted else str(path)
    node = cameras[wanted or next(iter(cameras))]
    lens = _kalibr_lens(node, name) if "intrinsics" in node else _opencv_lens(node, name)
    # of a stereo file the pose stands beside the cameras
    unused = tuple(key for key in POSES if key in node or key in content)
    return Camera(name, lens, _size(node, name), unused)


# -- files ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML with OpenCV's matrices."""


def _matrix(loader: yaml.SafeLoader, node: yaml.MappingNode) -> Node:
    return loader.construct_mapping(node, deep=True)


for _tag in ("opencv-matrix", "opencv-nd-matrix"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _matrix)


def _content(path: Path) -> Mapping[str, Node]:
    if not path.is_file():
        raise InputError(f"{path}: no such file; {EXPECTED}")
    if path.stat().st_size > MOST_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected a calibration of at most {MOST_BYTES}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if text.lstrip().startswith("<"):
            found: Node = _of_element(ET.fromstring(text))
        else:
            # OpenCV's first line, "%YAML:1.0", is no YAML
            found = yaml.load(re.sub(r"\A%YAML.*\n", "", text), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ET.ParseError, RecursionError, ValueError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())[:80]
        raise InputError(f"{path}: cannot be read ({reason}); {EXPECTED}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: holds {type(found).__name__}; {EXPECTED}")
    return {str(key): value for key, value in found.items()}


def _of_element(element: ET.Element) -> Node:
    """An XML element as YAML would have it."""
    if len(element):
        return {child.tag: _of_element(child) for child in element}
    text = (element.text or "").split()
    return text if len(text) > 1 else "".join(text)


def _cameras(content: Mapping[str, Node]) -> dict[str, Mapping[str, Node]]:
    """Every camera by name: Kalibr's cam0, cam1, ...; 1 and 2 of numbered matrices; one without a name."""
    inner = {key: node for key, node in content.items() if isinstance(node, Mapping) and "intrinsics" in node}
    if inner:
        return inner
    if _first(content, MATRICES) is not None:
        return {"camera": content}
    found: dict[str, Mapping[str, Node]] = {}
    for number in "1", "2":
        own = {key.removesuffix(number): value for key, value in content.items() if key.endswith(number)}
        if _first(own, MATRICES) is not None:
            sizes = {key: content[key] for key in ("image_width", "image_height", "imageSize") if key in content}
            found[number] = {**sizes, **own}
    return found


# -- lenses --------------------------------------------------------------------------------------------------------


def _first(node: Mapping[str, Node], names: tuple[str, ...]) -> Node:
    return next((node[name] for name in names if name in node), None)


def _numbers(value: Node, what: str) -> NDArray[np.float64]:
    """The values of a list, of a text, or of a matrix with its `data`; InputError for anything else."""
    data = value.get("data") if isinstance(value, Mapping) else value
    if isinstance(data, str):
        data = data.split()
    try:
        numbers = np.array([] if data is None else data, dtype=np.float64).ravel()
    except (TypeError, ValueError):
        numbers = np.array([np.nan])
    if not np.isfinite(numbers).all():
        raise InputError(f"{what}: holds something else than finite numbers; {EXPECTED}")
    return numbers


def _opencv_lens(node: Mapping[str, Node], name: str) -> Lens:
    matrix = _numbers(_first(node, MATRICES), f"{name}: its camera matrix")
    if len(matrix) != 9:
        raise InputError(f"{name}: its camera matrix has {len(matrix)} numbers, expected 3 x 3")
    model = "fisheye" if _numbers(node.get("fisheye_model", 0), name).any() else node.get("distortion_model")
    bent = _numbers(_first(node, DISTORTIONS), f"{name}: its distortion")
    if model not in (None, "plumb_bob", "radtan", "rational_polynomial"):
        raise InputError(f"{name}: {str(model)[:40]} distortion is not known; {_REMEDY}")
    return _lens(matrix[[0, 4, 2, 5]], bent, name)


def _kalibr_lens(node: Mapping[str, Node], name: str) -> Lens:
    model, bending = str(node.get("camera_model", "pinhole")), str(node.get("distortion_model", "none"))
    if model != "pinhole" or bending not in ("radtan", "none"):
        raise InputError(f"{name}: model {model} with {bending} distortion is not known; {_REMEDY}")
    four = _numbers(node["intrinsics"], f"{name}: its intrinsics")
    if len(four) != 4:
        raise InputError(f"{name}: its intrinsics have {len(four)} numbers, expected fx, fy, cx, cy")
    return _lens(four, _numbers(node.get("distortion_coeffs"), f"{name}: its distortion_coeffs"), name)


_REMEDY = "calibrate with a pinhole and radial-tangential distortion (OpenCV's five coefficients, Kalibr's radtan)"


def _lens(four: NDArray[np.float64], bent: NDArray[np.float64], name: str) -> Lens:
    if bent[5:].any():
        raise InputError(f"{name}: {len(bent)} coefficients of distortion, expected at most five; {_REMEDY}")
    values = {**dict(zip(("fx", "fy", "cx", "cy"), four.tolist(), strict=True)), "distortion": bent[:5].tolist()}
    return Lens.from_dict(values, name)


def _size(node: Mapping[str, Node], name: str) -> Size | None:
    """(H, W); None where the file tells none."""
    both = tuple(node.get(f"image_{side}", node.get(side)) for side in ("width", "height"))
    value: Node = node.get("resolution", node.get("imageSize", both if None not in both else None))
    if value is None:
        return None
    numbers = _numbers(list(value) if isinstance(value, tuple) else value, f"{name}: its picture size")
    if len(numbers) != 2 or not (numbers >= 1).all() or (numbers != numbers.round()).any():
        raise InputError(f"{name}: its picture size is {numbers.tolist()}, expected width and height in pixels")
    return int(numbers[1]), int(numbers[0])
