"""Detect with ONNX Runtime alone, in a file of ``export.py --include onnx --nms``: onnx_runtime.py FILE.onnx PICTURE."""

import ast
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
height, width = session.get_inputs()[0].shape[2:]
picture = Image.open(sys.argv[2]).convert("RGB")
scale = min(width / picture.width, height / picture.height)
small = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BOX)
left, top = (width - small.width) // 2, (height - small.height) // 2
canvas = Image.new("RGB", (width, height), (114, 114, 114))
canvas.paste(small, (left, top))
images = np.asarray(canvas, np.float32).transpose(2, 0, 1)[None] / 255
for x1, y1, x2, y2, score, kind in session.run(None, {"images": images})[0][0]:
    if score > 0.25:
        box = [round(float(value) / scale, 1) for value in (x1 - left, y1 - top, x2 - left, y2 - top)]
        print(names[int(kind)], f"{score:.3f}", *box)
