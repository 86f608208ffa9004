"""Classify image files with an exported model; needs onnxruntime, numpy and pillow, neither torch nor qimera.

python deploy_onnxruntime.py model.onnx photo.png ...
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def main(model: str, *files: str) -> None:
    """Print the class of each image file and its probability."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    labels = json.loads(metadata.get("qimera.labels", "null")) or range(int(metadata["qimera.num_classes"]))
    name = session.get_inputs()[0].name
    for file in files:
        pixels = read_pixels(file, metadata)
        inputs = pixels if name == "pixels" else normalize(pixels, metadata)
        probabilities = softmax(session.run(["logits"], {name: inputs})[0][0])
        best = int(probabilities.argmax())
        print(f"{file}: {labels[best]}, {probabilities[best]:.1%}")


def read_pixels(file: str, metadata: dict[str, str]) -> np.ndarray:
    """Read an image as uint8 (1, height, width, channel) of the size that the model takes."""
    channels, height, width = json.loads(metadata["qimera.input_shape"])
    image = Image.open(file).convert(MODES[channels]).resize((width, height))
    return np.asarray(image, np.uint8).reshape(1, height, width, channels)


def normalize(pixels: np.ndarray, metadata: dict[str, str]) -> np.ndarray:
    """Turn pixels into float32 (1, channel, height, width), normalised as in training."""
    mean, std, (darkest, brightest) = (
        np.array(json.loads(metadata[f"qimera.input_{key}"]), np.float32) for key in ("mean", "std", "pixel_range")
    )
    low, high = (darkest - mean) / std, (brightest - mean) / std
    return np.ascontiguousarray((low + pixels * ((high - low) / np.float32(255))).transpose(0, 3, 1, 2))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Turn the logits of one image into probabilities."""
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


if __name__ == "__main__":
    main(*sys.argv[1:])
