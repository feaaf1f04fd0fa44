"""What models say to the same prompt, such as a float model and what was made of it.

    python examples/generate.py PROMPT MODEL.onnx [MODEL.onnx ...]

Every model has its tokenizer.json beside it. The likeliest token is taken each time, so that texts part where a model
decides otherwise than the first one.
"""

import sys

from quarot_onnx.generation.generator import Generator

if "--help" in sys.argv or len(sys.argv) < 3:
    print(__doc__)
    sys.exit(0 if "--help" in sys.argv else 2)
prompt, *models = sys.argv[1:]
first = None
for model in models:
    generator = Generator(model)
    task = generator.task(prompt, max_new_tokens=32)
    print(f"{model}\n{prompt}", end="", flush=True)
    found = generator.run(task, tell=lambda piece: print(piece, end="", flush=True))
    first = first or found
    alike = next((i for i, (a, b) in enumerate(zip(first.ids, found.ids, strict=False)) if a != b), len(found.ids))
    print(f"\n-- alike for {alike} of {len(first.ids)} tokens; {found.prefill_speed:.1f} tokens/s of prompt\n")
