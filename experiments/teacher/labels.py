"""Label maps of two networks that know streets, for `data.teacher_labels`: ID.png with Cityscapes' 19 classes (ids 0
to 18), kerbs (19), and 255 where neither is sure.

    pip install ai-edge-litert openvino
    python experiments/teacher/labels.py --images FOLDER --ids train_day.txt \\
        --streets FILE.tflite --kerbs FILE.xml --out FOLDER

--streets: deeplab_mobilenet_edgetpu_slim_cityscapes_quant.tflite of github.com/google-coral/test_data (Apache-2.0);
--kerbs: road-segmentation-adas-0001.xml of Open Model Zoo (Apache-2.0). Both learned from pictures taken by day, so
give a list of such pairs. A map that is there is kept. With --labels, MFNet's own label maps, the IoU of the kerbs in
both is printed. Each sees a picture and its mirror image; the first takes squares, and sees both ends.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import openvino
from ai_edge_litert.interpreter import Interpreter
from PIL import Image
from tqdm import tqdm

KERB, UNSURE = 19, 255
CURVE = 4  # what MFNet calls a kerb
SURE, KERB_SURE = 0.7, 0.6  # smallest probabilities that are believed
CURB = 2  # of background, road, curb, mark

Network = Callable[[np.ndarray], np.ndarray]


def resized(maps: np.ndarray, height: int, width: int) -> np.ndarray:
    """(C,h,w) -> (C,height,width), bilinear."""
    return np.stack([np.asarray(Image.fromarray(m).resize((width, height), Image.Resampling.BILINEAR)) for m in maps])


def streets(path: Path) -> Network:
    """RGB uint8 (H,W,3) -> logits (19,H,W). The file's last operator takes their argmax, so they are read before it."""
    network = Interpreter(str(path), num_threads=1, experimental_preserve_all_tensors=True)
    network.allocate_tensors()
    entry = network.get_input_details()[0]
    logits = next(op["inputs"][0] for op in network._get_ops_details() if op["op_name"] == "ARG_MAX")
    scale, zero = next(t["quantization"] for t in network.get_tensor_details() if t["index"] == logits)
    side = int(entry["shape"][1])

    def square(image: np.ndarray) -> np.ndarray:
        small = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))
        network.set_tensor(entry["index"], small[None])
        network.invoke()
        found = (network.get_tensor(logits)[0].astype(np.float32) - zero) * scale
        return resized(found.transpose(2, 0, 1), *image.shape[:2])

    def both_ends(image: np.ndarray) -> np.ndarray:
        height, width = image.shape[:2]
        total, seen = np.zeros((19, height, width), np.float32), np.zeros(width, np.float32)
        for left in {0, max(0, width - height)}:
            part = slice(left, left + height)
            total[:, :, part] += square(image[:, part])
            seen[part] += 1
        return total / seen

    return both_ends


def kerbs(path: Path) -> Network:
    """RGB uint8 (H,W,3) -> probability of a kerb (1,H,W)."""
    network = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": 1})
    height, width = network.input(0).shape[2:]

    def found(image: np.ndarray) -> np.ndarray:
        small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
        blob = np.ascontiguousarray(small[:, :, ::-1].transpose(2, 0, 1)[None], dtype=np.float32)
        return resized(network(blob)[0][0, CURB : CURB + 1], *image.shape[:2])

    return found


def with_mirror(network: Network, image: np.ndarray) -> np.ndarray:
    """The mean of what the network says of a picture and of its mirror image."""
    return (network(image) + network(np.ascontiguousarray(image[:, ::-1]))[:, :, ::-1]) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("images", "ids", "streets", "kerbs", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--labels", type=Path)
    given = parser.parse_args()
    one, two = streets(given.streets), kerbs(given.kerbs)
    given.out.mkdir(parents=True, exist_ok=True)
    ids = given.ids.read_text().split()
    for id in tqdm([id for id in ids if not (given.out / f"{id}.png").exists()]):
        image = np.ascontiguousarray(np.asarray(Image.open(given.images / f"{id}.png"))[:, :, :3])
        logits = with_mirror(one, image)
        power = np.exp(logits - logits.max(0))
        label = np.where((power / power.sum(0)).max(0) >= SURE, logits.argmax(0), UNSURE)
        label[with_mirror(two, image)[0] > KERB_SURE] = KERB
        Image.fromarray(label.astype(np.uint8)).save(given.out / f"{id}.png")
    if given.labels:
        both = either = 0
        for id in ids:
            ours = np.asarray(Image.open(given.labels / f"{id}.png")) == CURVE
            theirs = np.asarray(Image.open(given.out / f"{id}.png")) == KERB
            both, either = both + (ours & theirs).sum(), either + (ours | theirs).sum()
        print(f"IoU of kerbs: {both / either:.3f}")


if __name__ == "__main__":
    main()
