"""Run by SGLang's interpreter: cosines and sines of its own rotary classes, for each ``rope_scaling`` of a
JSON list on standard input, of heads of 128 at the positions that it is told; as JSON.
"""

import json
import sys

import torch
from sglang.srt.layers.rotary_embedding import get_rope

asked = json.load(sys.stdin)
found = []
for scaling in asked["scalings"]:
    made = get_rope(128, 128, 32_768, scaling["rope_theta"], rope_scaling=scaling, dtype=torch.float32)
    found.append(made.cos_sin_cache[asked["positions"]].tolist())
print(json.dumps(found))
