"""Classify image files with an exported model; needs ai-edge-litert, numpy and pillow, neither torch nor qimera.

python deploy_litert.py model.tflite photo.png ...
"""

import json
import sys
import zipfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter
from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def main(model: str, *files: str) -> None:
    """Print the class of each image file and its probability."""
    with zipfile.ZipFile(model) as inside:  # what belongs to the model follows it as an archive
        notes = json.loads(inside.read("qimera.json"))
        labels = inside.read("labels.txt").decode().splitlines() if "labels.txt" in inside.namelist() else None
    run = Interpreter(model).get_signature_runner()
    (name,) = run.get_input_details()
    scale, zero_point = run.get_output_details()["logits"]["quantization"]
    for file in files:
        pixels = read_pixels(file, notes)
        logits = run(**{name: pixels if name == "pixels" else normalize(pixels, notes)})["logits"][0]
        probabilities = softmax((logits.astype(np.float32) - zero_point) * (scale or 1))
        best = int(probabilities.argmax())
        print(f"{file}: {labels[best] if labels else best}, {probabilities[best]:.1%}")


def read_pixels(file: str, notes: dict[str, list[int]]) -> np.ndarray:
    """Read an image as uint8 (1, height, width, channel) of the size that the model takes."""
    channels, height, width = notes["input_shape"]
    image = Image.open(file).convert(MODES[channels]).resize((width, height))
    return np.asarray(image, np.uint8).reshape(1, height, width, channels)


def normalize(pixels: np.ndarray, notes: dict[str, list[float]]) -> np.ndarray:
    """Turn pixels into float32, normalised as in training."""
    mean, std, (darkest, brightest) = (
        np.array(notes[f"input_{key}"], np.float32) for key in ("mean", "std", "pixel_range")
    )
    low, high = (darkest - mean) / std, (brightest - mean) / std
    return low + pixels * ((high - low) / np.float32(255))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn the logits of one image into probabilities."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


if __name__ == "__main__":
    main(*sys.argv[1:])
